"""Masks are exactly the assistant's text and its end token, with generation marks and without."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kdpipe.manifests.errors import ConfigError, DataError
from kdpipe.manifests.sample import Incident, Sample, SampleTokens, prompt_of
from kdpipe.manifests.specs import DataSpec
from kdpipe.stages.prepare import prepare
from kdpipe.stages.prepare.forms import Chat
from kdpipe.stages.prepare.template import ChatTemplate
from kdpipe.stages.prepare.tokens import Tokenizing

Run = Callable[..., Any]
Write = Callable[..., Path]
Targets = Callable[..., str]
END = "<|im_end|>"


def turns(*texts: str, system: str | None = None) -> dict[str, Any]:
    """A conversation of these turns, the user's first."""
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    return {"messages": [{"role": "system", "content": system}] * (system is not None) + messages}


MULTI = turns("What is 1 + 1?", "It is 2.", "And 🙂 你好?", "assistant 世界 🙃", system="You are helpful.")
EXPECTED = {
    "chatml": ["It is 2.<|im_end|>", "assistant 世界 🙃<|im_end|>"],
    "llama2": [" It is 2. </s>", " assistant 世界 🙃 </s>"],
    "llama3": ["It is 2.<|im_end|>", "assistant 世界 🙃<|im_end|>"],
    "phi": ["It is 2.<|im_end|>", "assistant 世界 🙃<|im_end|>"],
    "no_flag": ["It is 2.<|im_end|>", "assistant 世界 🙃<|im_end|>"],
}


@pytest.mark.parametrize("marked", [False, True])
@pytest.mark.parametrize("name", EXPECTED)
def test_the_mask_decodes_to_the_assistant_text_and_its_end(
    name: str, marked: bool, kit: Any, write: Write, run: Run, targets: Targets
) -> None:
    tokenizer = kit.train()
    tokenizer.chat_template = kit.template(name, marked=marked)
    path = write([MULTI])
    whole = tokenizer.apply_chat_template(MULTI["messages"], return_dict=False)
    for supervise, expected in (("assistant", EXPECTED[name]), ("last", EXPECTED[name][1:])):
        [sample] = run(path, tokenizer, supervise=supervise).samples
        assert sample.token_ids.tolist() == whole
        assert targets(sample, tokenizer) == "".join(expected)
    [sample] = run(path, tokenizer, supervise="all").samples
    assert sample.supervised.tolist() == [False] + [True] * (len(whole) - 1)
    assert (sample.token_ids.dtype, sample.supervised.dtype) == (np.int32, np.bool_)


def test_completion_supervises_the_answer_and_not_the_history(
    chatml: Any, write: Write, run: Run, targets: Targets
) -> None:
    history = turns("q", "earlier answer", "again")["messages"]
    answers = [
        {"role": "assistant", "content": "let me look"},
        {"role": "tool", "content": "found it"},
        {"role": "assistant", "content": "done"},
    ]
    path = write([{"prompt": history, "completion": answers}, {"prompt": history, "completion": "done"}])
    found = {
        supervise: [targets(sample, chatml) for sample in run(path, chatml, supervise=supervise).samples]
        for supervise in ("completion", "last", "assistant")
    }
    assert found == {
        "completion": [f"let me look{END}done{END}", f"done{END}"],
        "last": [f"done{END}", f"done{END}"],
        "assistant": [f"earlier answer{END}let me look{END}done{END}", f"earlier answer{END}done{END}"],
    }


def test_pairs_are_one_exchange_where_there_is_a_template(
    chatml: Any, write: Write, run: Run, targets: Targets
) -> None:
    path = write(
        [{"prompt": "hi", "completion": "hello"}, turns("hi", "hello"), {"instruction": "hi", "output": "hello"}]
    )
    samples = run(path, chatml, supervise="completion").samples
    assert len({sample.token_ids.tobytes() for sample in samples}) == 1
    assert len({sample.content_id for sample in samples}) == 1
    assert {targets(sample, chatml) for sample in samples} == {f"hello{END}"}


