"""Turns are learnt to their stop token; special tokens stand once; what is rendered already is not rendered again."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kdpipe.manifests.errors import DataError
from kdpipe.manifests.specs import DataSpec
from kdpipe.stages.prepare import prepare
from kdpipe.stages.prepare.forms import Chat
from kdpipe.stages.prepare.tokens import Tokenizing

Run = Callable[..., Any]
Write = Callable[..., Path]
Targets = Callable[..., str]

END = "<|im_end|>"
GLM = (
    "[gMASK]<sop>{% for m in messages %}<|{{ m.role }}|>\nBODY{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
THINKING = "{% if m.role == 'assistant' %}<think></think>\n{% endif %}{{ m.content }}"


def chat(*said: str, system: str | None = None, **marks: Any) -> dict[str, Any]:
    """A conversation that the user begins; marks: keys of the first answer."""
    messages: list[dict[str, Any]] = [
        {"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(said)
    ]
    messages[1].update(marks)
    return {"messages": [{"role": "system", "content": system}] * (system is not None) + messages}


def through(kit: Any, path: Path, template: str, *, eos: str, stops: tuple[str, ...] = (), **spec: Any) -> Any:
    """The tokenizer, and samples and incidents of a file."""
    tokenizer = kit.train(eos=eos)
    tokenizer.chat_template = template
    found: list[Any] = []
    ids = [tokenizer.convert_tokens_to_ids(stop) for stop in stops]
    samples = list(prepare([path], tokenizer, DataSpec(**spec), on_incident=found.append, stop_ids=ids))
    return tokenizer, samples, found


@pytest.mark.parametrize("body", ["{{ m.content }}", THINKING])
def test_a_role_marker_that_is_a_stop_token_is_learnt(body: str, kit: Any, write: Write, targets: Targets) -> None:
    path = write([chat("q", "one", "q", "two"), chat("q", "one", "and")])
    tokenizer, samples, found = through(kit, path, GLM.replace("BODY", body), eos="</s>", stops=("<|user|>",))
    head = "\n<think></think>\n" if "think" in body else "\n"
    assert [targets(sample, tokenizer) for sample in samples] == [f"{head}one<|user|>{head}two", f"{head}one<|user|>"]
    assert [(each.line, each.kind) for each in found] == [(1, "no_stop_token")]
    assert found[0].detail.startswith("assistant turn 2 ends without a stop token (known: </s>, <|user|>)")


def test_a_role_marker_that_is_no_stop_token_is_not_learnt(kit: Any, write: Write, targets: Targets) -> None:
    path = write([chat("q", "one", "q", "two")])
    tokenizer, [sample], [found] = through(kit, path, GLM.replace("BODY", "{{ m.content }}"), eos="</s>")
    assert targets(sample, tokenizer) == "\none\ntwo"
    assert (found.kind, found.detail[:21]) == ("no_stop_token", "assistant turn 1, 2 e")


@pytest.mark.parametrize(("eos", "stops"), [(END, ()), ("</s>", (END,))])
def test_a_turn_that_ends_in_a_stop_token_is_whole(eos: str, stops: tuple[str, ...], kit: Any, write: Write) -> None:
    path = write([chat("q", "a"), chat("q", "a", "q", "b")])
    template = kit.template("chatml", marked=False)
    assert through(kit, path, template, eos=eos, stops=stops)[2] == []
    found = through(kit, path, template, eos="</s>")[2]
    assert [each.kind for each in found] == ["no_stop_token"] * 2


def test_marks_of_messages_are_obeyed(kit: Any, write: Write, targets: Targets) -> None:
    path = write([chat("q", "BAD", "q", "good", weight=0), chat("q", "BAD", train=False)])
    template = kit.template("chatml", marked=False)
    tokenizer, [sample], [found] = through(kit, path, template, eos=END)
    assert targets(sample, tokenizer) == f"good{END}"
    assert (found.line, found.kind) == (2, "no_supervised_token")
    _, [_], _ = through(kit, path, template, eos=END, supervise="last")
    _, samples, _ = through(kit, path, template, eos=END, supervise="all")
    assert "BAD" not in targets(samples[0], tokenizer)
    assert targets(samples[0], tokenizer).count("q") == 2


@pytest.mark.parametrize("supervise", ["assistant", "last", "all"])
def test_what_is_not_to_be_learnt_is_no_target_where_a_template_moves_it(
    supervise: str, kit: Any, write: Write, targets: Targets
) -> None:
    """Defect: Gemma 4 shows the words beside a call behind its result, in the turn that is learnt."""
    shown = "{{ messages[1].content if loop.last and loop.length > 3 }}{{ m.content if not m.tool_calls }}"
    template = kit.template("chatml", marked=False).replace("{{ m.content }}", shown)
    function = {"name": "f", "arguments": {}}
    record = chat("q", "Let me look.", weight=0, tool_calls=[{"id": "1", "type": "function", "function": function}])
    record["messages"] += [{"role": "tool", "tool_call_id": "1", "content": "r"}, {"role": "assistant", "content": "a"}]
    _, samples, found = through(kit, write([record, chat("q", "a")]), template, eos=END, supervise=supervise)
    assert [sample.line for sample in samples] == [2]
    assert found[-1].kind == "answer_changed"
    assert found[-1].detail == "message 2 (assistant) is not to be learnt, and the template shows it in what is"


@pytest.mark.parametrize("name", ["chatml", "llama3", "no_flag"])
@pytest.mark.parametrize("where", ["header", "in the header"])
def test_marks_that_include_the_header_are_trimmed(
    name: str, where: str, kit: Any, write: Write, targets: Targets
) -> None:
    """Defect: <|start|>assistant was learnt with templates whose marks include it."""
    plain = kit.template(name, marked=False)
    path = write([chat("q", "assistant", "q", "\nb")])
    tokenizer, [sample], _ = through(kit, path, plain, eos=END)
    expected = targets(sample, tokenizer)
    body = kit.template(name, marked=True)
    header = "<|im_start|>assistant" + ("\n\n" if name == "llama3" else "\n")
    cut = 0 if where == "header" else len("<|im_start|>assistant")
    start, rest = "<|im_start|>{{ m.role }}", header[len("<|im_start|>assistant") :]
    shown = f"{header[:cut]}{{% generation %}}{{{{ {header[cut:]!r} }}}}"
    body = body.replace(
        f"{start}{rest}{{% if m.role == 'assistant' %}}{{% generation %}}",
        f"{{% if m.role != 'assistant' %}}{start}{rest}{{% endif %}}{{% if m.role == 'assistant' %}}{shown}",
    )
    assert shown in body
    tokenizer, [sample], _ = through(kit, path, body, eos=END)
    assert targets(sample, tokenizer) == expected


def test_the_last_question_is_found_where_every_token_is_learnt(kit: Any, write: Write) -> None:
    """Defect: it was looked for behind the end of the text where the template ends in a newline."""
    path = write([chat("q", "one", "why", "two")])
    assert through(kit, path, kit.template("chatml", marked=False), eos=END, supervise="all")[2] == []


def test_a_completion_without_an_answer_teaches_nothing(kit: Any, write: Write) -> None:
    """Defect: its turns were counted from the end, and of none of them all were taken: the prompt's answer."""
    messages = chat("q", "of the prompt", "and?")["messages"]
    tokenizer = kit.train(eos=END)
    tokenizer.chat_template = kit.template("chatml", marked=False)
    tokenizing = Tokenizing(tokenizer, "completion")
    marked = tokenizing.mark(Chat(messages=messages, completion_from=2), "x:1")
    assert marked.targets == []
    assert not tokenizing.encode([marked])[0].supervised.any()


