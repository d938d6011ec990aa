"""Blocks: a few rows of raw logits become loss values and the gradient, in one pass through the processor's cache.

`block_step` makes the function of a `Formula`: everything between the matrix products. It is compiled where the work is
worth the seconds that takes and there is a compiler; else it runs operator by operator, to the same rounding.
Invariant: a row's results do not depend on the rows beside it.
Cost: what torch keeps between passes, some fp32 arrays [R, V].
"""

# Shapes: R rows in a block, V shared vocabulary.

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from kdpipe.stages.loss.divergences import find
from kdpipe.stages.loss.head import Finish
from kdpipe.stages.loss.pointwise import Rows, normalised, one_hot
from kdpipe.stages.loss.problem import IGNORED, Problem

# Entries of a block: its rows in bf16 and fp32 stay in a core's L2 while a compiled pass goes over them; operator by
# operator, smaller ones cost less than the trips to memory. A GPU wants work to fill it.
COMPILED_ENTRIES = {"cpu": 2**19, "cuda": 2**24}
EAGER_ENTRIES = {"cpu": 2**17, "cuda": 2**23}

# Entries of a whole problem from which on compiling pays: it takes 2 to 4 s once, and saves 3 ns an entry each time.
WORTH_COMPILING = 2**24


class Block(NamedTuple):
    """Values of a block [R] each, and its bias gradient [V] where that is wanted."""

    kd: Tensor
    ce: Tensor
    bias: Tensor | None


Step = Callable[[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None], Block]


@dataclass(frozen=True, kw_only=True, slots=True)
class Formula:
    """All that a compiled block depends on but shapes and dtypes. divergence is None where no teacher is needed."""

    divergence: str | None
    options: tuple[tuple[str, float], ...]
    temperature: float
    kd_weight: float
    kd_scale: float
    student: Finish
    teacher: Finish
    differentiate: bool
    wants_bias: bool

    @classmethod
    def of(cls, problem: Problem, *, differentiate: bool, wants_bias: bool) -> "Formula":
        return cls(
            divergence=None if problem.teacher is None else problem.divergence.name,
            options=tuple(problem.options.items()),
            temperature=problem.temperature,
            kd_weight=problem.kd_weight,
            kd_scale=problem.kd_scale,
            student=problem.student.head.finish,
            teacher=Finish() if problem.teacher is None else problem.teacher.head.finish,
            differentiate=differentiate,
            wants_bias=wants_bias,
        )


def rows_per_block(vocab_size: int, device: torch.device, *, compiled: bool) -> int:
    """R: at least one row, the same number for each thread."""
    threads = torch.get_num_threads() if device.type == "cpu" else 1
    sizes = COMPILED_ENTRIES if compiled else EAGER_ENTRIES
    return threads * max(1, sizes.get(device.type, sizes["cuda"]) // vocab_size)


def row_blocks(num_rows: int, size: int) -> Iterator[slice]:
    """slice(0, size), slice(size, 2 * size) ... up to num_rows."""
    return (slice(start, min(start + size, num_rows)) for start in range(0, num_rows, size))


def pays_to_compile(problem: Problem) -> bool:
    """Whether the problem is large and this machine can compile for its device."""
    if problem.num_tokens * problem.vocab_size < WORTH_COMPILING or os.environ.get("TORCH_COMPILE_DISABLE") == "1":
        return False
    return problem.student.hidden.device.type != "cpu" or has_compiler()


@lru_cache(maxsize=1)
def has_compiler() -> bool:
    """Whether there is a C++ compiler, which torch.compile needs on a CPU."""
    return shutil.which(os.environ.get("CXX", "g++")) is not None


@lru_cache(maxsize=64)
def block_step(formula: Formula, *, compiled: bool) -> Step:
    """step(student_raw, teacher_raw, labels, weights, student_bias, teacher_bias) -> Block, in place of the raw logits.

    student_raw [R, V] is overwritten by the gradient with respect to it, rounded to its dtype; teacher_raw [R, V].
    labels int64 [R], IGNORED for none; weights fp32 [R] multiply a row's values and gradient. None stands for what
    there is not.
    """
    divergence = None if formula.divergence is None else find(formula.divergence)
    options = dict(formula.options)

    def step(
        student_raw: Tensor,
        teacher_raw: Tensor | None,
        labels: Tensor | None,
        weights: Tensor | None,
        student_bias: Tensor | None,
        teacher_bias: Tensor | None,
    ) -> Block:
        logits = formula.student.apply(student_raw.float(), student_bias)
        log_p, p, _ = normalised(logits)
        kd = ce = torch.zeros_like(log_p[:, 0])
        gradient = torch.zeros_like(log_p)
        if divergence is not None and teacher_raw is not None:
            teacher_logits = formula.teacher.apply(teacher_raw.float(), teacher_bias)
            if formula.temperature == 1.0:
                log_p_student, p_student = log_p, p
            else:
                log_p_student, p_student, _ = normalised(logits / formula.temperature)
                teacher_logits = teacher_logits / formula.temperature
            log_p_teacher, p_teacher, _ = normalised(teacher_logits)
            rows = Rows(log_p_teacher, p_teacher, log_p_student, p_student)
            kd, gradient = divergence.value_and_grad(rows, **options)
            kd = kd * formula.kd_scale
            gradient = gradient * (formula.kd_weight * formula.kd_scale / formula.temperature)
        if labels is not None:
            labelled, target = labels != IGNORED, labels.clamp_min(0)[:, None]
            ce = -log_p.gather(1, target).squeeze(-1) * labelled
            if formula.kd_weight < 1.0:
                gradient = gradient + (p - one_hot(target, p)) * (labelled * (1.0 - formula.kd_weight))[:, None]
        if weights is not None:
            kd, ce, gradient = kd * weights, ce * weights, gradient * weights[:, None]
        if not formula.differentiate:
            return Block(kd, ce, None)
        gradient = formula.student.slope(logits, gradient)
        bias = gradient.sum(0) if formula.wants_bias else None
        student_raw.copy_(gradient)
        return Block(kd, ce, bias)

    if not compiled:
        return step
    # One formula's shapes and dtypes are not to use up the recompilations of another's.
    return torch.compile(step, fullgraph=True, dynamic=False, isolate_recompiles=True)  # type: ignore[call-overload]
