"""Task: the checked arguments of one loss across tokenizers, and the rows that its passes are made of.

Invariant: a Task that exists has spans within both models' rows, vocabularies that both heads have, options the method
and its divergence know.
"""

# Shapes: K spans, R rows of the student, P rows of the teacher, N rows that are compared.

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from kdpipe.stages.loss.cross.passes import Pass
from kdpipe.stages.loss.cross.rows import Pair, Rows
from kdpipe.stages.loss.divergences import Divergence
from kdpipe.stages.loss.head import Side
from kdpipe.stages.loss.layout import CHUNK_TOKENS
from kdpipe.stages.loss.problem import RANKED_EVERY, Problem, drawn
from kdpipe.stages.loss.spans import Spans, members


class Shared(Protocol):
    """Two vocabularies: models.vocabularies.SharedVocabulary.

    student_ids, teacher_ids: int64 [S], tokens of the same bytes
    student_size, teacher_size: tokens of each; further rows of a head are padding
    student_bytes, teacher_bytes: of every id the bytes of text it stands for, None for a special token
    """

    @property
    def student_ids(self) -> Tensor: ...
    @property
    def teacher_ids(self) -> Tensor: ...
    @property
    def student_size(self) -> int: ...
    @property
    def teacher_size(self) -> int: ...
    @property
    def student_bytes(self) -> Sequence[bytes | None]: ...
    @property
    def teacher_bytes(self) -> Sequence[bytes | None]: ...


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Task:
    """problem: the student's half, posed without a teacher; its labels are IGNORED where there are none.

    options: of the method; divergence_options: of the divergence; keys, seed: of a sampled divergence's draws
    weights: fp32 [R], of the rows
    """

    problem: Problem
    teacher: Side
    spans: Spans
    vocabulary: Shared
    extra: nn.Module | None
    divergence: Divergence
    divergence_options: Mapping[str, float]
    options: Mapping[str, float]
    temperature: float
    kd_weight: float
    kd_scale: float
    weights: Tensor
    labels: Tensor
    keys: Tensor
    seed: int
    chunk_tokens: int | None

    @property
    def student_size(self) -> int:
        return self.problem.vocab_size

    @property
    def teacher_size(self) -> int:
        return self.vocabulary.teacher_size

    @property
    def cross_entropy(self) -> bool:
        """Whether a row alone has a gradient."""
        return self.kd_weight < 1.0 or self.problem.z_loss > 0.0

    @property
    def chunk_rows(self) -> int:
        """Rows whose logits exist at a time where likelihoods are read."""
        usual = CHUNK_TOKENS.get(self.labels.device.type, CHUNK_TOKENS["cuda"])
        return self.chunk_tokens or usual

    def span_weights(self) -> Tensor:
        """Of each span the mean weight of its student's rows, fp32 [K]."""
        rows, spans = members(self.spans.student)
        total = torch.zeros(len(self.spans), device=rows.device).index_add_(0, spans, self.weights[rows])
        return total / self.spans.student[:, 1]

    def draws(self, rows: Tensor) -> Tensor | None:
        """The uniform numbers of those student rows [N, K], where the divergence draws."""
        hidden = self.problem.student.hidden
        found = drawn(self.divergence, self.divergence_options, self.keys, self.seed, hidden)
        return None if found is None else found[rows]

    def teacher_rows(self, rows: Tensor) -> Side:
        """The teacher's side of those rows."""
        return Side(self.teacher.hidden[rows], self.teacher.head)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Order:
    """The student's rows, those that are compared first, in spans' order; then the others.

    rows: int64 [R], all of them; num_compared: N; spans: int64 [N], of each compared row
    """

    rows: Tensor
    num_compared: int
    spans: Tensor

    @classmethod
    def of(cls, compared: Tensor, spans: Tensor, num_rows: int) -> "Order":
        others = torch.ones(num_rows, dtype=torch.bool, device=compared.device)
        others[compared] = False
        return cls(rows=torch.cat([compared, others.nonzero()[:, 0]]), num_compared=len(compared), spans=spans)

    @property
    def compared(self) -> Tensor:
        return self.rows[: self.num_compared]

    @property
    def others(self) -> Tensor:
        return self.rows[self.num_compared :]


def compared(
    task: Task,
    order: Order,
    teacher: Side,
    pair: Pair,
    tables: tuple[Tensor, ...] = (),
    *,
    teacher_size: int,
    log_student: Tensor | None = None,
    log_teacher: Tensor | None = None,
    is_projected: bool = False,
) -> Iterator[Pass]:
    """The pass over the compared rows, or none of it where there are no spans.

    is_projected: the teacher's rows are not its own, so nothing is said of its likeliest tokens
    """
    rows = order.compared
    exact = task.spans.exact[order.spans].nonzero()[:, 0]
    shared = task.vocabulary.student_ids.to(rows.device), task.vocabulary.teacher_ids.to(rows.device)
    if order.num_compared:
        yield Pass(
            start=0,
            stop=order.num_compared,
            rows=Rows(
                labels=task.labels[rows],
                weights=task.weights[rows],
                span_weights=task.span_weights()[order.spans],
                tokens=task.spans.student_tokens[rows],
                draws=task.draws(rows),
                log_student=log_student,
                log_teacher=log_teacher,
            ),
            teacher=teacher,
            teacher_size=teacher_size,
            pair=pair,
            tables=tables,
            ranked=None if is_projected or not len(shared[0]) else exact[::RANKED_EVERY],
            shared=shared,
        )


def alone(task: Task, order: Order, pulls: Tensor | None = None) -> Iterator[Pass]:
    """The pass over the other rows: their cross-entropy, and `pulls` fp32 [R - N] on their own tokens."""
    rows = order.others
    if len(rows):
        yield Pass(
            start=order.num_compared,
            stop=len(order.rows),
            rows=Rows(
                labels=task.labels[rows],
                weights=task.weights[rows],
                tokens=None if pulls is None else task.spans.student_tokens[rows],
                pulls=pulls,
            ),
            differentiate=task.cross_entropy or pulls is not None,
        )
