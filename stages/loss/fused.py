"""The fused loss: from hidden states and heads to loss and gradients, chunk by chunk.

The four matrix products (student logits, teacher logits, gradient of hidden, gradient of head) run on chunks of C
tokens in the inputs' dtype; each of several teachers has its own. What lies between them is pointwise in V and runs on
blocks of R rows small enough for the processor's cache, in fp32, whatever the inputs are (fp64 too: then only the
products are fp64), see blocks.py. The gradient is taken in the forward pass, loss_scale included; backward multiplies
it by the incoming scalar, one more rounding unless that is a power of two.
Invariant: the result does not depend on C or R beyond summation order; no value is read back from the device.
Cost over the inputs: a buffer [C, V] of each model in the inputs' dtype, which a CPU keeps; the gradients themselves;
an fp32 sum [V, D] of the head's gradient where there is more than one chunk of less than fp32. Gradients in the forward
pass are the idea of Liger Kernel, never holding all logits that of Cut Cross-Entropy. Measured by tools/bench/loss.py.
"""

# Shapes: T tokens, V shared vocabulary, D student width, E teacher width, C tokens per chunk, R rows per block.

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kdpipe.manifests.errors import ConfigError
from kdpipe.manifests.sample import IGNORED
from kdpipe.manifests.specs import TeacherMix
from kdpipe.stages.loss.blocks import VALUES, Formula, block_step
from kdpipe.stages.loss.gradients import StudentGradients
from kdpipe.stages.loss.head import Side
from kdpipe.stages.loss.layout import Layout, row_blocks
from kdpipe.stages.loss.memory import keep_heap, release_scratch, scratch, zeros
from kdpipe.stages.loss.pointwise import averaged, normalised
from kdpipe.stages.loss.problem import RANKED_EVERY, TOP_K, DistillLoss, Metrics, Problem, pose_tensors


def fused_distill_loss(
    student_hidden: Tensor,
    student_head: Tensor,
    teacher_hidden: Tensor | Sequence[Tensor] | None,
    teacher_head: Tensor | Sequence[Tensor] | None,
    labels: Tensor | None = None,
    *,
    divergence: str = "forward_kl",
    temperature: float = 1.0,
    kd_weight: float = 1.0,
    chunk_tokens: int | None = None,
    vocab_size: int | None = None,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | Sequence[Tensor | None] | None = None,
    student_softcap: float | None = None,
    teacher_softcap: float | Sequence[float | None] | None = None,
    student_scale: float = 1.0,
    teacher_scale: float | Sequence[float] = 1.0,
    teacher_mix: TeacherMix | None = None,
    teacher_weights: Sequence[float] = (),
    scale_t2: bool = False,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    loss_scale: Tensor | float = 1.0,
    token_weights: Tensor | None = None,
    token_keys: Tensor | None = None,
    next_tokens: Tensor | None = None,
    seed: int = 0,
    head_grad_fp32: bool = True,
    **options: float,
) -> DistillLoss:
    """Sums over T tokens of divergence (kd), cross-entropy (ce) and kd_weight * kd + (1 - kd_weight) * ce (loss).

    student_hidden [T, D], student_head [rows, D], teacher_hidden [T, E], teacher_head [rows', E], labels [T] with -100
    for a token without ce. Logits are those of head.Head; the divergence is taken at logits / temperature of both, the
    cross-entropy at temperature 1. Both heads are cut to vocab_size rows, by default those of the smaller head.
    kd and ce are fp32 and detached; loss has gradients to student_hidden, student_head and student_bias; the product of
    one that needs none is left out. ce is reported whenever labels are given. With kd_weight 0 no teacher is needed and
    kd is 0.
    options are those of DIVERGENCES[divergence]; scale_t2 multiplies kd by temperature squared. token_weights [T]
    multiply what a token adds. label_smoothing is that of the cross-entropy; z_loss adds z_loss * logsumexp(logits)^2
    of every token to the loss (PaLM, arXiv 2204.02311, with 1e-4).
    Several teachers are given as sequences: teacher_hidden and teacher_head have one entry each, and teacher_bias,
    teacher_softcap and teacher_scale too where they are sequences. teacher_mix "distributions" compares the student
    with sum w_k T_k, "losses" sums w_k times the divergence from T_k; w are teacher_weights over their sum, by default
    all equal.
    loss_scale multiplies the loss, not kd, ce and z; 1 / tokens there, not afterwards, saves the gradients a rounding.
    A sampled divergence draws by seed and token_keys [T] int64, by default each token's place: the same seed and key
    give the same draw in any batch. next_tokens [T] are the tokens that a divergence of given tokens looks at, by
    default labels; one below 0 adds nothing to it. head_grad_fp32 sums the head's gradient over chunks in fp32; without
    it the sum is in the head's own dtype, which saves an array [rows, D] and is as exact up to some 16 chunks.
    ConfigError where sizes, dtypes or options do not fit. Dense definition: reference.reference_distill_loss.
    """
    problem = pose_tensors(
        student_hidden,
        student_head,
        teacher_hidden,
        teacher_head,
        labels,
        divergence=divergence,
        temperature=temperature,
        kd_weight=kd_weight,
        vocab_size=vocab_size,
        student_bias=student_bias,
        teacher_bias=teacher_bias,
        student_softcap=student_softcap,
        teacher_softcap=teacher_softcap,
        student_scale=student_scale,
        teacher_scale=teacher_scale,
        teacher_mix=teacher_mix,
        teacher_weights=teacher_weights,
        scale_t2=scale_t2,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        loss_scale=loss_scale,
        token_weights=token_weights,
        token_keys=token_keys,
        next_tokens=next_tokens,
        seed=seed,
        **options,
    )
    return distill(problem, chunk_tokens=chunk_tokens, head_grad_fp32=head_grad_fp32)


