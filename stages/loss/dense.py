"""Dense formulas: the definition of every divergence, slow and obvious, in the dtype it is given.

A formula takes log-probabilities of teacher and student [T, V], already divided by the temperature and normalised,
and returns one value a token [T]. Autograd differentiates it; the fused twin is in pointwise.py.
"""

import math

import torch
from torch import Tensor


def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) = sum p (log p - log q) for each token [T]."""
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def forward_kl(log_p_teacher: Tensor, log_p_student: Tensor) -> Tensor:
    return kl(log_p_teacher, log_p_student)


def reverse_kl(log_p_teacher: Tensor, log_p_student: Tensor) -> Tensor:
    return kl(log_p_student, log_p_teacher)


def jsd(log_p_teacher: Tensor, log_p_student: Tensor, *, beta: float) -> Tensor:
    """beta KL(T || M) + (1 - beta) KL(S || M) with M = (1 - beta) S + beta T; at its ends, where that is 0, a KL."""
    if beta == 0.0:
        return forward_kl(log_p_teacher, log_p_student)
    if beta == 1.0:
        return reverse_kl(log_p_teacher, log_p_student)
    log_m = torch.logaddexp(log_p_student + math.log1p(-beta), log_p_teacher + math.log(beta))
    return beta * kl(log_p_teacher, log_m) + (1.0 - beta) * kl(log_p_student, log_m)
