"""Blocks: a few rows of raw logits become loss values and the gradient, in one pass through the processor's cache.

`block_step` makes the function of a `Formula`: everything between the matrix products. It is compiled where the work is
worth the seconds that takes and there is a compiler; else it runs operator by operator, to the same rounding.
Invariant: a row's results do not depend on the rows beside it.
Cost: what torch keeps between passes, some fp32 arrays [R, V].
"""

# Shapes: R rows in a block, V shared vocabulary.

import threading
import warnings
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch._dynamo.exc import TorchDynamoException
from torch._inductor.exc import InductorError

from kdpipe.manifests.sample import IGNORED
from kdpipe.stages.loss.divergences import find
from kdpipe.stages.loss.pointwise import Distributions, averaged, normalised, one_hot, sum_of
from kdpipe.stages.loss.problem import Problem
from kdpipe.stages.models.head import Finish

VALUES = ("kd", "ce", "z", "teacher_entropy")


class Block(NamedTuple):
    """The VALUES of a block's rows [4, R], and its bias gradient [V] where that is wanted."""

    values: Tensor
    bias: Tensor | None


Step = Callable[..., Block]


@dataclass(frozen=True, kw_only=True, slots=True)
class Formula:
    """All that a compiled block depends on but shapes and dtypes. divergence is None where no teacher is needed.

    teachers: what is done to each teacher's raw logits; teacher_weights, teacher_mix: as in Problem
    """

    divergence: str | None
    options: tuple[tuple[str, float], ...]
    temperature: float
    kd_weight: float
    kd_scale: float
    label_smoothing: float
    z_loss: float
    student: Finish
    teachers: tuple[Finish, ...]
    teacher_weights: tuple[float, ...]
    teacher_mix: str
    differentiate: bool
    wants_bias: bool

    @classmethod
    def of(cls, problem: Problem, *, differentiate: bool, wants_bias: bool) -> "Formula":
        return cls(
            divergence=problem.divergence.name if problem.teachers else None,
            options=tuple(problem.options.items()),
            temperature=problem.temperature,
            kd_weight=problem.kd_weight,
            kd_scale=problem.kd_scale,
            label_smoothing=problem.label_smoothing,
            z_loss=problem.z_loss,
            student=problem.student.head.finish,
            teachers=tuple(teacher.head.finish for teacher in problem.teachers),
            teacher_weights=problem.teacher_weights,
            teacher_mix=problem.teacher_mix,
            differentiate=differentiate,
            wants_bias=wants_bias,
        )