def distill(problem: Problem, *, chunk_tokens: int | None = None, head_grad_fp32: bool = True) -> DistillLoss:
    """The sums of a posed problem, its gradients made on the way; arguments and result as in fused_distill_loss."""
    hidden, head = problem.student.hidden, problem.student.head
    if chunk_tokens is not None and not (type(chunk_tokens) is int and chunk_tokens >= 1):
        raise ConfigError(f"chunk_tokens must be a whole number from 1 on, got {chunk_tokens!r}", where="loss")
    if hidden.dtype == torch.float16 and torch.is_grad_enabled():
        raise ConfigError(
            "float16 loses small gradients before a scaler sees them; give the student's in bfloat16 or float32",
            where="student",
        )
    loss, sums, num_ranked = Fused.apply(
        *problem.student.tensors,
        problem,
        chunk_tokens,
        torch.promote_types(head.weight.dtype, torch.float32) if head_grad_fp32 else head.weight.dtype,
        torch.is_grad_enabled(),
    )
    kd, ce, z, entropy, agree, mass = sums
    num_taught, entropy = (problem.num_tokens, entropy) if problem.is_ranked else (0, torch.zeros_like(entropy))
    metrics = Metrics(
        teacher_entropy=entropy, top1_agree=agree, top_k_mass=mass, num_taught=num_taught, num_ranked=num_ranked
    )
    return DistillLoss(kd=kd, ce=ce, z=z, loss=loss, metrics=metrics)


INPUTS = 5
"""Side.tensors, with which the arguments of Fused begin."""


class Fused(torch.autograd.Function):
    """Gradients are made in forward and scaled in backward; the other sums are for reading only."""

    @staticmethod
    def forward(
        ctx: Any,
        student_hidden: Tensor,
        student_head: Tensor,
        student_bias: Tensor | None,
        low_rows: Tensor | None,
        low_up: Tensor | None,
        problem: Problem,
        chunk_tokens: int | None,
        sum_dtype: torch.dtype,
        differentiate: bool,
    ) -> tuple[Tensor, Tensor, int]:
        # Under no_grad the inputs still say requires_grad, hence the extra argument.
        wanted = [differentiate and needed for needed in ctx.needs_input_grad[:INPUTS]]
        layout = Layout.of(problem, chunk_tokens, sums_head=wanted[1] and sum_dtype != student_head.dtype)
        gradients = StudentGradients(problem, sum_dtype, one_chunk=layout.num_chunks == 1, wanted=wanted)
        sums, num_ranked = _run(problem, layout, gradients)
        ctx.save_for_backward(*gradients.finish())
        ctx.dtypes = dtypes_of(problem.student)
        ctx.mark_non_differentiable(sums)
        return problem.total(*sums[:3]), sums, num_ranked

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        # In place unless the graph may be walked again (retain_graph); autograd takes over what is returned.
        again = torch._C._autograd._get_current_graph_task_keep_graph()

        def scaled(grad: Tensor | None, dtype: torch.dtype) -> Tensor | None:
            if grad is None:
                return None
            if grad.dtype == dtype and not again:
                # On a CPU looking is free, and most often there is nothing to do.
                return grad if grad_loss.device.type == "cpu" and float(grad_loss) == 1.0 else grad.mul_(grad_loss)
            return torch.mul(grad, grad_loss, out=zeros(grad.shape, like=grad, dtype=dtype))

        found = (scaled(grad, dtype) for grad, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True))
        return *found, None, None, None, None


def dtypes_of(side: Side) -> tuple[torch.dtype, ...]:
    """Of the gradients to Side.tensors."""
    return tuple(torch.float32 if each is None else each.dtype for each in side.tensors)