def test_pairs_are_joined_as_text_where_there_is_none(base: Any, write: Write, run: Run, targets: Targets) -> None:
    given = {"prompt": "add", "input": "1 + 1", "completion": "2"}
    path = write([{"prompt": "The capital", "completion": " is Paris"}, {"instruction": "add", "output": "2"}, given])
    pair, alpaca, with_input = run(path, base).samples
    assert base.decode(with_input.token_ids) == "add\n\n1 + 1\n\n2</s>"
    assert targets(with_input, base) == "2</s>"
    assert base.decode(pair.token_ids) == "The capital is Paris</s>"
    assert targets(pair, base) == " is Paris</s>"
    assert base.decode(alpaca.token_ids) == "add\n\n2</s>"
    assert targets(alpaca, base) == "2</s>"
    assert run(path, base, supervise="all").samples[0].supervised.tolist() == [False] + [True] * (
        len(pair.token_ids) - 1
    )


def test_text_supervises_all_but_the_first_token(base: Any, write: Write, run: Run) -> None:
    [sample] = run(write([{"text": "Hello world 🙂"}]), base).samples
    assert base.decode(sample.token_ids) == "Hello world 🙂</s>"
    assert sample.supervised.tolist() == [False] + [True] * (len(sample.token_ids) - 1)


@pytest.mark.parametrize(("adds_bos", "adds_eos"), [(True, False), (True, True), (False, True)])
def test_special_tokens_are_neither_doubled_nor_missing(
    adds_bos: bool, adds_eos: bool, kit: Any, write: Write, run: Run, targets: Targets
) -> None:
    tokenizer = kit.train(adds_bos=adds_bos, adds_eos=adds_eos)
    path = write([{"text": "Hello"}, {"text": "Hello</s>"}, {"prompt": "Hello", "completion": " world"}])
    text, ended, pair = run(path, tokenizer).samples
    bos = "<s>" * adds_bos
    assert tokenizer.decode(text.token_ids) == f"{bos}Hello</s>"
    assert tokenizer.decode(ended.token_ids) == f"{bos}Hello</s>"
    assert targets(text, tokenizer).endswith("</s>")
    assert tokenizer.decode(pair.token_ids) == f"{bos}Hello world</s>"
    assert targets(pair, tokenizer) == " world</s>"
    tokenizer.chat_template = kit.template("llama3", marked=False)
    [chat] = run(write([turns("hi", "hello")]), tokenizer).samples
    assert tokenizer.decode(chat.token_ids).count("<s>") == 1
    assert "</s>" not in tokenizer.decode(chat.token_ids)


@pytest.mark.parametrize("trim_offsets", [False, True])
def test_a_token_across_the_border_goes_where_its_first_letter_is(
    trim_offsets: bool, kit: Any, write: Write, run: Run, targets: Targets
) -> None:
    """ "is " + "Paris" has the token " Paris" across the border; "Par" + "is" has "Paris" begin before it."""
    tokenizer = kit.train(trim_offsets=trim_offsets)
    assert tokenizer.tokenize("is Paris")[-1] == "ĠParis"
    pairs = [("capital is ", "Paris"), ("capital is", " Paris"), ("capital is Par", "is"), ("capital", "    ok  ")]
    path = write([{"prompt": prompt, "completion": completion} for prompt, completion in pairs])
    found = [targets(sample, tokenizer) for sample in run(path, tokenizer).samples]
    assert found == [" Paris</s>", " Paris</s>", "</s>", "    ok  </s>"]


def test_blanks_before_the_border_stay_out_with_trimmed_offsets(
    kit: Any, write: Write, run: Run, targets: Targets
) -> None:
    found = []
    for trim_offsets in (False, True):
        tokenizer = kit.train(trim_offsets=trim_offsets)
        path = write([{"prompt": "capital   ", "completion": "\nok"}, {"prompt": "capital", "completion": "   \n"}])
        found.append([targets(sample, tokenizer) for sample in run(path, tokenizer, supervise="last").samples])
    assert found[0] == found[1] == ["\nok</s>"]


