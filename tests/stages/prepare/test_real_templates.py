"""Random conversations through ten real templates: ids as transformers makes them, each supervised character once."""

import json
from itertools import groupby
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.stages.prepare.conftest import train_tokenizer
from tests.stages.prepare.real import REAL, Real, special_tokens
from transformers import PreTrainedTokenizerFast

from kdpipe.manifests.errors import DataError
from kdpipe.manifests.sample import KEPT
from kdpipe.stages.prepare.forms import Chat, read_form
from kdpipe.stages.prepare.marked import Marked
from kdpipe.stages.prepare.sources import RawRecord
from kdpipe.stages.prepare.template import FIXED_DATE
from kdpipe.stages.prepare.tokens import Tokenizing

Record = dict[str, Any]
Model = tuple[Real, PreTrainedTokenizerFast, Tokenizing]

# Several bytes a character, marks that join to the letter before, text that looks like markup, JSON or jinja.
PIECES = (
    "a",
    "Paris",
    " ",
    "\n",
    "\n\n",
    "\t",
    "你好",
    "日本語",
    "🙂",
    "👩‍👩‍👧",
    "é",
    "e\u0301",
    "\u00a0",
    "नमस्ते",
    '"',
    "\\",
    "\\n",
    "'",
    "{",
    "}}",
    "{{ x }}",
    "<b>",
    "</",
    "<|",
    "|>",
    "[",
    "assistant",
    "user",
    "null",
    "<think",
    "0.10",
)
words = st.lists(st.sampled_from(PIECES), max_size=5).map("".join) | st.text(
    st.characters(exclude_categories=["Cs"]), max_size=8
)


@st.composite
def said(draw: Any, tag: str) -> str:
    """A text around a word that stands nowhere else, so that it can be counted."""
    return f"{draw(words)}{tag}{draw(words)}"


@st.composite
def values(draw: Any, tag: str) -> Any:
    """Arguments of a call, without null: a record's null entries are those of a column that others fill."""
    value = st.one_of(st.integers(-9, 9), st.booleans(), words, st.lists(words, max_size=2))
    more = draw(st.dictionaries(st.sampled_from(["city", "unit", "größe", "n"]), value, max_size=2))
    return {"query": draw(said(tag)), **more} if draw(st.booleans()) else more


TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": f"Does {name} of größe",
            "parameters": {
                "type": "object",
                "properties": {"query": {"type": "string", "description": f"What {name} is of"}},
            },
        },
    }
    for name in ("lookup_weather", "search_web")
]


@st.composite
def records(draw: Any) -> Record:
    """A conversation: questions, answers, calls and their results, thoughts, marks of what is to be learned."""
    messages: list[Record] = []
    if draw(st.booleans()):
        messages.append({"role": "system", "content": draw(said("SYS0"))})
    calls = 0
    for turn in range(draw(st.integers(1, 3))):
        messages.append({"role": "user", "content": draw(said(f"ASK{turn}"))})
        for step in range(draw(st.sampled_from([0, 0, 1, 2]))):
            calling = answer(draw, f"{turn}{step}", says=draw(st.sampled_from([False, False, True])))
            calling["tool_calls"] = []
            for _ in range(draw(st.sampled_from([1, 1, 2]))):
                name = draw(st.sampled_from(TOOLS))["function"]["name"]
                function = {"name": name, "arguments": draw(values(f"ARG{calls}Q"))}
                calling["tool_calls"].append({"id": f"call{calls:05d}", "type": "function", "function": function})
                calls += 1
            messages.append(calling)
            for call in calling["tool_calls"]:
                result = {"role": "tool", "tool_call_id": call["id"], "content": draw(said(f"RES{call['id']}"))}
                messages.append({**result, "name": call["function"]["name"]})
        messages.append(answer(draw, f"{turn}9", says=True))
    record: Record = {"messages": messages}
    if calls or draw(st.sampled_from([False, False, True])):
        record["tools"] = TOOLS
    return record


