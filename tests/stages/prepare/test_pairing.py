"""Pairing: turns under two templates, what either leaves out, and what --max-length cuts off on one side."""

import json
from functools import cache
from typing import Any

import numpy as np
import pytest
from tests import tokenizers
from tests.models import CHAT_TEMPLATE

from kdpipe.manifests.specs import DataSpec
from kdpipe.stages.models.vocabularies import token_bytes
from kdpipe.stages.prepare.pairing import Pairing, Party, sample_digest
from kdpipe.stages.prepare.sources import RawRecord
from kdpipe.stages.prepare.work import Outcome

THINKING = (
    "{% for message in messages %}[{{ message['role'] }}]\n"
    "{% if message['reasoning_content'] %}<think>{{ message['reasoning_content'] }}</think>\n{% endif %}"
    "{{ message['content'] | trim }}<|stop|>\n{% endfor %}{% if add_generation_prompt %}[assistant]\n{% endif %}"
)
QUESTION = {"role": "user", "content": "What is a row?"}
ANSWER = {"role": "assistant", "content": "The last hidden state after the final norm 🙂, naïve 2023."}


@cache
def side(name: str) -> Any:
    """A tokenizer with a chat template."""
    template = {"byte-level": CHAT_TEMPLATE, "thinking": THINKING}.get(name, tokenizers.CHAT)
    made = {"byte-level": tokenizers.byte_level, "words": tokenizers.wordpiece}
    tokenizer = made.get(name, lambda: tokenizers.unigram(800))()
    ends = ["<|im_start|>", "<|im_end|>"] if name == "byte-level" else ["<|turn|>", "<|stop|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": ends})
    tokenizer.eos_token, tokenizer.chat_template = ends[1], template
    return tokenizer


def party(name: str, **spec: Any) -> Party:
    tokenizer = side(name)
    return Party(tokenizer=tokenizer, spec=DataSpec(**spec), stop_ids=(), table=token_bytes(tokenizer))


def pair(record: dict[str, Any], student: Party, teacher: Party) -> tuple[Outcome, Outcome]:
    """What becomes of the record, aligned, and what the teacher makes of it alone."""
    raw = RawRecord(fields=record, source="x", line=1, place="x:1")
    (outcome,) = Pairing(student, teacher)([raw]).outcomes
    (other,) = teacher.preparing()([raw]).outcomes
    return outcome, other


def texts(party: Party, sample: Any, first: int, count: int) -> str:
    """The text of a run of rows; special tokens by their names."""
    targets = np.flatnonzero(sample.supervised)[first : first + count]
    names = party.tokenizer.convert_ids_to_tokens(sample.token_ids[targets].tolist())
    pieces = [party.table[index] for index in sample.token_ids[targets].tolist()]
    return b"".join(
        name.encode() if piece is None else piece for name, piece in zip(names, pieces, strict=True)
    ).decode("utf-8", "replace")


def aligned(record: dict[str, Any], student: Party, teacher: Party) -> list[tuple[str, str]]:
    """The texts of all spans on both sides."""
    outcome, other = pair(record, student, teacher)
    assert outcome.alignment is not None
    assert other.sample is not None
    ours, theirs = outcome.sample, other.sample
    assert outcome.alignment.digest == sample_digest(theirs.content_id, theirs.token_ids, theirs.supervised)
    runs = outcome.alignment.spans
    assert (runs[1:, 0] >= runs[:-1, 0] + runs[:-1, 1]).all()
    assert (runs[1:, 2] >= runs[:-1, 2] + runs[:-1, 3]).all()
    return [(texts(student, ours, a, b), texts(teacher, theirs, c, d)) for a, b, c, d in runs.tolist()]


def joined(spans: list[tuple[str, str]]) -> tuple[str, str]:
    return "".join(one for one, _ in spans), "".join(other for _, other in spans)


@pytest.mark.parametrize("words", ["use <|turn|> and <|turn|> here", "Zażółć 🙂🙂 gęślą ÀÉÎ ", "plain words alone"])
@pytest.mark.parametrize("names", [("byte-level", "unigram"), ("unigram", "byte-level"), ("words", "byte-level")])
def test_no_more_bytes_are_aligned_than_there_are(words: str, names: tuple[str, str]) -> None:
    record = {"messages": [QUESTION, {"role": "assistant", "content": words}]}
    student = party(names[0])
    outcome, _ = pair(record, student, party(names[1]))
    assert outcome.alignment is not None
    special = words.count("<|turn|>") * len("<|turn|>") if names[0] != "byte-level" else 0
    blank = outcome.alignment.num_bytes - len(words.strip().encode()) + special
    assert blank in (0, 1), "one before the end of the turn may be a target"
    assert 0 <= outcome.alignment.aligned_bytes <= outcome.alignment.num_bytes
    assert outcome.alignment.aligned_bytes > 0


