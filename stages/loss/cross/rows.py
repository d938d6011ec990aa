"""Rows: what one block of the student's rows becomes in a loss across tokenizers, value and gradient, in fp32.

A row adds up to three things to the loss: the cross-entropy of its own token over the student's whole vocabulary (and
z), as in any loss; a pull on the log-probability of its own token, where a method works with likelihoods; and a
distance to a row of the teacher's, by a `Pair`. A method chooses the last two and says which rows have them.
Invariant: a row's results do not depend on the rows beside it.
"""

# Shapes: R rows in a block, V student's vocabulary, U teacher's vocabulary.

from collections.abc import Hashable
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from kdpipe.manifests.sample import IGNORED
from kdpipe.stages.loss.blocks import Block, Compiled, Step, cross_entropy
from kdpipe.stages.loss.pointwise import normalised, one_hot
from kdpipe.stages.loss.problem import Problem
from kdpipe.stages.models.head import Finish

VALUES = ("kd", "ce", "z", "teacher_entropy", "pull")


class Rows(NamedTuple):
    """What a pass knows of each of its rows, one entry a row; None stands for what there is not.

    labels: int64, IGNORED for a row without cross-entropy
    weights: fp32, multiply a row's ce and z
    span_weights: fp32, multiply the distance of a row's span
    tokens: int64, what the row predicts; pulls: fp32, d kd / d log p(token) at the temperature, weights included
    draws: fp64 [R, K], uniform numbers of a sampled divergence
    log_student, log_teacher: fp32, logarithm of what a row's distribution is multiplied by
    kd: fp32, a value found before, that the pulls are the slopes of
    """

    labels: Tensor
    weights: Tensor
    span_weights: Tensor | None = None
    tokens: Tensor | None = None
    pulls: Tensor | None = None
    draws: Tensor | None = None
    log_student: Tensor | None = None
    log_teacher: Tensor | None = None
    kd: Tensor | None = None

    def padded(self, count: int) -> "Rows":
        """The same and `count` rows more, that add nothing to any sum."""
        filled = {
            name: torch.cat([each, each.new_full((count, *each.shape[1:]), _FILL.get(name, 0))])
            for name, each in self._asdict().items()
            if each is not None
        }
        return self._replace(**filled)

    def cut(self, rows: slice) -> "Rows":
        """Those rows."""
        return self._replace(**{name: each[rows] for name, each in self._asdict().items() if each is not None})


_FILL = {"labels": IGNORED, "draws": 0.5}


class Distance(NamedTuple):
    """Of a block: values [R], gradient [R, V] of the student's finished logits, the teacher's entropy [R].

    pull: [R], d value / d log of what the student's distribution is multiplied by; None where that is always 1
    """

    value: Tensor
    gradient: Tensor
    entropy: Tensor
    pull: Tensor | None = None


class Pair(Hashable, Protocol):
    """A distance between a row of the student's and a row of the teacher's, of other vocabularies.

    compiles: whether torch.compile makes one pass of it
    """

    @property
    def compiles(self) -> bool: ...

    def __call__(self, student: Tensor, teacher: Tensor, rows: Rows, tables: tuple[Tensor, ...]) -> Distance:
        """Of finished logits [R, V] and [R, U] at temperature 1; tables are the method's own, of vocabularies."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RowFormula:
    """All that a compiled block depends on but shapes and dtypes. kd_weight and what follows are the loss's own."""

    pair: Pair | None
    kd_weight: float
    kd_scale: float
    temperature: float
    label_smoothing: float
    z_loss: float
    student: Finish
    teacher: Finish
    differentiate: bool
    wants_bias: bool

    @classmethod
    def of(
        cls,
        problem: Problem,
        pair: Pair | None,
        teacher: Finish | None,
        *,
        kd_weight: float,
        kd_scale: float,
        temperature: float,
        differentiate: bool,
        wants_bias: bool,
    ) -> "RowFormula":
        """Of the student's half as posed, and of what its pass adds."""
        return cls(
            pair=pair,
            kd_weight=kd_weight,
            kd_scale=kd_scale,
            temperature=temperature,
            label_smoothing=problem.label_smoothing,
            z_loss=problem.z_loss,
            student=problem.student.head.finish,
            teacher=teacher or Finish(),
            differentiate=differentiate,
            wants_bias=wants_bias,
        )


@lru_cache(maxsize=32)
def row_step(formula: RowFormula, shape: Hashable = None, *, compiled: bool) -> Step:
    """step(student_raw, teacher_raw, rows, tables, student_bias, teacher_bias, scale) -> Block of VALUES.

    student_raw [R, V] is overwritten by the gradient with respect to it, rounded to its dtype; teacher_raw [R, U].
    scale, a scalar, multiplies the gradient. shape: as in blocks.block_step
    """

    def step(
        student_raw: Tensor,
        teacher_raw: Tensor | None,
        rows: Rows,
        tables: tuple[Tensor, ...],
        student_bias: Tensor | None,
        teacher_bias: Tensor | None,
        scale: Tensor,
    ) -> Block:
        logits = formula.student.apply(student_raw.float(), student_bias)
        log_p, p, log_total = normalised(logits)
        z = log_total.square()
        entropy = pull = torch.zeros_like(z)
        kd = entropy if rows.kd is None else rows.kd
        ce, gradient = cross_entropy(
            log_p, p, rows.labels, smoothing=formula.label_smoothing, share=1.0 - formula.kd_weight
        )
        gradient = torch.zeros_like(log_p) if gradient is None else gradient
        if formula.z_loss:
            gradient = gradient + p * (2.0 * formula.z_loss * log_total)[:, None]
        ce, z, gradient = ce * rows.weights, z * rows.weights, gradient * rows.weights[:, None]
        if rows.tokens is not None and rows.pulls is not None:
            warm = p if formula.temperature == 1.0 else normalised(logits / formula.temperature)[1]
            drawn = (one_hot(rows.tokens[:, None], warm) - warm) * rows.pulls[:, None]
            gradient = gradient + drawn * (formula.kd_weight / formula.temperature)
        if formula.pair is not None and teacher_raw is not None:
            theirs = formula.teacher.apply(teacher_raw.float(), teacher_bias)
            found = formula.pair(logits, theirs, rows, tables)
            factor = torch.full_like(z, formula.kd_scale)
            if rows.span_weights is not None:
                factor = factor * rows.span_weights
            kd, entropy = found.value * factor, found.entropy
            pull = pull if found.pull is None else found.pull * factor
            gradient = gradient + found.gradient * (factor * formula.kd_weight)[:, None]
        values = torch.stack([kd, ce, z, entropy, pull])
        if not formula.differentiate:
            return Block(values, None)
        gradient = formula.student.slope(logits, gradient * scale)
        bias = gradient.sum(0) if formula.wants_bias else None
        student_raw.copy_(gradient)
        return Block(values, bias)

    return Compiled(step) if compiled and (formula.pair is None or formula.pair.compiles) else step