@pytest.mark.parametrize("said", [f"a{END}", f"a{END}\n", f"a {END}{END}", f"a{END} {END} "])
def test_an_answer_that_brings_its_stop_token_has_it_once(said: str, kit: Any, write: Write, targets: Targets) -> None:
    template = kit.template("chatml", marked=False)
    tokenizer, [sample, once], found = through(kit, write([chat("q", said), chat("q", "a")]), template, eos=END)
    assert targets(sample, tokenizer).replace(" ", "") == targets(once, tokenizer) == f"a{END}"
    assert found == []


def test_a_template_that_prints_a_token_twice_is_said(kit: Any, write: Write) -> None:
    template = kit.template("chatml", marked=False)
    path = write([chat("q", "a")])
    [found] = through(kit, path, "{{ bos_token }}{{ bos_token }}" + template, eos=END)[2]
    assert (found.kind, found.detail) == ("doubled_token", "the text begins with <s> twice")
    [found] = through(kit, path, template.replace(END, END + END), eos=END)[2]
    assert (found.kind, found.detail) == ("doubled_token", f"assistant turn 1 ends with {END} twice")


@pytest.mark.parametrize(("adds_bos", "adds_eos"), [(True, False), (True, True), (False, True), (False, False)])
@pytest.mark.parametrize(
    "record",
    [
        {"text": "<s>Hello</s>"},
        {"text": "<s><s>Hello</s>\n"},
        {"prompt": "<s>Hel", "completion": "lo</s>"},
        {"text": "<s>Hello"},
        {"text": "\n<s> <s>Hello"},
    ],
)
def test_running_text_has_its_ends_once(
    record: dict[str, str], adds_bos: bool, adds_eos: bool, kit: Any, write: Write, run: Run
) -> None:
    tokenizer = kit.train(adds_bos=adds_bos, adds_eos=adds_eos)
    [sample], found = run(write([record]), tokenizer)
    begin = record.get("text", "<s>").partition("Hello")[0] if not adds_bos else "<s>"  # what is not added was meant
    assert tokenizer.decode(sample.token_ids) == f"{begin}Hello</s>"
    assert sample.supervised[-1]
    assert found == []


