"""The fused loss: from hidden states and heads to loss and gradients, chunk by chunk, no [T, V] array of either model.

The four matrix products (student logits, teacher logits, gradient of hidden, gradient of head) run on chunks of C
tokens in the inputs' dtype. What lies between them is pointwise in V and runs on blocks of R rows small enough for the
processor's cache, in fp32, whatever the inputs are (fp64 too: then only the products are fp64), see blocks.py. The
gradient is taken in the forward pass; backward multiplies it by the incoming scalar, one more rounding unless that is a
power of two.
Invariant: the result does not depend on C or R beyond summation order; no value is read back from the device.
Cost over the inputs: two buffers [C, V] in the inputs' dtype, which a CPU keeps; the gradients themselves; an fp32 sum
[V, D] of the head's gradient where there is more than one chunk of less than fp32. Gradients in the forward pass are
the idea of Liger Kernel, never holding all logits that of Cut Cross-Entropy. Measured by tools/bench/loss.py.
"""

# Shapes: T tokens, V shared vocabulary, D student width, E teacher width, C tokens per chunk, R rows per block.

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kdpipe.manifests.errors import ConfigError
from kdpipe.stages.loss.blocks import Formula, block_step, pays_to_compile, rows_per_block
from kdpipe.stages.loss.gradients import StudentGradients
from kdpipe.stages.loss.head import Head, Side
from kdpipe.stages.loss.memory import keep_heap, release_scratch, scratch, zeros
from kdpipe.stages.loss.problem import IGNORED, DistillLoss, Problem, pose, side


def fused_distill_loss(
    student_hidden: Tensor,
    student_head: Tensor,
    teacher_hidden: Tensor | None,
    teacher_head: Tensor | None,
    labels: Tensor | None = None,
    *,
    divergence: str = "forward_kl",
    temperature: float = 1.0,
    kd_weight: float = 1.0,
    chunk_tokens: int | None = None,
    vocab_size: int | None = None,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
    student_scale: float = 1.0,
    teacher_scale: float = 1.0,
    scale_t2: bool = False,
    token_weights: Tensor | None = None,
    **options: float,
) -> DistillLoss:
    """Sums over T tokens of divergence (kd), cross-entropy (ce) and kd_weight * kd + (1 - kd_weight) * ce (loss).

    student_hidden [T, D], student_head [rows, D], teacher_hidden [T, E], teacher_head [rows', E], labels [T] with -100
    for a token without ce. Logits are those of head.Head; the divergence is taken at logits / temperature of both, the
    cross-entropy at temperature 1. Both heads are cut to vocab_size rows, by default those of the smaller head.
    kd and ce are fp32 and detached; loss has gradients to student_hidden, student_head and student_bias. ce is
    reported whenever labels are given. With kd_weight 0 no teacher is needed and kd is 0.
    options are those of DIVERGENCES[divergence]; scale_t2 multiplies kd by temperature squared. token_weights [T]
    multiply each token's kd and ce.
    ConfigError where sizes, dtypes or options do not fit. Dense definition: reference.reference_distill_loss.
    """
    problem = pose(
        Side(student_hidden, Head(student_head, student_bias, student_softcap, student_scale)),
        side(teacher_hidden, teacher_head, teacher_bias, teacher_softcap, teacher_scale),
        labels,
        divergence=divergence,
        options=options,
        temperature=temperature,
        kd_weight=kd_weight,
        vocab_size=vocab_size,
        scale_t2=scale_t2,
        token_weights=token_weights,
    )
    if chunk_tokens is not None and chunk_tokens < 1:
        raise ConfigError(f"chunk_tokens must be at least 1, got {chunk_tokens}; None chooses", where="loss")
    loss, kd, ce = _Fused.apply(
        student_hidden, student_head, student_bias, problem, chunk_tokens, torch.is_grad_enabled()
    )
    return DistillLoss(kd=kd, ce=ce, loss=loss)


