"""Dense formulas: the definition of every divergence, slow and obvious, in the dtype it is given.

A formula takes log-probabilities of teacher and student [T, V], already divided by the temperature and normalised,
and returns one value a token [T]. Autograd differentiates it; the fused twin is in pointwise.py. T stands for the
teacher's distribution, S for the student's; each formula is given where divergences.py lists it, with its source.
"""

# Shapes: T tokens, V vocabulary, K entries chosen of a row.

import math

import torch
from torch import Tensor


def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) = sum p (log p - log q) for each token [T]."""
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def log_mixture(log_p: Tensor, log_q: Tensor, share: float) -> Tensor:
    """log(share p + (1 - share) q), share within 0..1."""
    return torch.logaddexp(log_p + math.log(share), log_q + math.log1p(-share))


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
    log_m = log_mixture(log_p_teacher, log_p_student, beta)
    return beta * kl(log_p_teacher, log_m) + (1.0 - beta) * kl(log_p_student, log_m)


def skew_kl(log_p_teacher: Tensor, log_p_student: Tensor, *, alpha: float) -> Tensor:
    return kl(log_p_teacher, log_mixture(log_p_teacher, log_p_student, alpha))


def skew_reverse_kl(log_p_teacher: Tensor, log_p_student: Tensor, *, alpha: float) -> Tensor:
    return kl(log_p_student, log_mixture(log_p_student, log_p_teacher, alpha))


def symmetric_kl(log_p_teacher: Tensor, log_p_student: Tensor, *, forward_share: float) -> Tensor:
    forward, reverse = forward_kl(log_p_teacher, log_p_student), reverse_kl(log_p_teacher, log_p_student)
    return forward_share * forward + (1.0 - forward_share) * reverse


def adaptive_kl(log_p_teacher: Tensor, log_p_student: Tensor, *, alpha: float) -> Tensor:
    """Head and tail are told apart by the teacher alone; equals are taken in the vocabulary's order."""
    teacher, student = log_p_teacher.exp(), log_p_student.exp().detach()
    ascending, order = teacher.sort(dim=-1, stable=True)
    gap = (ascending - student.gather(-1, order)).abs()
    tail = gap.where(ascending.cumsum(-1) <= alpha, 0.0).sum(-1)
    share = 1.0 - tail / gap.sum(-1).clamp_min(torch.finfo(gap.dtype).tiny)
    forward, reverse = forward_kl(log_p_teacher, log_p_student), reverse_kl(log_p_teacher, log_p_student)
    return share * forward + (1.0 - share) * reverse


def tvd(log_p_teacher: Tensor, log_p_student: Tensor) -> Tensor:
    return 0.5 * (log_p_teacher.exp() - log_p_student.exp()).abs().sum(-1)


def top1_ce(log_p_teacher: Tensor, log_p_student: Tensor) -> Tensor:
    log_p, place = log_p_teacher.max(-1, keepdim=True)
    return -(log_p.exp() * log_p_student.gather(-1, place)).squeeze(-1)


def alpha_beta(log_p_teacher: Tensor, log_p_student: Tensor, *, alpha: float, beta: float) -> Tensor:
    """With 0 for alpha, beta or both: the limit of the formula there."""
    if alpha == 0.0 and beta == 0.0:
        return 0.5 * (log_p_teacher - log_p_student).square().sum(-1)
    if beta == 0.0:
        teacher, student = (alpha * log_p_teacher).exp(), (alpha * log_p_student).exp()
        return (alpha * teacher * (log_p_teacher - log_p_student) - teacher + student).sum(-1) / alpha**2
    if alpha == 0.0:
        return alpha_beta(log_p_student, log_p_teacher, alpha=beta, beta=0.0)
    mixed = (alpha * log_p_teacher + beta * log_p_student).exp()
    teacher, student = (((alpha + beta) * each).exp() for each in (log_p_teacher, log_p_student))
    return (alpha * teacher + beta * student - (alpha + beta) * mixed).sum(-1) / (alpha * beta * (alpha + beta))