@pytest.mark.parametrize("role", ["system", "user", "assistant"])
def test_a_special_token_in_what_is_said_is_told(role: str, kit: Any, write: Write) -> None:
    bad = f"do this{END} and that"
    said = {"user": "q", "assistant": "a"} | {role: bad}
    record = chat(said["user"], said["assistant"], system=said.get("system"))
    _, [_], [found] = through(kit, write([record]), kit.template("chatml", marked=False), eos=END)
    number = {"system": 1, "user": 1, "assistant": 2}[role]
    assert (found.kind, found.detail) == (
        "special_token_in_text",
        f"message {number} ({role}) has the special token {END}",
    )


@pytest.mark.parametrize(
    ("record", "where"),
    [
        ({"text": "<s>one</s>two</s>"}, "the text"),
        ({"prompt": "<s>one</s>", "completion": "two</s>"}, "the prompt"),
        ({"prompt": "<s>one", "completion": "<s>two</s>"}, "the completion"),
    ],
)
def test_a_special_token_in_running_text_is_told(
    record: dict[str, str], where: str, kit: Any, write: Write, run: Run
) -> None:
    [_], [found] = run(write([record]), kit.train())
    token = "<s>" if where == "the completion" else "</s>"
    assert (found.kind, found.detail) == ("special_token_in_text", f"{where} has the special token {token}")


@pytest.mark.parametrize("where", ["name", "value", "key", "tool"])
def test_a_special_token_in_a_call_or_a_tool_is_told(where: str, kit: Any, write: Write) -> None:
    bad = {"name": "f", "value": "v", "key": "k", "tool": "d"} | {where: f"x{END}"}
    function = {"name": bad["name"], "arguments": {bad["key"]: [bad["value"]]}}
    record = chat("q", "a", tool_calls=[{"id": "1", "type": "function", "function": function}])
    record["tools"] = [{"type": "function", "function": {"name": "f", "description": bad["tool"]}}]
    template = "{{ tools | tojson }}" + kit.template("chatml", marked=False).replace(
        "{{ m.content }}", "{{ m.content }}{{ m.tool_calls | tojson if m.tool_calls }}"
    )
    [found] = through(kit, write([record]), template, eos=END)[2]
    name = "a tool's definition" if where == "tool" else "message 2 (assistant)"
    assert (found.kind, found.detail) == ("special_token_in_text", f"{name} has the special token {END}")


@pytest.mark.parametrize("record", [{"text": "Hello world"}, {"prompt": "Hello", "completion": " world"}])
def test_a_tokenizer_without_an_end_of_text_teaches_no_stop_in_running_text(
    record: dict[str, str], kit: Any, write: Write, run: Run
) -> None:
    tokenizer = kit.train()
    tokenizer.eos_token = None
    [_], [found] = run(write([record]), tokenizer)
    assert found.kind == "no_stop_token"
    assert run(write([record]), kit.train()).incidents == []


def test_a_stop_token_behind_the_turns_own_marker_is_learnt(kit: Any, write: Write, targets: Targets) -> None:
    """Defect: supervision ended at Cohere's END_RESPONSE, so the end of turn behind it was never learnt."""
    path = write([chat("q", "one", "", "two")])
    template = kit.template("chatml", marked=False).replace(END, f"<|tool|>{END}")
    tokenizer, [sample], found = through(kit, path, template, eos=END)
    assert targets(sample, tokenizer) == f"one<|tool|>{END}two<|tool|>{END}"
    assert found == []
    # The next message's marker and its end are no part of the turn, empty as that message may be.
    template = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}"
    template += "{{ '<|tool|>' if m.role == 'assistant' else '<|im_end|>' }}{% endfor %}"
    template += "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    tokenizer, [sample], [found] = through(kit, path, template, eos=END)
    assert targets(sample, tokenizer) == "one<|tool|>two<|tool|>"
    assert found.kind == "no_stop_token"


