"""Across: what a student with a tokenizer of its own has beside its weights, to learn from a teacher's rows.

    batch.aligned (runs of rows) -> Spans -> distill_across, or the metrics of evaluation

A part of the student, so that what a method trains beside it (dskd's projectors) lies, learns and is saved with it; it
is not exported.
"""

from collections.abc import Sequence

import torch
from torch import nn

from kdpipe.manifests.errors import ConfigError
from kdpipe.manifests.specs import LossSpec
from kdpipe.stages.feed.packing import PackedBatch
from kdpipe.stages.loss import DistillLoss, Side
from kdpipe.stages.loss.cross import distill_across
from kdpipe.stages.loss.cross_metrics import CrossMetrics, cross_metrics
from kdpipe.stages.loss.spans import Spans
from kdpipe.stages.models.vocabularies import SharedVocabulary

AUTO, NONE = "auto", "none"
DEFAULT_METHOD = "shared-vocab"
"""What "auto" stands for where the tokenizers differ."""


class Across(nn.Module):
    """The vocabulary that student and teacher share, the method, and the method's own module where it has one."""

    def __init__(self, vocabulary: SharedVocabulary, method: str, extra: nn.Module | None = None) -> None:
        super().__init__()
        self.vocabulary, self.method, self.extra = vocabulary, method, extra

    def loss(
        self,
        student: Side,
        teachers: Sequence[Side],
        batch: PackedBatch,
        loss: LossSpec,
        *,
        weights: torch.Tensor | None,
        seed: int,
        scale: float,
    ) -> DistillLoss:
        """The loss of a batch that has a teacher's rows."""
        (teacher,) = teachers
        return distill_across(
            student,
            teacher,
            spans_of(batch),
            batch.labels,
            method=self.method,
            loss=loss,
            vocabulary=self.vocabulary,
            extra=self.extra,
            weights=weights,
            keys=batch.keys,
            seed=seed,
            loss_scale=scale,
        )

    def metrics(self, student: Side, teachers: Sequence[Side], batch: PackedBatch) -> CrossMetrics:
        """Sums of a batch that has a teacher's rows."""
        (teacher,) = teachers
        return cross_metrics(student, teacher, spans_of(batch), batch.labels, self.vocabulary)


def spans_of(batch: PackedBatch) -> Spans:
    """The spans of the batch's rows and its only teacher's."""
    (runs,) = batch.aligned
    student, teacher, teacher_tokens = runs
    return Spans(student=student, teacher=teacher, student_tokens=batch.next_tokens, teacher_tokens=teacher_tokens)


def method_of(align: str) -> str:
    """The method that student.align stands for. Raises ConfigError for "none"."""
    if align == NONE:
        raise ConfigError(
            "its tokenizer is not the teacher's and student.align is none; leave the key out, or name a method",
            where="student.align",
        )
    return DEFAULT_METHOD if align == AUTO else align