def test_a_token_of_blanks_across_the_border_goes_where_it_begins(
    base: Any, write: Write, run: Run, targets: Targets
) -> None:
    assert base.tokenize("one\n\n\ntwo")[-3:-1] == ["ĊĊ", "Ċ"]
    [sample] = run(write([{"prompt": "one\n", "completion": "\n\ntwo"}]), base).samples
    assert targets(sample, base) == "\ntwo</s>"


def test_a_merge_without_pre_tokenizer_rules_cannot_shift_the_mask(
    kit: Any, write: Write, run: Run, targets: Targets
) -> None:
    tokenizer = kit.train(use_regex=False)
    tokenizer.chat_template = kit.template("chatml", marked=False)
    [sample] = run(write([turns("Hello", "Hello world")]), tokenizer).samples
    assert targets(sample, tokenizer).lstrip() == f"Hello world{END}"


# Letters, blanks, several bytes a character, and texts that look like the template's own.
pieces = st.sampled_from(
    [
        "a",
        "Paris",
        "assistant",
        "user",
        " ",
        "\n",
        "\n\n",
        "🙂",
        "你好",
        "é",
        "<|im_end",
        "|>",
        ".",
        "[INST]",
        "{{ x }}",
        "</s",
    ]
)
texts = st.lists(pieces, min_size=1, max_size=6).map("".join)
answers = texts.filter(lambda text: bool(text.strip()))
exchanges = st.lists(st.tuples(texts, answers), min_size=1, max_size=4)


@pytest.mark.parametrize("name", EXPECTED)
def test_masks_with_and_without_generation_marks_agree(name: str, kit: Any) -> None:
    tokenizer = kit.train(trim_offsets=True)
    both = []
    for marked in (False, True):
        tokenizer.chat_template = kit.template(name, marked=marked)
        both.append(Tokenizing(tokenizer, "assistant"))

    @settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
    @given(exchanges, st.booleans())
    def agree(said: list[tuple[str, str]], trailing: bool) -> None:
        texts = [text for exchange in said for text in exchange] + ["and?"] * trailing
        chat = Chat(messages=turns(*texts)["messages"])
        plain, marked = (tokenizing.encode([tokenizing.mark(chat, "x:1")])[0] for tokenizing in both)
        assert plain.token_ids.tolist() == marked.token_ids.tolist()
        assert plain.supervised.tolist() == marked.supervised.tolist()
        learnt = tokenizer.decode(plain.token_ids[plain.supervised].tolist())
        for _, answer in said:
            assert answer.strip() in learnt

    agree()