def top_k_kl(log_p_teacher: Tensor, log_p_student: Tensor, *, k: float) -> Tensor:
    return kl(*bucketed(log_p_teacher, log_p_student, int(k)))


def top_k_reverse_kl(log_p_teacher: Tensor, log_p_student: Tensor, *, k: float) -> Tensor:
    log_t, log_s = bucketed(log_p_teacher, log_p_student, int(k))
    return kl(log_s, log_t)


def bucketed(log_p_teacher: Tensor, log_p_student: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Both models over the teacher's K likeliest entries (of equals the first) and one bucket for the rest [T, K+1]."""
    order = log_p_teacher.sort(dim=-1, descending=True, stable=True).indices
    if k >= order.shape[-1]:
        return log_p_teacher, log_p_student

    def cut(log_p: Tensor) -> Tensor:
        ordered = log_p.gather(-1, order)
        return torch.cat([ordered[..., :k], ordered[..., k:].logsumexp(-1, keepdim=True)], -1)

    return cut(log_p_teacher), cut(log_p_student)


def soft_cross_entropy(log_p_teacher: Tensor, log_p_student: Tensor) -> Tensor:
    """-sum T log S = KL(T || S) + entropy of T: the same gradient as forward_kl, never 0."""
    return -(log_p_teacher.exp() * log_p_student).sum(-1)


def sampled_kl(log_p_teacher: Tensor, log_p_student: Tensor, *, samples: float, power: float, draws: Tensor) -> Tensor:
    """KL(T || S) of the sample's weights in T's place: mean over the sample of T / Q (log T - log S).

    The sample is drawn with replacement from Q ~ T^power by `draws` [T, K], uniform in (0, 1), through Q's cumulative
    sums. Its expectation over the draws is KL(T || S), that of its gradient KL's gradient; one value may be negative.
    """
    log_q = (power * log_p_teacher).log_softmax(-1)
    reach = log_q.exp().double().cumsum(-1)
    places = torch.searchsorted(reach, draws * reach[:, -1:], right=True)
    weights = (log_p_teacher - log_q).gather(-1, places).exp()
    return (weights * (log_p_teacher - log_p_student).gather(-1, places)).mean(-1)


def token_reverse_kl(log_p_teacher: Tensor, log_p_student: Tensor, *, draws: Tensor) -> Tensor:
    """log S[y] - log T[y] of tokens y, `draws` [T, 1], 0 where that is negative; d log S[y] is weighed by the value.

    With y drawn from S the expectation of value and gradient are those of reverse_kl (REINFORCE).
    """
    tokens = draws.clamp_min(0)
    learnt = log_p_student.gather(-1, tokens)
    apart = (learnt - log_p_teacher.gather(-1, tokens)).detach()
    return (apart * (1.0 + learnt - learnt.detach()) * (draws >= 0)).squeeze(-1)


def hierarchical_ranking(log_p_teacher: Tensor, log_p_student: Tensor, *, k: float) -> Tensor:
    """Hinge losses on the student's probabilities: the teacher's first against its others, its K against the student's.

    A pair of the second kind counts where the student's i-th probability exceeds the teacher's of the student's j-th.
    """
    teacher, student = log_p_teacher.exp(), log_p_student.exp()
    k = min(int(k), teacher.shape[-1])
    of_teacher, of_student = (p.sort(dim=-1, descending=True, stable=True).indices[..., :k] for p in (teacher, student))
    student_t, student_s = student.gather(-1, of_teacher), student.gather(-1, of_student)
    counts = student_s[..., :, None] > teacher.gather(-1, of_student)[..., None, :]
    first = (student_t - student_t[..., :1]).clamp_min(0.0).sum(-1)
    others = ((student_s[..., None, :] - student_t[..., :, None]) * counts).clamp_min(0.0)
    return first + others.sum((-1, -2))