@lru_cache(maxsize=256)
def block_step(formula: Formula, shape: Hashable, *, compiled: bool) -> Step:
    """step(student_raw, teachers_raw, labels, weights, draws, student_bias, teacher_biases, scale) -> Block.

    shape: whatever a compiled step is specialised to; each has its own, so that none meets torch's limit of recompiles

    student_raw [R, V] is overwritten by the gradient with respect to it, rounded to its dtype; teachers_raw and
    teacher_biases have one [R, V] and one bias of each teacher. labels int64 [R], IGNORED for none; weights fp32 [R]
    multiply a row's values and gradient; draws fp64 [R, K]. None stands for what there is not. scale, a scalar,
    multiplies the gradient.
    """
    divergence = None if formula.divergence is None else find(formula.divergence)
    options = dict(formula.options)

    def step(
        student_raw: Tensor,
        teachers_raw: tuple[Tensor, ...],
        labels: Tensor | None,
        weights: Tensor | None,
        draws: Tensor | None,
        student_bias: Tensor | None,
        teacher_biases: tuple[Tensor | None, ...],
        scale: Tensor,
    ) -> Block:
        logits = formula.student.apply(student_raw.float(), student_bias)
        log_p, p, log_total = normalised(logits)
        z = log_total.square()
        kd = ce = entropy = torch.zeros_like(z)
        gradient = torch.zeros_like(log_p)
        if divergence is not None:
            if formula.temperature == 1.0:
                log_p_student, p_student = log_p, p
            else:
                log_p_student, p_student, _ = normalised(logits / formula.temperature)
            teachers = targets(formula, teachers_raw, teacher_biases)
            found = [
                divergence.value_and_grad(Distributions(*teacher, log_p_student, p_student, draws), **options)
                for teacher in teachers
            ]
            kd, gradient = (sum_of(each, formula.teacher_weights) for each in zip(*found, strict=True))
            kd = kd * formula.kd_scale
            gradient = gradient * (formula.kd_weight * formula.kd_scale / formula.temperature)
            entropy = sum_of([-(p * log_p).sum(-1) for log_p, p in teachers], formula.teacher_weights)
        if labels is not None:
            ce, pull = cross_entropy(log_p, p, labels, smoothing=formula.label_smoothing, share=1.0 - formula.kd_weight)
            gradient = gradient if pull is None else gradient + pull
        if formula.z_loss:
            gradient = gradient + p * (2.0 * formula.z_loss * log_total)[:, None]
        if weights is not None:
            kd, ce, z, gradient = kd * weights, ce * weights, z * weights, gradient * weights[:, None]
        values = torch.stack([kd, ce, z, entropy])
        if not formula.differentiate:
            return Block(values, None)
        gradient = formula.student.slope(logits, gradient * scale)
        bias = gradient.sum(0) if formula.wants_bias else None
        student_raw.copy_(gradient)
        return Block(values, bias)

    return Compiled(step) if compiled else step


def cross_entropy(
    log_p: Tensor, p: Tensor, labels: Tensor, *, smoothing: float, share: float
) -> tuple[Tensor, Tensor | None]:
    """The cross-entropy [R] of log p and p [R, V], 0 where labels are IGNORED, and its gradient times `share` of it.

    The gradient is None where the share is 0.
    """
    labelled, target = (labels != IGNORED).float(), labels.clamp_min(0)[:, None]
    ce = -log_p.gather(1, target).squeeze(-1) * labelled
    if smoothing:
        ce = (1.0 - smoothing) * ce - smoothing * log_p.mean(-1) * labelled
    if share == 0.0:
        return ce, None
    wanted = one_hot(target, p)
    if smoothing:
        wanted = (1.0 - smoothing) * wanted + smoothing / p.shape[1]
    return ce, (p - wanted) * (labelled * share)[:, None]


def targets(
    formula: Formula, teachers_raw: Sequence[Tensor], biases: Sequence[Tensor | None]
) -> list[tuple[Tensor, Tensor]]:
    """log T and T [R, V] of what the student is compared with: of every teacher, or of their one average."""
    teachers = []
    for finish, raw, bias in zip(formula.teachers, teachers_raw, biases, strict=True):
        logits = finish.apply(raw.float(), bias)
        log_p, p, _ = normalised(logits if formula.temperature == 1.0 else logits / formula.temperature)
        teachers.append((log_p, p))
    return [averaged(teachers, formula.teacher_weights)] if formula.teacher_mix == "distributions" else teachers


class Compiled:
    """A step under torch.compile; where that fails, the step itself, with a warning.

    Compiling is done by one thread at a time: two at once fail in torch 2.13.
    """

    _lock = threading.Lock()

    def __init__(self, step: Step) -> None:
        self._step, self._ready = step, False
        # One formula's shapes and dtypes are not to use up the recompilations of another's.
        self._compiled: Step = torch.compile(step, fullgraph=True, dynamic=False, isolate_recompiles=True)  # type: ignore[call-overload]

    def __call__(self, *arguments: Tensor | tuple[Tensor | None, ...] | None) -> Block:
        if self._ready:
            return self._compiled(*arguments)
        with self._lock:
            try:
                block = self._compiled(*arguments)
            except (TorchDynamoException, InductorError) as err:
                warnings.warn(f"torch.compile failed, losses take longer: {err}", stacklevel=2)
                self._compiled = self._step
                block = self._step(*arguments)
            self._ready = True
            return block