@pytest.mark.parametrize(
    "marked",
    [
        "{{ say(m) }}",  # some versions of transformers give marks in a macro wrong positions
        "{% generation %}<|im_start|>assistant\n{% endgeneration %}{{ m.content }}<|im_end|>",
        "<|im_start|>assistant\n{{ m.content[:1] }}{% generation %}{{ m.content[1:] }}<|im_end|>{% endgeneration %}",
        "<|im_start|>assistant\n{% generation %}{{ m.content[:-1] }}{% endgeneration %}{{ m.content[-1:] }}<|im_end|>",
    ],
    ids=["in a macro", "around the header", "without the first letter", "without the last letter"],
)
def test_marks_that_do_not_hold_the_answer_are_not_trusted(
    marked: str, kit: Any, write: Write, run: Run, targets: Targets
) -> None:
    """The spans come from renderings instead."""
    tokenizer = kit.train()
    tokenizer.chat_template = (
        "{% macro say(m) %}<|im_start|>assistant\n{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}"
        f"{{% endmacro %}}{{% for m in messages %}}{{% if m.role == 'assistant' %}}{marked}"
        "{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    [sample] = run(write([turns("q", "first", "q", "second")]), tokenizer).samples
    assert targets(sample, tokenizer) == f"first{END}second{END}"


def test_a_turn_ends_with_the_whole_of_a_token_whose_beginning_is_a_token_too(
    kit: Any, write: Write, targets: Targets
) -> None:
    tokenizer = kit.train(special=("<s>", "</s>", "<|im_start|>", "<|end", "<|end_of_turn|>"), eos="<|end_of_turn|>")
    tokenizer.chat_template = kit.template("chatml", marked=False).replace(END, "<|end_of_turn|>")
    found: list[Any] = []
    path = write([turns("q", "first", "q", "second")])
    [sample] = prepare([path], tokenizer, DataSpec(), on_incident=found.append)
    assert targets(sample, tokenizer) == "first<|end_of_turn|>second<|end_of_turn|>"
    assert found == []


# As Qwen3: thoughts of earlier turns are dropped, the last turn gets a block of thoughts even when it has none.
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% set text = m.content.split('</think>')[-1].lstrip('\n') %}"
    "{% set thought = m.content.split('</think>')[0] if '</think>' in m.content else '' %}"
    "{% set thought = thought.replace('<think>', '').strip() %}"
    "{% if loop.last %}<think>\n{{ thought }}\n</think>\n\n{% endif %}{{ text }}"
    "{% else %}{{ m.content }}{% endif %}<|im_end|>{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\nOPENED{% endif %}"
)


@pytest.mark.parametrize(("opened", "last"), [("", "<think>\nhm\n</think>\n\n"), ("<think>\n", "hm\n</think>\n\n")])
def test_a_template_that_drops_thoughts_still_has_its_turns_found(
    opened: str, last: str, kit: Any, write: Write, run: Run, targets: Targets
) -> None:
    tokenizer = kit.train()
    tokenizer.chat_template = THINKING.replace("OPENED", opened)
    chat = turns("q", "<think>\nlong\n</think>\n\n<b>first", "q", "<think>\nhm\n</think>\n\nsecond")
    [sample] = run(write([chat]), tokenizer).samples
    assert targets(sample, tokenizer) == f"<b>first{END}{last}second{END}"


def test_a_template_that_rewrites_the_history_still_has_its_turns_found(
    kit: Any, write: Write, run: Run, targets: Targets
) -> None:
    tokenizer = kit.train()
    numbered = "{{ messages | length }}: " + kit.template("chatml", marked=False)
    tokenizer.chat_template = numbered
    [sample] = run(write([turns("q", "first", "q", "second")]), tokenizer).samples
    assert targets(sample, tokenizer) == f"first{END}second{END}"


# As Mistral's: no prompt flag, and the system prompt goes to the last question, so no beginning is a prefix.
MOVED_SYSTEM = (
    "{% set said = messages[0].content ~ '\n\n' if messages[0].role == 'system' else '' %}"
    "{% set turns = messages[1:] if said else messages %}"
    "{% set asked = turns | selectattr('role', 'eq', 'user') | list %}"
    "{{ bos_token }}{% for m in turns %}{% if m.role == 'user' %}"
    "[INST] {{ said if m is sameas asked[-1] else '' }}{{ m.content }}[/INST]"
    "{% else %} {{ m.content | trim }}{{ eos_token }}{% endif %}{% endfor %}"
)


def test_a_template_that_moves_the_system_prompt_still_has_its_turns_found(
    kit: Any, write: Write, run: Run, targets: Targets
) -> None:
    tokenizer = kit.train()
    tokenizer.chat_template = MOVED_SYSTEM
    [sample] = run(
        write([turns("q", " first ", "q", "[/INST] second", "q", "third", system="be brief")]), tokenizer
    ).samples
    assert tokenizer.decode(sample.token_ids).startswith("<s>[INST] q[/INST] first</s>")
    assert targets(sample, tokenizer) == " first</s> [/INST] second</s> third</s>"
    tokenizer.chat_template = MOVED_SYSTEM.replace("m.content | trim", "m.content | replace('t', 'T')")
    with pytest.raises(DataError, match=r"none of the 1 records read can be used: 1 answer_changed"):
        run(write([turns("q", "first", "q", "second", system="be brief")]), tokenizer)


