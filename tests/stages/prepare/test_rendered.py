"""What a template leaves out of a conversation is found, and what it merely writes otherwise is not."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kdpipe.manifests.errors import DataError
from kdpipe.manifests.sample import Incident
from kdpipe.stages.prepare.rendered import position

Run = Callable[..., Any]
Write = Callable[..., Path]
Targets = Callable[..., str]

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
USE = "{% if tools %}<tools>{{ tools | tojson }}</tools>{% endif %}"
CALLS = (
    "{% for c in m.tool_calls or [] %}<call>{{ c.function.name }} {{ c.function.arguments | tojson }}</call>"
    "{% endfor %}"
)
TOOL = {
    "type": "function",
    "function": {
        "name": "getweather",
        "description": 'The "weather" of a city',
        "parameters": {"type": "object", "properties": {"city": {"type": "string", "enum": ["Köln", "Bonn"]}}},
    },
}
QUESTION = {"role": "user", "content": "q"}
ANSWER = {"role": "assistant", "content": "a"}


def call(**arguments: Any) -> dict[str, Any]:
    return {"id": "1", "type": "function", "function": {"name": "getweather", "arguments": arguments}}


@pytest.fixture
def incidents(kit: Any, write: Write, run: Run) -> Callable[..., list[Incident]]:
    """incidents(template, messages, tools) -> those of one record beside a whole one"""

    def of(template: Any, messages: list[Any], tools: list[Any] | None = None) -> list[Incident]:
        tokenizer = kit.train(eos="<|im_end|>")
        tokenizer.chat_template = template
        whole = {"messages": [{"role": "user", "content": "whole"}, {"role": "assistant", "content": "whole"}]}
        path = write([{"messages": messages, **({"tools": tools} if tools else {})}, whole])
        samples, found = run(path, tokenizer)
        assert 2 in [sample.line for sample in samples]
        return [incident for incident in found if incident.line == 1]

    return of


def kinds(found: list[Incident]) -> list[str]:
    return [incident.kind for incident in found]


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("{{ m.content }}", " one\n\n"),
        ("{{ m.content | trim }}", " 🙂 你好\t"),
        ("{{ m.content | tojson }}", 'say "größe"\n\\ 👩‍👩‍👧'),
        ("{{ m.content | tojson(ensure_ascii=True) }}", 'say "größe"\n'),
        ("{{ m.content.split('</think>')[-1] }}", "no thought"),
    ],
)
def test_what_is_trimmed_or_written_as_json_is_there(body: str, said: str, incidents: Any) -> None:
    template = CHATML.replace("{{ m.content }}", body)
    assert incidents(template, [{**QUESTION, "content": said}, {**ANSWER, "content": said}]) == []


def test_an_answer_that_is_cut_is_left_out_with_what_is_missing(incidents: Any) -> None:
    template = CHATML.replace("m.content", "m.content[:20]")
    [found] = incidents(template, [QUESTION, {**ANSWER, "content": "one two three four five six seven"}])
    assert (found.kind, found.dropped) == ("answer_changed", True)
    assert found.detail.startswith("assistant turn 1 is not in the text as it is: 13 of its 33 characters")
    assert "seven" not in found.detail


@pytest.mark.parametrize("key", ["reasoning_content", None])
def test_a_thought_that_is_cut_off_is_said_and_the_answer_learnt(key: str | None, incidents: Any) -> None:
    template = CHATML.replace("{{ m.content }}", "{{ m.content.split('</think>')[-1].lstrip() }}")
    answer = {**ANSWER, key: "long"} if key else {**ANSWER, "content": "<think>\nlong\n</think>\n\na"}
    [found] = incidents(template, [QUESTION, answer, QUESTION, answer])
    assert (found.kind, found.dropped) == ("thought_left_out", False)
    assert found.detail == "the thought of assistant turn 1, 2 is not in the text"


CUT = CHATML.replace("{{ m.content }}", "{{ m.content.split('</think>')[-1].lstrip() }}")


@pytest.mark.parametrize("said", ["The capital is Paris.", "Paris"])
@pytest.mark.parametrize("key", ["reasoning_content", None])
def test_an_answer_with_the_words_of_a_thought_that_is_left_out_is_there(
    said: str, key: str | None, incidents: Any
) -> None:
    """Defect: the thought was found in the answer, and the answer then missed behind it."""
    inline = f"<think>\nParis\n</think>\n\n{said}"
    answer = {**ANSWER, "content": said, key: "Paris"} if key else {**ANSWER, "content": inline}
    [found] = incidents(CUT, [QUESTION, answer])
    assert (found.kind, found.detail) == ("thought_left_out", "the thought of assistant turn 1 is not in the text")
    assert incidents(CHATML, [QUESTION, {**ANSWER, "content": inline}]) == []


@pytest.mark.parametrize("content", ["", "<think>\nlong\n</think>"])
def test_a_turn_of_which_a_template_leaves_nothing_is_left_out(content: str, incidents: Any) -> None:
    """Defect: a bare end-of-turn marker was learnt as the answer."""
    answer = {**ANSWER, "content": content, **({} if content else {"reasoning_content": "long"})}
    found = incidents(CUT, [QUESTION, answer, QUESTION, ANSWER])
    assert [(each.kind, each.detail) for each in found] == [
        ("thought_left_out", "the thought of assistant turn 1 is not in the text"),
        ("answer_changed", "assistant turn 1 is nothing but a thought, which is not in the text"),
    ]
    assert kinds(incidents(CUT, [QUESTION, {**answer, "weight": 0}, QUESTION, ANSWER])) == ["thought_left_out"]


KEYED = CHATML.replace(
    "{{ m.content }}", "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}"
)


@pytest.mark.parametrize(
    ("template", "once"), [(CHATML, "<think>\nt1\n</think>\n\nans"), (KEYED, "<think>t1</think>ans")]
)
def test_a_thought_within_the_answer_and_beside_it_counts_once(
    template: str, once: str, kit: Any, write: Write, run: Run, targets: Targets
) -> None:
    tokenizer = kit.train(eos="<|im_end|>")
    tokenizer.chat_template = template
    answer = {**ANSWER, "content": "<think>\nt1\n</think>\n\nans", "reasoning_content": "t1"}
    [sample], found = run(write([{"messages": [QUESTION, answer]}]), tokenizer)
    assert targets(sample, tokenizer) == f"{once}<|im_end|>"
    assert found == []
    with pytest.raises(DataError, match=r"jsonl:1: message 2: which is the thought, the one between <think> and"):
        run(write([{"messages": [QUESTION, {**answer, "reasoning_content": "t"}]}]), tokenizer)
    for said in ("Write <think>t</think> first.", "It ends with </think>."):
        [sample], _ = run(write([{"messages": [QUESTION, {**answer, "content": said}]}]), tokenizer)
        assert said in targets(sample, tokenizer)


@pytest.mark.parametrize("role", ["system", "user"])
def test_a_prompt_that_is_left_out_is_said(role: str, incidents: Any) -> None:
    template = CHATML.replace("{{ m.content }}", f"{{% if m.role != '{role}' %}}{{{{ m.content }}}}{{% endif %}}")
    [found] = incidents(template, [{"role": "system", "content": "brief"}, {"role": "user", "content": "why"}, ANSWER])
    assert (found.kind, found.dropped) == ("prompt_changed", False)
    assert found.detail == f"message {1 if role == 'system' else 2} ({role}) is not in the text as it is"


def test_tools_reach_the_template_that_is_for_them(incidents: Any) -> None:
    chat = [QUESTION, ANSWER]
    assert incidents(USE + CHATML, chat, [TOOL]) == []
    assert incidents({"default": CHATML, "tool_use": USE + CHATML}, chat, [TOOL]) == []
    assert kinds(incidents(CHATML, chat, [TOOL])) == ["tools_left_out"]
    assert kinds(incidents({"default": USE + CHATML, "tool_use": CHATML}, chat, [TOOL])) == ["tools_left_out"]


@pytest.mark.parametrize("shown", ["t.function.name", "t.function.name ~ t.function.description"])
def test_a_tool_shown_in_part_is_said(shown: str, incidents: Any) -> None:
    template = f"{{% for t in tools or [] %}}{{{{ {shown} }}}}{{% endfor %}}" + CHATML
    [found] = incidents(template, [QUESTION, ANSWER], [TOOL])
    assert found.detail == "1 of 1 tools are not in the text with all they say"


def test_only_a_template_for_tools_is_no_template_for_a_chat_without(kit: Any, write: Write, run: Run) -> None:
    tokenizer = kit.train(eos="<|im_end|>")
    tokenizer.chat_template = {"tool_use": USE + CHATML}
    [sample] = run(write([{"messages": [QUESTION, ANSWER], "tools": [TOOL]}]), tokenizer).samples
    assert "getweather" in tokenizer.decode(sample.token_ids)
    with pytest.raises(DataError, match=r"several chat templates \(tool_use\) and none named 'default'"):
        run(write([{"messages": [QUESTION, ANSWER]}]), tokenizer)


CALLING = [QUESTION, {**ANSWER, "content": "", "tool_calls": [call(city="Köln"), call(city="Bonn")]}]
RESULTS = [{"role": "tool", "content": "sunny"}, {"role": "tool", "content": "rain"}, ANSWER]


@pytest.mark.parametrize("learnt", [True, False])
@pytest.mark.parametrize(
    "calls",
    [
        "",
        CALLS.replace("m.tool_calls or []", "(m.tool_calls or [])[:1]"),
        CALLS.replace("{{ c.function.arguments | tojson }}", ""),
    ],
)
def test_a_call_that_is_left_out_is_said_and_not_learnt(calls: str, learnt: bool, incidents: Any) -> None:
    template = CHATML.replace("{{ m.content }}", "{{ m.content }}" + calls)
    marked = [CALLING[0], {**CALLING[1], "weight": int(learnt)}]
    [found] = incidents(template, marked + RESULTS)
    assert (found.kind, found.dropped) == (("tool_call_left_out", True) if learnt else ("prompt_changed", False))


def test_of_two_calls_that_are_alike_each_is_looked_for(incidents: Any) -> None:
    twice = [QUESTION, {**CALLING[1], "tool_calls": [call(city="Bonn"), call(city="Bonn")]}, *RESULTS]
    template = CHATML.replace("{{ m.content }}", "{{ m.content }}" + CALLS)
    assert incidents(template, twice) == []
    assert kinds(incidents(template.replace("m.tool_calls or []", "(m.tool_calls or [])[:1]"), twice)) == [
        "tool_call_left_out"
    ]


PYTHON = "{{ c.function.name }}({% for k, v in c.function.arguments.items() %}{{ k }}={{ SHOWN }}{% endfor %})"
SINGLE = r"""'{{ v | replace("'", "\\'") | replace("\n", "\\n") }}'"""


@pytest.mark.parametrize("shown", [None, '{{ "%r" | format(v) }}', SINGLE])
def test_arguments_are_found_in_any_spelling_each_in_its_own_call(shown: str | None, incidents: Any) -> None:
    """Defect: the raw spelling was found in the second call before the JSON spelling in the first."""
    calls = "{% for c in m.tool_calls or [] %}" + PYTHON.replace("{{ SHOWN }}", shown or "") + "{% endfor %}"
    template = CHATML.replace("{{ m.content }}", "{{ m.content }}" + (calls if shown else CALLS))
    for first, second in (('"climate change"', "climate change"), ("it's", "it"), ('it\'s "so"\n', "so"), ("'", "'")):
        messages = [QUESTION, {**CALLING[1], "tool_calls": [call(query=first), call(query=second)]}, *RESULTS]
        assert incidents(template, messages) == []


def test_a_call_that_is_shown_is_learnt_to_its_end(kit: Any, write: Write, run: Run, targets: Targets) -> None:
    tokenizer = kit.train(eos="<|im_end|>")
    tokenizer.chat_template = CHATML.replace("{{ m.content }}", "{{ m.content }}" + CALLS)
    samples, found = run(write([{"messages": CALLING + RESULTS}]), tokenizer)
    assert found == []
    shown = ['<call>getweather {"city": "Köln"}</call>', '<call>getweather {"city": "Bonn"}</call>']
    assert targets(samples[0], tokenizer) == "".join(shown) + "<|im_end|>a<|im_end|>"


def test_a_call_behind_words_is_learnt_to_its_end_where_no_marker_ends_a_turn(
    kit: Any, write: Write, run: Run, targets: Targets
) -> None:
    """The words are shown as they are, and the turn does not end with them."""
    tokenizer = kit.train()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}" + CALLS + "\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    calling = {**CALLING[1], "content": "let me see", "tool_calls": [call(city="Bonn")]}
    [sample] = run(write([{"messages": [QUESTION, calling, {"role": "tool", "content": "rain"}, ANSWER]}]), tokenizer)[
        0
    ]
    shown = ' let me see<call>getweather {"city": "Bonn"}</call>'
    assert targets(sample, tokenizer) == f"{shown} a"


def test_a_piece_is_found_less_its_blanks_first_or_last() -> None:
    assert position("a b a", " a\n") == (0, 1)
    assert position("a b a", "a", last=True) == (4, 5)
    assert position("a b a", "a", (1, 4)) is None
    assert position('"x\\ny"', "x\ny") == (1, 5)
    assert position("abc", " ", (1, 2)) == (1, 1)
