"""Rows of spans that are compared: of exact spans, of each span's first row, of spans merged by the chain rule.

A span of several tokens becomes one distribution: that of its last row, which has read the span's other tokens, times
their probabilities (Bayes' rule; GOLD). With the first row instead, its distribution times the probabilities of the
tokens that follow. Where both models have one token nothing is multiplied.
"""

# Shapes: K spans, N compared rows, M other rows of spans.

from typing import NamedTuple

import torch
from torch import Tensor

from kdpipe.stages.loss.cross.passes import Passes, likelihoods
from kdpipe.stages.loss.cross.rows import Pair
from kdpipe.stages.loss.cross.task import Order, Task, alone, compared
from kdpipe.stages.loss.head import Side
from kdpipe.stages.loss.spans import members


class Compared(NamedTuple):
    """A row of each model for each of some spans, int64 [N] each."""

    student: Tensor
    teacher: Tensor
    spans: Tensor


def exact_rows(task: Task) -> Compared:
    """Of the spans that are one token on each side."""
    spans = task.spans.exact.nonzero()[:, 0]
    return Compared(task.spans.student[spans, 0], task.spans.teacher[spans, 0], spans)


def first_rows(task: Task) -> Compared:
    """Of every span: both models have read the same text before it."""
    spans = torch.arange(len(task.spans), device=task.spans.student.device)
    return Compared(task.spans.student[:, 0], task.spans.teacher[:, 0], spans)


def last_rows(task: Task) -> Compared:
    """Of every span: each model has read its own part of it."""
    found = first_rows(task)
    return Compared(task.spans.student.sum(1) - 1, task.spans.teacher.sum(1) - 1, found.spans)


def plain_passes(task: Task, order: Order, chosen: Compared, pair: Pair, tables: tuple[Tensor, ...]) -> Passes:
    """The compared rows, then the others alone."""
    teacher = task.teacher_rows(chosen.teacher)
    yield from compared(task, order, teacher, pair, tables, teacher_size=task.teacher_size)
    yield from alone(task, order)


def merged_passes(task: Task, order: Order, chosen: Compared, pair: Pair, tables: tuple[Tensor, ...]) -> Passes:
    """The compared rows, each times the probabilities of its span's other tokens; then the others, pulled by that."""
    spans, own = task.spans, task.problem.student
    with torch.no_grad():
        log_student = _others(
            Side(own.hidden.detach(), own.head),
            spans.student,
            spans.student_tokens,
            chosen.student,
            task.student_size,
            task,
        )
        log_teacher = _others(
            task.teacher, spans.teacher, spans.teacher_tokens, chosen.teacher, task.teacher_size, task
        )
    pulls = torch.zeros_like(task.weights)
    for each in compared(
        task,
        order,
        task.teacher_rows(chosen.teacher),
        pair,
        tables,
        teacher_size=task.teacher_size,
        log_student=log_student,
        log_teacher=log_teacher,
    ):
        values = yield each
        rows, of = members(spans.student)
        pulls.index_copy_(0, rows, values[4][of])
    yield from alone(task, order, pulls[order.others])


def _others(side: Side, runs: Tensor, tokens: Tensor, chosen: Tensor, size: int, task: Task) -> Tensor:
    """Log-likelihood of a span's tokens but that of its chosen row, fp32 [K]."""
    rows, spans = members(runs)
    other = rows != chosen[spans]
    rows, spans = rows[other], spans[other]
    found = likelihoods(
        Side(side.hidden[rows], side.head), tokens[rows], size, task.temperature, chunk_tokens=task.chunk_rows
    )
    return found.new_zeros(len(runs)).index_add_(0, spans, found)