def test_a_template_that_needs_a_system_prompt_works_where_there_is_one(
    kit: Any, write: Write, run: Run, targets: Targets
) -> None:
    tokenizer = kit.train()
    need = "{% if messages[0].role != 'system' %}{{ raise_exception('system first') }}{% endif %}"
    tokenizer.chat_template = need + kit.template("chatml", marked=False)
    [sample] = run(write([turns("q", "a", system="s")]), tokenizer).samples
    assert targets(sample, tokenizer) == f"a{END}"
    with pytest.raises(DataError, match=r"jsonl:1: .*system first"):
        run(write([turns("q", "a")]), tokenizer)


def test_a_turn_without_an_end_marker_ends_with_its_text(kit: Any, write: Write, run: Run, targets: Targets) -> None:
    tokenizer = kit.train()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% else %}{{ eos_token }}{% endif %}"
    )
    path = write([turns("q", "first", "and"), turns("q", "first", "q", "second")])
    found = [targets(sample, tokenizer) for sample in run(path, tokenizer).samples]
    assert found == [" first", " first second\n</s>"]


def test_a_template_that_leaves_out_the_answer_is_refused(kit: Any, write: Write, run: Run) -> None:
    tokenizer = kit.train()
    tokenizer.chat_template = "{{ messages[0].content }}"
    with pytest.raises(DataError, match="the chat template leaves out the assistant's answer"):
        run(write([turns("q", "first")]), tokenizer)


def test_a_call_of_a_tool_is_supervised(kit: Any, write: Write, run: Run, targets: Targets) -> None:
    tokenizer = kit.train()
    call = "{% if m.tool_calls %}<call>{{ m.tool_calls[0].name }}</call>{% endif %}<|im_end|>"
    tokenizer.chat_template = kit.template("chatml", marked=False).replace(END, call)
    messages = turns("q", "", "q", "done")["messages"]
    messages[1]["tool_calls"] = [{"name": "add"}]
    messages[2]["role"] = "tool"
    [sample] = run(write([{"messages": messages}]), tokenizer).samples
    assert targets(sample, tokenizer) == f"<call>add</call>{END}done{END}"


def test_a_template_that_prints_the_date_gives_the_same_tokens_every_day(kit: Any) -> None:
    tokenizer = kit.train()
    tokenizer.chat_template = "Today is {{ strftime_now('%d %b %Y') }}. " + kit.template("chatml", marked=False)
    chat = Chat(messages=turns("q", "a")["messages"])
    assert ChatTemplate(tokenizer).render(chat.messages, None, "x:1").text.startswith("Today is 26 Jul 2024. ")


def test_a_template_that_refuses_a_conversation_is_an_error_with_its_place(kit: Any, write: Write, run: Run) -> None:
    tokenizer = kit.train()
    refusal = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    tokenizer.chat_template = refusal + kit.template("chatml", marked=False)
    path = write([turns("q", "a"), turns("secret", "a", system="secret")])
    message = (
        r"data\.jsonl:2: the chat template refuses this conversation \(roles system, user, assistant\): no system role;"
    )
    with pytest.raises(DataError, match=message):
        run(path, tokenizer)


def test_chat_data_without_a_template_is_refused(base: Any, write: Write, run: Run) -> None:
    with pytest.raises(DataError, match=r"data\.jsonl:1: a conversation, but the tokenizer has no chat template; put"):
        run(write([turns("q", "a")]), base)


def test_a_slow_tokenizer_is_refused(base: Any, write: Write) -> None:
    class Slow:
        is_fast = False
        name_or_path = "slow"

    with pytest.raises(ConfigError, match=r"slow: this tokenizer has no fast \(Rust\) backend"):
        prepare([write([{"text": "a"}])], Slow(), DataSpec(), on_incident=print)