def _run(problem: Problem, layout: Layout, gradients: StudentGradients) -> tuple[Tensor, int]:
    """Sums over all tokens of a block's VALUES and of what is ranked, [6], and how many tokens were ranked.

    Leaves the gradients in `gradients`.
    """
    hidden, rows_a_block = problem.student.hidden, layout.block_rows
    if hidden.device.type == "cpu":
        keep_heap()
    formula = Formula.of(problem, differentiate=gradients.wanted, wants_bias=gradients.wants_bias)
    teacher_dtypes = tuple(teacher.hidden.dtype for teacher in problem.teachers)
    given = (problem.labels is None, problem.weights is None, problem.draws is None)
    shape = (layout.block_rows, problem.vocab_size, hidden.dtype, teacher_dtypes, hidden.device, given)
    step = block_step(formula, shape if layout.compiled else None, compiled=layout.compiled)
    scale = torch.as_tensor(problem.loss_scale, dtype=torch.float32, device=hidden.device)
    # Rows beyond the last token are computed with the last block and not used.
    values = torch.zeros(len(VALUES), problem.num_tokens + rows_a_block, dtype=torch.float32, device=hidden.device)
    weights = problem.weights
    if weights is None and gradients.wants_bias:
        weights = torch.ones(problem.num_tokens, dtype=torch.float32, device=hidden.device)
    labels = None if problem.labels is None else padded(problem.labels, rows_a_block, IGNORED)
    weights = None if weights is None else padded(weights, rows_a_block, 0.0)
    fill = 0 if problem.divergence.of_token else 0.5
    draws = None if problem.draws is None else padded(problem.draws, rows_a_block, fill)
    # The student's buffer holds raw logits and then, block by block, the gradient with respect to them.
    whole = (layout.chunk_tokens, problem.vocab_size)
    student_buffer = scratch("student", whole, like=hidden)
    teacher_buffers = [
        scratch(f"teacher {number}", whole, like=teacher.hidden) for number, teacher in enumerate(problem.teachers)
    ]
    teacher_biases = tuple(teacher.head.bias for teacher in problem.teachers)
    ranks, num_ranked = torch.zeros(2, dtype=torch.float32, device=hidden.device), 0
    for chunk in row_blocks(problem.num_tokens, layout.chunk_tokens):
        size = chunk.stop - chunk.start
        problem.student.raw_logits(chunk.start, chunk.stop, student_buffer)
        student_buffer[size:].zero_()
        for teacher, buffer in zip(problem.teachers, teacher_buffers, strict=True):
            teacher.raw_logits(chunk.start, chunk.stop, buffer)
            buffer[size:].zero_()
        if problem.is_ranked:
            some = slice(-chunk.start % RANKED_EVERY, size, RANKED_EVERY)
            ranks += ranked(problem, student_buffer[some], [buffer[some] for buffer in teacher_buffers])
            num_ranked += len(student_buffer[some])
        for first in range(0, size, rows_a_block):
            rows = slice(first, first + rows_a_block)
            tokens = slice(chunk.start + rows.start, chunk.start + rows.stop)
            block = step(
                student_buffer[rows],
                tuple(buffer[rows] for buffer in teacher_buffers),
                None if labels is None else labels[tokens],
                None if weights is None else weights[tokens],
                None if draws is None else draws[tokens],
                problem.student.head.bias,
                teacher_biases,
                scale,
            )
            values[:, tokens] = block.values
            gradients.add_bias(block.bias)
        gradients.add_chunk(chunk.start, student_buffer[:size])
    if problem.offset is not None:
        values[0, : problem.num_tokens] += problem.offsets()
    if layout.num_chunks > 1:
        release_scratch()  # the sum of the head's gradient needs the room in backward, and the chunks have paid for it
    return torch.cat([values[:, : problem.num_tokens].sum(1), ranks]), num_ranked


def ranked(problem: Problem, student_raw: Tensor, teachers_raw: Sequence[Tensor]) -> Tensor:
    """Of rows [R, V]: how often the likeliest tokens agree, and the student's mass on the teacher's TOP_K, [2]."""
    if not len(student_raw):
        return torch.zeros(2, dtype=torch.float32, device=student_raw.device)
    student = problem.student.head
    logits = student.finish.apply(student_raw.float(), student.bias) / problem.temperature
    return agreement(logits, likings(problem, teachers_raw))


def agreement(student: Tensor, teacher: Tensor) -> Tensor:
    """As `ranked`, of the student's logits and of numbers in the order of the teacher's, both over one vocabulary."""
    places = teacher.topk(min(TOP_K, teacher.shape[1]), -1).indices
    mass = student.log_softmax(-1).gather(1, places).exp().sum()
    agree = student.gather(1, places[:, :1]) == student.amax(-1, keepdim=True)
    return torch.stack([agree.sum(dtype=torch.float32), mass])


def likings(problem: Problem, teachers_raw: Sequence[Tensor]) -> Tensor:
    """Numbers [R, V] in the order of the teacher's probabilities, or of the average of several teachers'."""
    heads = [teacher.head for teacher in problem.teachers]
    logits = [head.finish.apply(raw.float(), head.bias) for head, raw in zip(heads, teachers_raw, strict=True)]
    if len(logits) == 1:
        return logits[0]
    teachers = [normalised(each / problem.temperature)[:2] for each in logits]
    return averaged(teachers, problem.teacher_weights)[0]


def padded(values: Tensor, count: int, fill: float) -> Tensor:
    """`values` [T, ...] and `count` more of `fill`."""
    return torch.cat([values, values.new_full((count, *values.shape[1:]), fill)])