@pytest.mark.parametrize("name", ["chatml", "llama2", "llama3", "phi"])
@pytest.mark.parametrize("system", [None, "be brief"])
@pytest.mark.parametrize("generation_prompt", [True, False])
def test_a_prompt_that_is_rendered_already_is_refused(
    name: str, system: str | None, generation_prompt: bool, kit: Any, write: Write, run: Run
) -> None:
    tokenizer = kit.train()
    tokenizer.chat_template = kit.template(name, marked=False)
    messages = chat("What is it?", "", system=system)["messages"][:-1]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation_prompt)
    for record in ({"prompt": text, "completion": "a"}, chat(text, "a")):
        with pytest.raises(DataError, match=r"jsonl:1: message 1 \(user\) is a text that went through a chat template"):
            run(write([record]), tokenizer)
    assert len(run(write([chat("Explain INST and im_start", "a")]), tokenizer).samples) == 1


@pytest.mark.parametrize(("name", "before"), [("llama2", ""), ("llama2", "Be brief.\n"), ("chatml", "Be brief. ")])
def test_any_message_that_is_rendered_already_is_refused(
    name: str, before: str, kit: Any, write: Write, run: Run
) -> None:
    """Defect: only the first message was looked at, and only its beginning."""
    tokenizer = kit.train()
    tokenizer.chat_template = kit.template(name, marked=False)
    [user, answer] = chat("Hi", "x")["messages"]
    text = before + tokenizer.apply_chat_template([user], tokenize=False, add_generation_prompt=True).removeprefix(
        "<s>"
    )
    with pytest.raises(DataError, match=r"jsonl:1: message 2 \(user\) is a text that went through a chat template"):
        run(write([{"system": "S", "prompt": text, "completion": "x"}]), tokenizer)
    with pytest.raises(DataError, match=r"jsonl:1: message 3 \(user\) is a text that went through a chat template"):
        run(write([{"messages": [user, answer, {**user, "content": text}, answer]}]), tokenizer)


VICUNA = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ m.content }} {% elif m.role == 'user' %}"
    "USER: {{ m.content }} {% else %}ASSISTANT: {{ m.content }}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
PREAMBLE = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


@pytest.mark.parametrize("own", [True, False], ids=["its own template", "another one"])
def test_vicunas_prompt_is_rendered_already_whoever_reads_it(own: bool, kit: Any, write: Write, run: Run) -> None:
    """Defect: behind a preamble on the same line neither USER: nor the preamble was known."""
    tokenizer = kit.train()
    tokenizer.chat_template = VICUNA if own else kit.template("chatml", marked=False)
    once, human = f"{PREAMBLE} USER: Hi ASSISTANT:", PREAMBLE.replace("curious user", "curious human")
    rendered = [once, f"{once} Hello</s>USER: Bye ASSISTANT:", f"{human}\n### Human: Hi\n### Assistant:"]
    for text in rendered + ["You are a pirate. USER: Hi ASSISTANT:"] * own:
        with pytest.raises(DataError, match=r"message 1 \(user\) is a text that went through a chat template already"):
            run(write([{"prompt": text, "completion": "x"}]), tokenizer)
    [_], found = run(write([{"text": f"{once} Hello</s>"}]), tokenizer)
    assert "rendered_already" in [each.kind for each in found]
    asked = "Is it polite? USER: Hi ASSISTANT: Hello. I doubt it."
    assert len(run(write([chat(asked, "a", system=PREAMBLE)]), tokenizer).samples) == 1


def test_a_text_that_is_rendered_already_is_tokenised_as_it_is(kit: Any, write: Write, run: Run) -> None:
    tokenizer = kit.train(eos=END)
    tokenizer.chat_template = kit.template("chatml", marked=False)
    messages = chat("q", "a")["messages"]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    [sample, _], found = run(write([{"text": text}, {"text": "plain"}]), tokenizer)
    assert tokenizer.decode(sample.token_ids) == text.rstrip()
    assert [(each.line, each.kind) for each in found] == [(1, "rendered_already")]


def test_whatever_a_template_raises_is_one_line_with_the_place(kit: Any, write: Write, run: Run) -> None:
    tokenizer = kit.train(eos=END)
    for fault in (
        "{{ 1 // (messages | length - 3) }}",
        "{{ messages[2:][0].content.nothing.more }}",
        "{{ messages[5 - messages | length].x.y }}",
    ):
        tokenizer.chat_template = fault + kit.template("chatml", marked=False)
        with pytest.raises(DataError, match=r"the chat template refuses this conversation \(roles "):
            run(write([chat("q", "a", "q")]), tokenizer)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }"
    with pytest.raises(DataError, match="the chat template refuses"):
        run(write([chat("q", "a")]), tokenizer)
