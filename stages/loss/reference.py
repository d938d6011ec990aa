"""The reference loss: dense logits of both models, autograd for the gradients.

It is the definition that fused.py is tested against: fp64 inputs are computed in fp64, everything else in fp32.
Cost: several [T, V] arrays of each model.
"""

# Shapes: T tokens, V shared vocabulary, D student width, E teacher width.

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kdpipe.manifests.sample import IGNORED
from kdpipe.stages.loss.problem import RANKED_EVERY, TOP_K, DistillLoss, Metrics, Problem, pose_tensors


def reference_distill_loss(
    student_hidden: Tensor,
    student_head: Tensor,
    teacher_hidden: Tensor | Sequence[Tensor] | None,
    teacher_head: Tensor | Sequence[Tensor] | None,
    labels: Tensor | None = None,
    *,
    chunk_tokens: int | None = None,
    head_grad_fp32: bool = True,
    **arguments: Any,
) -> DistillLoss:
    """The same record as `fused_distill_loss` from the same arguments; chunks and their sum's dtype cannot matter."""
    problem = pose_tensors(student_hidden, student_head, teacher_hidden, teacher_head, labels, **arguments)
    with torch.no_grad():
        teachers_logits = [teacher.dense(problem.vocab_size) for teacher in problem.teachers]
    return loss_of_logits(problem, problem.student.dense(problem.vocab_size), teachers_logits)


def loss_of_logits(problem: Problem, student_logits: Tensor, teachers_logits: Sequence[Tensor]) -> DistillLoss:
    """The loss of logits [T, V] of all models, finished but not divided by the temperature."""
    z = weighted_sum(problem, student_logits.logsumexp(-1).square())
    ce = cross_entropy(problem, student_logits)
    kd = nothing = student_logits.new_zeros(())
    metrics = Metrics(teacher_entropy=nothing, top1_agree=nothing, top_k_mass=nothing, num_taught=0, num_ranked=0)
    if teachers_logits:
        log_p_teachers = [torch.log_softmax(logits / problem.temperature, -1) for logits in teachers_logits]
        log_p_student = torch.log_softmax(student_logits / problem.temperature, -1)
        average = mixture(log_p_teachers, problem.teacher_weights)
        if problem.teacher_mix == "distributions":
            log_p_teachers = [average]
        each = [distillation(problem, log_p_teacher, log_p_student) for log_p_teacher in log_p_teachers]
        kd = weighted(each, problem.teacher_weights)
        if problem.offset is not None:
            kd = kd + problem.offsets().sum()
        if problem.is_ranked:
            entropies = [-(log_p.exp() * log_p).sum() for log_p in log_p_teachers]
            metrics = measured(average, log_p_student.detach(), weighted(entropies, problem.teacher_weights))
    return DistillLoss(kd=kd.detach(), ce=ce.detach(), z=z.detach(), loss=problem.total(kd, ce, z), metrics=metrics)


def mixture(log_p_teachers: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """log(sum of w_k T_k) [T, V]; the one teacher's own where there is one."""
    if len(log_p_teachers) == 1:
        return log_p_teachers[0]
    logs = [log_p + math.log(weight) for log_p, weight in zip(log_p_teachers, weights, strict=True)]
    return torch.stack(logs).logsumexp(0)


def weighted(values: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Sum of w_k times the k-th value; the value itself where there is one."""
    if len(values) == 1:
        return values[0]
    return torch.stack([weight * value for weight, value in zip(weights, values, strict=True)]).sum(0)


def distillation(problem: Problem, log_p_teacher: Tensor, log_p_student: Tensor) -> Tensor:
    """Sum over tokens of the divergence at the temperature."""
    options: dict[str, Any] = dict(problem.options)
    if problem.draws is not None:
        options["draws"] = problem.draws
    values = problem.divergence.reference(log_p_teacher, log_p_student, **options)
    return weighted_sum(problem, values) * problem.kd_scale


def cross_entropy(problem: Problem, student_logits: Tensor) -> Tensor:
    """Sum over the labelled tokens of (1 - e) * -log S[label] + e * mean of -log S, e = label_smoothing.

    At temperature 1; 0 without labels. Szegedy et al. 2015, arXiv 1512.00567, as in torch.nn.functional.cross_entropy.
    """
    if problem.labels is None:
        return student_logits.new_zeros(())
    values = torch.nn.functional.cross_entropy(
        student_logits,
        problem.labels,
        ignore_index=IGNORED,
        reduction="none",
        label_smoothing=problem.label_smoothing,
    )
    return weighted_sum(problem, values)


def measured(log_p_teacher: Tensor, log_p_student: Tensor, teacher_entropy: Tensor) -> Metrics:
    """The metrics of rows [T, V]."""
    log_t, log_s = log_p_teacher[::RANKED_EVERY], log_p_student[::RANKED_EVERY]
    places = log_t.topk(min(TOP_K, log_t.shape[1]), dim=-1).indices
    return Metrics(
        teacher_entropy=teacher_entropy,
        top1_agree=(log_s.gather(-1, places[:, :1]) == log_s.amax(-1, keepdim=True)).sum(dtype=log_s.dtype),
        top_k_mass=log_s.gather(-1, places).exp().sum(),
        num_taught=len(log_p_teacher),
        num_ranked=len(log_t),
    )


def weighted_sum(problem: Problem, values: Tensor) -> Tensor:
    """Sum of values [T], each times its token's weight."""
    return values.sum() if problem.weights is None else (values * problem.weights).sum()
