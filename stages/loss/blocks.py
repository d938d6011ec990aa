"""Blocks: a few rows of logits at a time, in fp32 scratch that is allocated once and stays in the processor's cache.

Invariant: a row's results do not depend on the rows beside it.
Cost: five fp32 buffers [R, V] for one divergence, two more where cross-entropy needs a second softmax.
"""

# Shapes: R rows in a block, V shared vocabulary.

from collections.abc import Iterator

import torch
from torch import Tensor

from kdpipe.stages.loss.pointwise import Rows, normalise_
from kdpipe.stages.loss.problem import IGNORED, Problem

# fp32 elements of one buffer. 512 KiB a thread: the buffers of a block stay in L2 and L3, and an operator on one (some
# 20 us) costs several times its dispatch. A GPU wants work to fill it.
BLOCK_ELEMENTS = {"cpu": 2**17, "cuda": 2**23}


def rows_per_block(vocab_size: int, device: torch.device) -> int:
    """R, at least one row for every thread."""
    threads = torch.get_num_threads() if device.type == "cpu" else 1
    elements = BLOCK_ELEMENTS.get(device.type, BLOCK_ELEMENTS["cuda"])
    return threads * max(1, elements // vocab_size)


def row_blocks(num_rows: int, size: int) -> Iterator[slice]:
    """slice(0, size), slice(size, 2 * size) ... up to num_rows."""
    return (slice(start, min(start + size, num_rows)) for start in range(0, num_rows, size))


class LossBlock:
    """Scratch for one block of rows and the way from raw logits to loss values and the gradient."""

    def __init__(self, problem: Problem, *, differentiate: bool) -> None:
        device = problem.student.hidden.device
        self.problem = problem
        self.rows = max(1, min(rows_per_block(problem.vocab_size, device), problem.num_tokens))
        self._has_slope = differentiate and problem.student.head.softcap is not None
        self._second_softmax = problem.labels is not None and problem.temperature != 1.0
        # Rows' four, the gradient, two of the second softmax, the slope: each [R, V].
        num_buffers = 5 + 2 * self._second_softmax + self._has_slope
        shape = (num_buffers, self.rows, problem.vocab_size)
        self._buffers = torch.empty(shape, dtype=torch.float32, device=device).unbind()

    def step(
        self, student_raw: Tensor, teacher_raw: Tensor | None, labels: Tensor | None, kd: Tensor, ce: Tensor
    ) -> Tensor:
        """Values of one block into kd [R] and ce [R]; returns the gradient of the raw student logits [R, V].

        The gradient is scratch: it is valid until the next step."""
        problem, num_rows = self.problem, student_raw.shape[0]
        # Only a chunk's last block is short: slicing the others would cost some 20 us each.
        buffers = self._buffers if num_rows == self.rows else [each[:num_rows] for each in self._buffers]
        rows, grad = Rows(*buffers[:4]), buffers[4]
        slope = buffers[-1] if self._has_slope else None
        problem.student.head.finish_(rows.log_p_student.copy_(student_raw), slope)
        log_p, p = rows.log_p_student, rows.p_student
        if self._second_softmax:
            log_p, p = buffers[5:7]
            normalise_(log_p.copy_(rows.log_p_student), p)
        normalise_(rows.log_p_student, rows.p_student, problem.temperature)
        if problem.teacher is not None and teacher_raw is not None:
            problem.teacher.head.finish_(rows.log_p_teacher.copy_(teacher_raw))
            normalise_(rows.log_p_teacher, rows.p_teacher, problem.temperature)
            kd.copy_(problem.divergence.value_and_grad(rows, grad, **problem.options))
            multiply_(grad, problem.kd_weight * problem.kd_scale / problem.temperature)
        else:
            grad.zero_()
        if labels is not None:
            add_cross_entropy_(grad, log_p, p, labels, 1.0 - problem.kd_weight, ce)
        if slope is not None:
            grad.mul_(slope)
        multiply_(grad, problem.student.head.scale)
        return grad


def multiply_(grad: Tensor, factor: float) -> None:
    if factor != 1.0:
        grad.mul_(factor)


def add_cross_entropy_(grad: Tensor, log_p: Tensor, p: Tensor, labels: Tensor, weight: float, ce: Tensor) -> None:
    """-log p[label] into ce [R], 0 where ignored; weight * (p - onehot) of labelled rows is added to grad [R, V]."""
    labelled = labels != IGNORED
    target = torch.where(labelled, labels, 0)[:, None]
    ce.copy_(log_p.gather(1, target)[:, 0].neg_().masked_fill_(~labelled, 0.0))
    if weight != 0.0:
        row_weight = (labelled * weight)[:, None]
        grad.addcmul_(p, row_weight)
        grad.scatter_add_(1, target, -row_weight)