@pytest.mark.parametrize("names", [("byte-level", "unigram"), ("unigram", "byte-level"), ("thinking", "byte-level")])
def test_turns_are_aligned_whole_with_what_ends_them(names: tuple[str, str]) -> None:
    student, teacher = party(names[0]), party(names[1])
    messages = [QUESTION, ANSWER, QUESTION, {"role": "assistant", "content": "  Rows, then.\n\nNothing else "}]
    spans = aligned({"messages": messages}, student, teacher)
    ends = {"byte-level": "<|im_end|>", "unigram": "<|stop|>", "thinking": "<|stop|>"}
    answers = [message["content"].strip() for message in (messages[1], messages[3])]
    for name, text in zip(names, joined(spans), strict=True):
        first, second, rest = text.split(ends[name])
        assert (first.strip(), second.strip(), rest) == (*answers, "")
    assert [pair for pair in spans if "<|" in pair[0]] == [(ends[names[0]], ends[names[1]])] * 2
    assert all(len(one.strip()) == len(other.strip()) or "<|" in one or "\ufffd" in one for one, other in spans)


def test_a_thought_that_one_template_leaves_out_stands_alone() -> None:
    record = {"messages": [QUESTION, {**ANSWER, "reasoning_content": "A row, a state."}]}
    with_thought, without = party("thinking"), party("byte-level")
    spans = aligned(record, with_thought, without)
    assert joined(spans)[0].replace(" ", "") == (ANSWER["content"] + "<|stop|>").replace(" ", "")
    outcome, _ = pair(record, with_thought, without)
    assert outcome.alignment is not None
    said = len(b"<think>A row, a state.</think>\n")
    assert outcome.alignment.num_bytes - outcome.alignment.aligned_bytes == said


@pytest.mark.parametrize(
    "record",
    [
        {"text": "Rows of text 🙂, one behind the other; 2023."},
        {"prompt": "What is it?", "completion": " A row."},
        {"instruction": "Say row.", "output": "row\nrow"},
    ],
)
@pytest.mark.parametrize("supervise", ["assistant", "all"])
def test_every_form_is_aligned(record: dict[str, str], supervise: str) -> None:
    student, teacher = party("unigram", supervise=supervise), party("byte-level", supervise=supervise)
    answer = list(record.values())[-1]
    for text, end in zip(joined(aligned(record, student, teacher)), ("<|stop|>", "<|im_end|>"), strict=True):
        assert text.endswith(end)
        assert answer.strip()[1:] in text  # the first token of a text is no target
    plain = [Party(tokenizer=bare(one), spec=one.spec, stop_ids=(), table=one.table) for one in (student, teacher)]
    for text in joined(aligned(record, *plain)):
        assert answer.strip()[1:] in text


def bare(one: Party) -> Any:
    """Its tokenizer without a chat template: pairs become running text."""
    import copy

    tokenizer = copy.deepcopy(one.tokenizer)
    tokenizer.chat_template = None
    return tokenizer


def test_what_one_side_cut_off_is_in_no_span() -> None:
    long = {"messages": [QUESTION, {"role": "assistant", "content": "one two three four five six seven " * 9}]}
    whole = aligned(long, party("unigram"), party("byte-level"))
    for ours, theirs in ((40, 4096), (4096, 40), (40, 30)):
        some = aligned(long, party("unigram", max_length=ours), party("byte-level", max_length=theirs))
        assert 0 < len(some) < len(whole)
        assert some == whole[: len(some)]
        assert "<|stop|>" not in joined(some)[0]


def test_a_record_that_one_side_drops_has_no_alignment() -> None:
    record = {"messages": [QUESTION, ANSWER]}
    outcome, other = pair(record, party("unigram"), party("byte-level", max_length=8, overlong="drop"))
    assert (outcome.sample is not None, outcome.alignment, other.sample) == (True, None, None)
    outcome, _ = pair(record, party("unigram", max_length=8, overlong="drop"), party("byte-level"))
    assert (outcome.sample, outcome.alignment) == (None, None)


def test_words_that_a_template_writes_otherwise_are_left_out() -> None:
    shouting = party("unigram")
    shouting.tokenizer.chat_template = tokenizers.CHAT.replace(
        "message['content'] }}<", "message['content'] | upper }}<"
    )
    try:
        record = {"messages": [QUESTION, {"role": "assistant", "content": "A quiet row"}]}
        outcome, _ = pair(record, shouting, party("byte-level"))
        spans = outcome.alignment.spans.tolist() if outcome.alignment else None
        assert outcome.sample is None or len(spans or ()) == 1
    finally:
        shouting.tokenizer.chat_template = tokenizers.CHAT


def test_an_outcome_keeps_its_alignment_on_the_way_between_processes() -> None:
    import pickle

    pairing = Pairing(party("unigram"), party("byte-level"))
    records = [
        RawRecord(fields={"messages": [QUESTION, ANSWER]}, source="x", line=number, place=f"x:{number}")
        for number in (1, 2)
    ]
    worked = pairing(records)
    again = pickle.loads(pickle.dumps(worked))
    for one, other in zip(worked.outcomes, again.outcomes, strict=True):
        assert one.alignment is not None
        assert other.alignment is not None
        assert np.array_equal(one.alignment.spans, other.alignment.spans)
        assert one.alignment.digest == other.alignment.digest
        assert json.dumps([one.alignment.num_bytes, one.alignment.aligned_bytes]) == json.dumps(
            [other.alignment.num_bytes, other.alignment.aligned_bytes]
        )