def answer(draw: Any, number: str, *, says: bool) -> Record:
    message: Record = {"role": "assistant", "content": draw(said(f"ANS{number}Q")) if says else ""}
    if draw(st.sampled_from([False, False, True])):
        message["reasoning_content"] = draw(said(f"THO{number}Q"))
    if draw(st.sampled_from([False, False, True])):
        message["weight"] = draw(st.sampled_from([0, 1]))
    return message


def as_it_may_stand(text: str) -> set[str]:
    """A text in the ways a template may show it."""
    body = text.strip()
    return {body, json.dumps(body, ensure_ascii=False)[1:-1], json.dumps(body)[1:-1]}


def stands(text: str, shown: str) -> bool:
    return any(way in shown for way in as_it_may_stand(text))


def leaves(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [text for key, item in value.items() for text in (key, *leaves(item))]
    if isinstance(value, list):
        return [text for item in value for text in leaves(item)]
    return [value if isinstance(value, str) else json.dumps(value)]


def check(model: Model, record: Record) -> str:
    """What became of the record, after all that must hold of it was found to hold."""
    real, tokenizer, tokenizing = model
    form = read_form(RawRecord(source="x", line=1, place="x:1", fields=json.loads(json.dumps(record))))
    assert isinstance(form, Chat)
    plain = [{key: value for key, value in message.items() if key != "weight"} for message in record["messages"]]
    given = {"tools": record.get("tools"), "strftime_now": FIXED_DATE.strftime}
    marked, refusal = None, ""
    try:
        marked = tokenizing.mark(form, "x:1")
    except DataError as err:
        refusal = str(err)
    if marked is None:
        assert "the chat template refuses" in refusal
        with pytest.raises(Exception):  # noqa: B017  (transformers refuses it likewise, whatever the template raises)
            tokenizer.apply_chat_template(real.write(plain), tokenize=False, **given)
        return "refused"
    ids = tokenizer.apply_chat_template(real.write(plain), tokenize=True, return_dict=True, **given)["input_ids"]
    [tokens] = tokenizing.encode([marked])
    assert tokens.token_ids.tolist() == ids
    learnt = [m for m in record["messages"] if m["role"] == "assistant" and m.get("weight", 1)]
    pairs = zip(ids, tokens.supervised.tolist(), strict=True)
    runs = [[token for token, _ in run] for supervised, run in groupby(pairs, key=lambda pair: pair[1]) if supervised]
    check_turns(model, record, learnt, runs, marked)
    kinds = {finding.kind for finding in marked.findings}
    if not kinds <= KEPT:
        return "left out"
    return "kept" if not kinds else "kept with incidents"


def check_turns(model: Model, record: Record, learnt: list[Record], runs: list[list[int]], marked: Marked) -> None:
    real, tokenizer, _ = model
    details = {finding.kind: finding.detail for finding in marked.findings}
    if not details.keys() <= KEPT:
        return
    assert len(runs) == len(learnt)
    texts = [tokenizer.decode(run) for run in runs]
    stops = {tokenizer.convert_tokens_to_ids(token) for token in (real.eos, *real.stops)}
    for message, run, shown in zip(learnt, runs, texts, strict=True):
        assert stands(message["content"], shown)
        assert stands(message.get("reasoning_content", ""), shown) or "thought_left_out" in details
        for call in message.get("tool_calls", ()):
            function = call["function"]
            assert all(stands(text, shown) for text in (function["name"], *leaves(function["arguments"])))
        assert run[-1] in stops or "no_stop_token" in details
    everything = "".join(texts)
    for message in record["messages"]:
        tag = next((word for word in ("SYS", "ASK", "RES", "ANS") if word in message["content"]), None)
        if tag is not None:
            name = message["content"][message["content"].index(tag) :][:12]
            stem = name[:4] if tag in ("SYS", "ASK") else name[: len("RES") + 9] if tag == "RES" else name[:6]
            times = 1 if any(message is each for each in learnt) else 0
            assert everything.count(stem) == times
            assert stands(message["content"], marked.text) or "prompt_changed" in details
    if "tools" in record:
        names = [
            word for tool in record["tools"] for word in (tool["function"]["name"], tool["function"]["description"])
        ]
        assert all(stands(name, marked.text) for name in names) or "tools_left_out" in details


@pytest.fixture(scope="module")
def models() -> dict[str, Model]:
    return {name: model_of(real) for name, real in REAL.items()}


def model_of(real: Real) -> Model:
    tokenizer = train_tokenizer(special=special_tokens(real), eos=real.eos)
    tokenizer.chat_template = real.source
    stops = [tokenizer.convert_tokens_to_ids(token) for token in real.stops]
    return real, tokenizer, Tokenizing(tokenizer, "assistant", stops)


def run_through(model: Model, examples: int, *, derandomize: bool) -> dict[str, int]:
    became: dict[str, int] = {}

    @settings(
        max_examples=examples,
        derandomize=derandomize,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        database=None,
    )
    @given(records())
    def through(record: Record) -> None:
        what = check(model, record)
        became[what] = became.get(what, 0) + 1

    through()
    return became


@pytest.mark.parametrize("name", REAL)
def test_supervised_characters_are_supervised_once_or_said(name: str, models: dict[str, Model]) -> None:
    became = run_through(models[name], 25, derandomize=True)
    assert became.get("kept", 0) + became.get("kept with incidents", 0) > 0


@pytest.mark.parametrize("said", ["", " \n"])
@pytest.mark.parametrize("asked", [("", "q"), ("q", ""), ("q", "", "q"), ("", "", "")])
def test_a_question_without_words_is_found_where_a_template_moves_the_system_prompt(
    asked: tuple[str, ...], said: str, models: dict[str, Model]
) -> None:
    """Defect: where the answer to it begins was said not to be tellable (Mistral)."""
    messages: list[Record] = [{"role": "system", "content": "S"}]
    for number, question in enumerate(asked):
        messages.append({"role": "user", "content": question or said})
        messages.append({"role": "assistant", "content": f"answer{number}"})
    _, _, tokenizing = models["mistral"]
    marked = tokenizing.mark(Chat(messages=messages), "x:1")
    learnt = [marked.text[start:end] for start, end in marked.targets or ()]
    assert learnt == [f" answer{number}</s>" for number in range(len(asked))]


@pytest.mark.slow
@pytest.mark.parametrize("name", REAL)
def test_thousands_of_conversations_are_supervised_once_or_said(name: str, models: dict[str, Model]) -> None:
    run_through(models[name], 300, derandomize=False)


REPHRASED = ("mistral", "deepseek_r1", "gpt_oss")
"""They show a conversation otherwise once its answer is there: system prompt moved, thoughts left out."""


@pytest.mark.parametrize("name", REAL)
def test_a_prompt_is_what_its_answer_follows(name: str, models: dict[str, Model]) -> None:
    """As transformers gives it with add_generation_prompt; and the beginning of the whole, where that is shown so."""
    real, tokenizer, tokenizing = models[name]
    seen = 0

    @settings(max_examples=20, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(records())
    def through(record: Record) -> None:
        nonlocal seen
        tools = record.get("tools")
        messages = [{key: value for key, value in each.items() if key != "weight"} for each in record["messages"]]
        try:
            whole = tokenizing.mark(Chat(messages=messages, tools=tools), "x:1")
        except DataError:
            return
        if not (whole.targets and {each.kind for each in whole.findings} <= KEPT):
            return
        seen += 1
        asked = [*messages[:-1], {"role": "assistant", "content": None}] if seen % 2 else messages[:-1]
        form = read_form(
            RawRecord(source="x", line=1, place="x", fields={"messages": asked, "tools": tools}), prompts=True
        )
        assert isinstance(form, Chat)
        prompt = tokenizing.mark(form, "x:1").text
        given = {"tools": tools, "strftime_now": FIXED_DATE.strftime}
        written = real.write(messages[:-1])
        assert prompt == tokenizer.apply_chat_template(written, tokenize=False, add_generation_prompt=True, **given)
        assert prompt == whole.text[: whole.targets[-1][0]] or name in REPHRASED

    through()
    assert seen > 5
