"""Every method between models of really different tokenizers, on spans of real text, against fp64."""

# Shapes: R rows of the student, P rows of the teacher, V and U their vocabularies, K spans.

from functools import cache
from itertools import pairwise
from typing import Any

import pytest
import torch
from tests import tokenizers
from tests.stages.loss.cross.cases import Case, Pairs, errors, outcome

from kdpipe.stages.loss import Head, Side
from kdpipe.stages.loss.cross import METHODS, distill_across
from kdpipe.stages.loss.cross.reference import reference_across
from kdpipe.stages.loss.spans import Spans
from kdpipe.stages.models.vocabularies import SharedVocabulary

TEXT = (
    " The runs of 2023 cost 1,234.50 more than those of 1998: 65 steps, 8192 tokens each.  Two blanks, naïve café, "
    "こんにちは世界 and 🙂 are cut in many ways; Привет, мир! A ring holds the rows of a teacher, "
    "and a student waits for them."
)
PAIRS = [("byte_level", "unigram"), ("unigram", "byte_level"), ("byte_level", "llama")]
PRETRAINED = [("unigram", "smollm2"), ("smollm2", "unigram"), ("byte_level", "smollm2")]
"""With SmolLM2's 49,152 tokens, digits one by one; fetching it takes a while."""


def ends_of(tokens: list[bytes], text: bytes) -> list[int]:
    """Where each token of a text ends; a blank that a tokenizer put before it is not of the text."""
    extra = sum(map(len, tokens)) - len(text)
    assert b"".join(tokens)[extra:] == text
    found, end = [], -extra
    for token in tokens:
        end += len(token)
        found.append(end)
    return found


def runs_of(ends: list[int], common: list[int]) -> torch.Tensor:
    """Rows [K, 2] between common ends."""
    places = [0, *(ends.index(end) + 1 for end in common)]
    return torch.tensor([[first, last - first] for first, last in pairwise(places)])


@cache
def case_of(student: str, teacher: str) -> Case:
    own, theirs = getattr(tokenizers, student)(), getattr(tokenizers, teacher)()
    shared = SharedVocabulary.of(own, theirs, student_size=len(own), teacher_size=len(theirs))
    ids = [each.encode(TEXT, add_special_tokens=False) for each in (own, theirs)]
    tables = shared.student_bytes, shared.teacher_bytes
    ends = [
        ends_of([table[index] or b"" for index in each], TEXT.encode()) for table, each in zip(tables, ids, strict=True)
    ]
    common = sorted(set(ends[0]) & set(ends[1]))
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    tokens = [torch.tensor(each) for each in ids]
    return Case(
        student_hidden=draw(len(ids[0]), 23),
        student_head=draw(len(own), 23) / 3,
        student_bias=draw(len(own)) / 3,
        teacher=Side(draw(len(ids[1]), 31), Head(draw(len(theirs), 31) / 3, None)),
        spans=Spans(
            student=runs_of(ends[0], common),
            teacher=runs_of(ends[1], common),
            student_tokens=tokens[0],
            teacher_tokens=tokens[1],
        ),
        labels=tokens[0],
        vocabulary=shared,
    )


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("student", "teacher"), [*PAIRS, *(pytest.param(*pair, marks=pytest.mark.slow) for pair in PRETRAINED)]
)
def test_every_method_is_its_definition_between_real_tokenizers(student: str, teacher: str, method: str) -> None:
    case = case_of(student, teacher)
    assert int(case.spans.exact.sum()) >= 20
    assert int((~case.spans.exact).sum()) >= 10
    spec: dict[str, Any] = {"kd_weight": 0.7, "temperature": 1.2}
    right = outcome(reference_across, case.to(torch.float64), method, **spec)
    off = errors(outcome(distill_across, case.to(torch.float32), method, **spec), right)
    assert max(off.values()) < 5e-6, off
    assert float(right.out.kd) > 0.0


def test_p_kl_sees_a_numeral_that_the_teacher_writes_digit_by_digit_and_shared_vocab_does_not() -> None:
    """The student's "20" begins as the teacher's "2" does: likelier digits pull it up, instead of nothing or down."""
    own, theirs = [b"20", b"x", b"y"], [b"2", b"0", b"x", b"y"]
    ids = torch.tensor([1, 2]), torch.tensor([2, 3])
    case = Case(
        student_hidden=torch.eye(3)[:1],
        student_head=torch.zeros(3, 3),
        student_bias=torch.zeros(3),
        teacher=Side(torch.ones(1, 1), Head(torch.tensor([[4.0], [0.0], [0.0], [0.0]]))),
        spans=Spans(
            student=torch.tensor([[0, 1]]),
            teacher=torch.tensor([[0, 1]]),
            student_tokens=torch.tensor([0]),
            teacher_tokens=torch.tensor([0]),
        ),
        labels=torch.tensor([0]),
        vocabulary=Pairs(*ids, 3, 4, own, theirs),
    ).to(torch.float32)
    projected = outcome(distill_across, case, "xtoken", options={"decay": 0.0}).gradients[2]
    shared = outcome(distill_across, case, "shared-vocab").gradients[2]
    assert projected is not None
    assert shared is not None
    assert float(projected[0]) < -1.0
    assert float(shared[0]) == 0.0
