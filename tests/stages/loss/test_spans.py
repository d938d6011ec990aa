"""Spans: what is refused, and which rows they consist of."""

import pytest
import torch
from torch import Tensor

from kdpipe.manifests.errors import ConfigError
from kdpipe.stages.loss.spans import Spans, members


def spans_of(student: list[list[int]], teacher: list[list[int]], rows: int = 9, teacher_rows: int = 9) -> Spans:
    def runs(values: list[list[int]]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64).view(-1, 2)

    return Spans(
        student=runs(student),
        teacher=runs(teacher),
        student_tokens=torch.arange(rows),
        teacher_tokens=torch.arange(teacher_rows),
    )


def test_spans_consist_of_their_rows_in_order() -> None:
    found = members(torch.tensor([[3, 2], [7, 1], [8, 3]]))
    assert found.rows.tolist() == [3, 4, 7, 8, 9, 10]
    assert found.spans.tolist() == [0, 0, 1, 2, 2, 2]


def test_no_spans_consist_of_no_rows() -> None:
    spans = spans_of([], [])
    spans.check()
    assert len(spans) == 0
    assert members(spans.student).rows.tolist() == []
    assert spans.exact.tolist() == []


def test_a_span_of_one_row_on_each_side_is_exact() -> None:
    spans = spans_of([[0, 1], [1, 2], [3, 1]], [[0, 1], [1, 1], [2, 2]])
    spans.check()
    assert spans.exact.tolist() == [True, False, False]


@pytest.mark.parametrize(
    ("student", "teacher"),
    [
        ([[0, 2], [1, 1]], [[0, 1], [1, 1]]),
        ([[4, 1], [1, 1]], [[0, 1], [1, 1]]),
        ([[0, 1], [1, 0]], [[0, 1], [1, 1]]),
        ([[0, 1], [1, 1]], [[0, 1], [8, 2]]),
        ([[-1, 1], [1, 1]], [[0, 1], [1, 1]]),
        ([[0, 1]], [[0, 1], [1, 1]]),
    ],
    ids=["overlapping", "out of order", "empty", "beyond the rows", "before the rows", "another number"],
)
def test_spans_that_cannot_be_are_refused(student: list[list[int]], teacher: list[list[int]]) -> None:
    with pytest.raises(ConfigError):
        spans_of(student, teacher).check()


def test_spans_of_another_dtype_are_refused() -> None:
    good = spans_of([[0, 1]], [[0, 1]])
    bad = Spans(
        student=good.student.int(),
        teacher=good.teacher,
        student_tokens=good.student_tokens,
        teacher_tokens=good.teacher_tokens,
    )
    with pytest.raises(ConfigError, match="int64"):
        bad.check()