class _Fused(torch.autograd.Function):
    """Gradients are made in forward and scaled in backward; kd and ce are for reading only."""

    @staticmethod
    def forward(
        ctx: Any,
        student_hidden: Tensor,
        student_head: Tensor,
        student_bias: Tensor | None,
        problem: Problem,
        chunk_tokens: int | None,
        differentiate: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        # Under no_grad the inputs still say requires_grad, hence the extra argument.
        wants = [differentiate and needed for needed in ctx.needs_input_grad[:3]]
        gradients = StudentGradients(problem, chunk_tokens, hidden=wants[0], weight=wants[1], bias=wants[2])
        kd, ce = _run(problem, gradients)
        ctx.save_for_backward(*gradients.finish())
        bias_dtype = torch.float32 if student_bias is None else student_bias.dtype
        ctx.dtypes = (student_hidden.dtype, student_head.dtype, bias_dtype)
        ctx.mark_non_differentiable(kd, ce)
        return problem.kd_weight * kd + (1.0 - problem.kd_weight) * ce, kd, ce

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        # In place unless the graph may be walked again (retain_graph); autograd takes over what is returned.
        again = torch._C._autograd._get_current_graph_task_keep_graph()

        def scaled(grad: Tensor | None, dtype: torch.dtype) -> Tensor | None:
            if grad is None:
                return None
            if grad.dtype == dtype and not again:
                return grad.mul_(grad_loss)
            return torch.mul(grad, grad_loss, out=zeros(grad.shape, like=grad, dtype=dtype))

        found = (scaled(grad, dtype) for grad, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True))
        return *found, None, None, None


def _run(problem: Problem, gradients: StudentGradients) -> tuple[Tensor, Tensor]:
    """Sums of kd and ce over all chunks; leaves the gradients in `gradients`."""
    hidden, size = problem.student.hidden, min(gradients.chunk_tokens, problem.num_tokens)
    compiled = pays_to_compile(problem)
    if hidden.device.type == "cpu":
        keep_heap()
    formula = Formula.of(problem, differentiate=gradients.wanted, wants_bias=gradients.wants_bias)
    step = block_step(formula, compiled=compiled)
    # Every block has the same shape, so that one compilation does: rows beyond the last token are computed, not used.
    num_rows = max(1, min(rows_per_block(problem.vocab_size, hidden.device, compiled=compiled), size))
    size = -(-size // num_rows) * num_rows
    shape = (size, problem.vocab_size)
    kd = torch.zeros(problem.num_tokens + num_rows, dtype=torch.float32, device=hidden.device)
    ce = torch.zeros_like(kd)
    labels = None if problem.labels is None else padded(problem.labels, num_rows, IGNORED)
    weights = problem.weights
    if weights is None and gradients.wants_bias:
        weights = torch.ones(problem.num_tokens, dtype=torch.float32, device=hidden.device)
    if weights is not None:
        weights = padded(weights, num_rows, 0.0)
    # The student's buffer holds raw logits and then, block by block, the gradient with respect to them.
    student_buffer = scratch("student", shape, like=hidden)
    teacher_buffer = None if problem.teacher is None else scratch("teacher", shape, like=problem.teacher.hidden)
    biases = problem.student.head.bias, None if problem.teacher is None else problem.teacher.head.bias
    for start in range(0, problem.num_tokens, max(size, 1)):
        stop = min(start + size, problem.num_tokens)
        problem.student.raw_logits(start, stop, student_buffer)
        if problem.teacher is not None and teacher_buffer is not None:
            problem.teacher.raw_logits(start, stop, teacher_buffer)
            teacher_buffer[stop - start :].zero_()
        student_buffer[stop - start :].zero_()
        for first in range(0, stop - start, num_rows):
            rows, tokens = slice(first, first + num_rows), slice(start + first, start + first + num_rows)
            block = step(
                student_buffer[rows],
                None if teacher_buffer is None else teacher_buffer[rows],
                None if labels is None else labels[tokens],
                None if weights is None else weights[tokens],
                *biases,
            )
            kd[tokens], ce[tokens] = block.kd, block.ce
            gradients.add_bias(block.bias)
        gradients.add_chunk(start, student_buffer[: stop - start])
    if size < problem.num_tokens:
        release_scratch()  # the sum of the head's gradient needs the room in backward, and the chunks have paid for it
    return kd[: problem.num_tokens].sum(), ce[: problem.num_tokens].sum()


def padded(values: Tensor, count: int, fill: float) -> Tensor:
    """`values` [T] and `count` more of `fill`."""
    return torch.cat([values, values.new_full((count,), fill)])