def prompts(paths: list[Path], tokenizer: Any, **spec: Any) -> tuple[list[Sample], list[Incident]]:
    incidents: list[Incident] = []
    found = prepare(paths, tokenizer, DataSpec(**spec), on_incident=incidents.append, prompts=True)
    return list(found), incidents


def before_answer(sample: Sample) -> np.ndarray:
    return prompt_of(SampleTokens(sample.token_ids, sample.supervised))


@pytest.mark.parametrize("marked", [True, False])
def test_a_prompt_has_the_text_before_its_answer(marked: bool, kit: Any, write: Write, run: Run) -> None:
    for name in kit.names:
        tokenizer = kit.train()
        tokenizer.chat_template = kit.template(name, marked=marked)
        whole = turns("Hello there", "Hi", "What is it?", "Paris.", system=None)
        asked = {"messages": whole["messages"][:-1]}
        [sample] = run(write([whole]), tokenizer).samples
        [prompt], _ = prompts([write([asked], "asked.jsonl")], tokenizer)
        # A tokenizer may take blanks at an end together: "\n\n" of "assistant\n\n", and "\n", "\n" before an answer.
        assert tokenizer.decode(prompt.token_ids) == tokenizer.decode(before_answer(sample))
        assert not prompt.supervised.any()


@pytest.mark.parametrize("special", [{}, {"adds_bos": True}, {"adds_bos": True, "adds_eos": True}])
def test_a_prompt_without_a_template_is_its_text_and_what_begins_one(
    special: dict[str, bool], kit: Any, write: Write, run: Run
) -> None:
    tokenizer = kit.train(**special)
    records = [{"prompt": "What is it?"}, {"instruction": "Say", "input": "it"}, {"prompt": "<s>Hello"}]
    found, _ = prompts([write(records)], tokenizer)
    begin = [tokenizer.bos_token_id] if special else []
    texts = ["What is it?", "Say\n\nit\n\n", "Hello" if special else "<s>Hello"]
    assert [each.token_ids.tolist() for each in found] == [
        [*begin, *tokenizer(text, add_special_tokens=False)["input_ids"]] for text in texts
    ]
    answered = [{**record, "output": "Paris"} for record in records]
    whole = run(write(answered, "whole.jsonl"), tokenizer).samples
    for prompt, sample in zip(found, whole, strict=True):
        assert tokenizer.decode(prompt.token_ids) == tokenizer.decode(before_answer(sample))


def test_a_prompt_is_never_cut(chatml: Any, kit: Any, write: Write) -> None:
    path = write([{"prompt": "word " * 30}, {"prompt": "word"}, {"prompt": "a", "completion": "word " * 30}])
    for overlong, kept in (("truncate", 2), ("drop", 1)):
        found, incidents = prompts([path], chatml, max_length=20, overlong=overlong)
        assert len(found) == kept
        assert incidents[0].kind == "dropped_overlong"
        assert "a prompt of " in incidents[0].detail
    with pytest.raises(DataError, match="none of the 1 records read can be used: 1 empty_text"):
        prompts([write([{"prompt": "<s>"}])], kit.train(adds_bos=True))


@pytest.mark.parametrize("supervise", ["assistant", "last", "completion", "all"])
def test_nothing_of_a_prompt_is_a_target_whatever_is_supervised(supervise: str, chatml: Any, write: Write) -> None:
    record = {"messages": [*turns("Hello", "Hi")["messages"], {"role": "user", "content": "And?"}]}
    [sample], _ = prompts([write([record])], chatml, supervise=supervise)
    assert not sample.supervised.any()


def test_what_is_wrong_with_a_prompt_is_said(chatml: Any, write: Write) -> None:
    records = [{"prompt": "a <|im_end|> b"}, {"prompt": "a"}]
    with pytest.raises(DataError, match="special token in text, and --strict is given"):
        prompts([write(records)], chatml, strict=True)
    rendered = {"prompt": "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"}
    with pytest.raises(DataError, match="went through a chat template already"):
        prompts([write([rendered])], chatml)
