"""Retelling: what a teacher reads of an answer in a student's tokens, and which of them stand for the same text."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.stages.prepare.test_pairing import ANSWER, QUESTION, pair, party, side, texts

from kdpipe.manifests.sample import SampleTokens, prompt_of
from kdpipe.stages.align import Retelling, Retold
from kdpipe.stages.models.vocabularies import SharedVocabulary

PAIRS = [("unigram", "byte-level"), ("byte-level", "unigram"), ("words", "byte-level"), ("byte-level", "words")]
ANSWERS = [
    str(ANSWER["content"]),
    "  Rows, then.\n\nNothing else 🙂🙂 ",
    "Na\u00efve\n\n 20231 \u4e00\u79cd 👩‍👩‍👧‍👦 1,234.50",
    "x",
]


def retelling(student: str, teacher: str, *, most_tokens: int | None = None, most_rows: int = 1 << 20) -> Retelling:
    ours, theirs = side(student), side(teacher)
    shared = SharedVocabulary.of(ours, theirs, student_size=len(ours), teacher_size=len(theirs))
    ends = [(ours.eos_token_id, theirs.eos_token_id)]
    return Retelling(ours, theirs, shared, ends, most_tokens=most_tokens, most_rows=most_rows)


def spelt(name: str, text: SampleTokens, runs: np.ndarray) -> list[str]:
    """What runs of rows say, special tokens by their names."""
    return [texts(party(name), text, int(first), int(count)) for first, count in runs]


def told(names: tuple[str, str], answer: np.ndarray, *, ended: bool, **limits: Any) -> tuple[Retold, SampleTokens]:
    """What comes of an answer to QUESTION, and the student's own sample of it."""
    record = {"messages": [QUESTION, {"role": "assistant", "content": "x"}]}
    prompts = [prompt_of(SampleTokens(one.token_ids, one.supervised)) for one in samples(record, names)]
    ids = np.concatenate([prompts[0], answer]).astype(np.int32)
    own = SampleTokens(ids, np.arange(len(ids)) >= len(prompts[0]))
    found = retelling(*names, **limits).told(prompts[1], answer, ended=ended)
    assert found.text.token_ids[: len(prompts[1])].tolist() == prompts[1].tolist()
    assert (found.text.supervised == (np.arange(len(found.text.token_ids)) >= len(prompts[1]))).all()
    return found, own


def samples(record: dict[str, Any], names: tuple[str, str]) -> tuple[Any, Any]:
    outcome, other = pair(record, party(names[0]), party(names[1]))
    assert outcome.sample is not None
    assert other.sample is not None
    return outcome.sample, other.sample


@pytest.mark.parametrize("answer", ANSWERS)
@pytest.mark.parametrize("names", PAIRS)
def test_an_answer_that_is_the_datas_own_is_told_as_the_data_have_it(names: tuple[str, str], answer: str) -> None:
    """By the tokens that either tokenizer makes of the record as a whole, and its spans."""
    record = {"messages": [QUESTION, {"role": "assistant", "content": answer}]}
    outcome, _ = pair(record, party(names[0]), party(names[1]))
    own, theirs = samples(record, names)
    assert outcome.alignment is not None
    end = np.flatnonzero(own.supervised)[-1] + 1
    prompt = prompt_of(SampleTokens(own.token_ids, own.supervised))
    found, _ = told(names, own.token_ids[len(prompt) : end], ended=True)
    if names[0] == "words":  # which writes no case, accents or blanks down
        assert 1 < len(found.spans) <= len(own.token_ids)
        return
    last = np.flatnonzero(theirs.supervised)[-1] + 1
    assert found.text.token_ids.tolist() == theirs.token_ids[:last].tolist()
    if answer == answer.strip():  # of the data, blanks around a turn are in no span
        assert found.spans.tolist() == outcome.alignment.spans.tolist()


@pytest.mark.parametrize("names", PAIRS)
@given(data=st.data())
def test_of_any_tokens_both_sides_of_a_span_read_the_same(names: tuple[str, str], data: st.DataObject) -> None:
    """Also where bytes make no character, special tokens stand inside, and a word is cut as no tokenizer cuts it."""
    answer = np.array(data.draw(st.lists(st.integers(0, len(side(names[0])) - 1), min_size=1, max_size=30)), np.int32)
    ended = answer[-1] == side(names[0]).eos_token_id
    found, own = told(names, answer, ended=bool(ended))
    runs, ends = found.spans, [side(name).eos_token for name in names]
    for begin in (0, 2):
        assert (runs[1:, begin] >= runs[:-1, begin] + runs[:-1, begin + 1]).all()
    assert (runs[:, 1] > 0).all()
    assert (runs[:, 3] > 0).all()
    pairs = list(zip(spelt(names[0], own, runs[:, :2]), spelt(names[1], found.text, runs[:, 2:]), strict=True))
    if names[1] != "words":
        assert [one.lstrip() for one, _ in pairs if one not in ends] == [
            other.lstrip() for one, other in pairs if one not in ends
        ]
    assert all(one == ends[0] for one, other in pairs if other == ends[1])
    assert int(found.text.supervised.sum()) >= 1


def test_what_is_no_text_ends_the_answer_for_the_teacher() -> None:
    names = ("byte-level", "unigram")
    tokenizer = side(names[0])
    ids = tokenizer.encode("one two")
    half, start = tokenizer.encode("\u4e00")[:1], tokenizer.convert_tokens_to_ids("<|im_start|>")
    for foreign in (half, [start]):
        answer = np.array([*ids, *foreign, *ids, tokenizer.eos_token_id], np.int32)
        found, own = told(names, answer, ended=True)
        assert "".join(spelt(names[0], own, found.spans[:, :2])) == "one two"
        read = texts(party(names[1]), found.text, 0, 1 << 20)
        assert read.lstrip() == "one two"
    found, _ = told(names, np.array([start, *ids], np.int32), ended=False)
    assert (len(found.spans), int(found.text.supervised.sum())) == (0, 1), "nothing is told, and one row asked for"


def test_an_answer_that_was_cut_has_no_end() -> None:
    names = ("unigram", "byte-level")
    ids = np.array(side(names[0]).encode("one two three"), np.int32)
    end = np.array([side(names[0]).eos_token_id], np.int32)
    cut, _ = told(names, ids, ended=False)
    whole, own = told(names, np.concatenate([ids, end]), ended=True)
    assert whole.text.token_ids[:-1].tolist() == cut.text.token_ids.tolist()
    assert whole.spans[:-1].tolist() == cut.spans.tolist()
    assert spelt(names[0], own, whole.spans[-1:, :2]) == ["<|stop|>"]


def test_no_more_is_told_than_the_teacher_reads_and_the_ring_holds() -> None:
    names = ("unigram", "byte-level")
    ids = np.array(side(names[0]).encode("one two three four five six seven " * 5), np.int32)
    whole, _ = told(names, ids, ended=False)
    prompt = int((~whole.text.supervised).sum())
    for limits in ({"most_rows": 9}, {"most_tokens": prompt + 9}):
        some, _ = told(names, ids, ended=False, **limits)
        assert some.text.token_ids.tolist() == whole.text.token_ids[: prompt + 9].tolist()
        assert 0 < len(some.spans) < len(whole.spans)
        assert some.spans.tolist() == whole.spans[: len(some.spans)].tolist()
        assert some.spans[-1, 2:].sum() <= 9
    one = retelling(*names, most_tokens=prompt)
    assert one.has_room(whole.text.token_ids[: prompt - 1])
    assert not one.has_room(whole.text.token_ids[:prompt])
