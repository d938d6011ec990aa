"""The reference loss: dense logits of both models, autograd for the gradients.

It is the definition that fused.py is tested against: fp64 inputs are computed in fp64, everything else in fp32.
Cost: several [T, V] arrays of each model.
"""

# Shapes: T tokens, V shared vocabulary, D student width, E teacher width.

import torch
from torch import Tensor

from kdpipe.stages.loss.head import Head, Side
from kdpipe.stages.loss.problem import IGNORED, DistillLoss, Problem, pose, side


def reference_distill_loss(
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
    """The same record as `fused_distill_loss` from the same arguments; chunk_tokens cannot matter and is not used."""
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
    logits = dense_logits(problem.student, problem.vocab_size)
    kd = distillation(problem, logits)
    ce = cross_entropy(problem, logits)
    return DistillLoss(kd=kd.detach(), ce=ce.detach(), loss=kd_weight * kd + (1.0 - kd_weight) * ce)


def dense_logits(side: Side, vocab_size: int) -> Tensor:
    """Logits [T, V] in fp32, or in fp64 where the hidden states are fp64."""
    dtype = torch.promote_types(side.hidden.dtype, torch.float32)
    bias = None if side.head.bias is None else side.head.bias.to(dtype)
    head = Head(side.head.weight.to(dtype), bias, side.head.softcap, side.head.scale)
    return head.logits(side.hidden.to(dtype), vocab_size)


def distillation(problem: Problem, student_logits: Tensor) -> Tensor:
    """Sum over tokens of the divergence at the temperature; 0 where kd_weight is 0."""
    if problem.teacher is None:
        return student_logits.new_zeros(())
    with torch.no_grad():
        teacher_logits = dense_logits(problem.teacher, problem.vocab_size)
    log_p_teacher = torch.log_softmax(teacher_logits / problem.temperature, -1)
    log_p_student = torch.log_softmax(student_logits / problem.temperature, -1)
    values = problem.divergence.reference(log_p_teacher, log_p_student, **problem.options)
    return weighted_sum(problem, values) * problem.kd_scale


def cross_entropy(problem: Problem, student_logits: Tensor) -> Tensor:
    """Sum over the labelled tokens of -log S[label] at temperature 1; 0 without labels."""
    if problem.labels is None:
        return student_logits.new_zeros(())
    values = torch.nn.functional.cross_entropy(student_logits, problem.labels, ignore_index=IGNORED, reduction="none")
    return weighted_sum(problem, values)


def weighted_sum(problem: Problem, values: Tensor) -> Tensor:
    """Sum of values [T], each times its token's weight."""
    return values.sum() if problem.weights is None else (values * problem.weights).sum()
