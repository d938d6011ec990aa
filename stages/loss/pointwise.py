"""Pointwise formulas: value and gradient of every divergence from two rows of logits, in fp32.

A formula takes `Distributions` and gives the values [R] and d value / d (student's temperature-scaled logits) [R, V].
For a value f of the student's probabilities p with g = df/dp the gradient is p * (g - sum p g), see `through_softmax`.
They are pure and of torch's operators, so that torch.compile makes one pass over a block; definitions are in dense.py.
Cost of a compiled formula, 1 EPYC core: 1.6 ns an element for forward_kl, both softmaxes included, 2.7 for jsd.
"""

# Shapes: R rows in a block, V vocabulary, K entries chosen of a row.

import math
from collections.abc import Callable, Sequence
from functools import cache, reduce
from typing import NamedTuple

import torch
from torch import Tensor

TINY = torch.finfo(torch.float32).tiny
BITS_OF_ONE = 30
"""That the float 1.0 takes as an integer; floats from 0 to 1 are in the order of these integers."""


class Distributions(NamedTuple):
    """Both distributions over one block of rows, [R, V] fp32 each.

    draws: what a sampled divergence draws with, uniform numbers [R, K] in fp64, or the token that one of given tokens
        looks at, int64 [R, 1], below 0 for none
    """

    log_p_teacher: Tensor
    p_teacher: Tensor
    log_p_student: Tensor
    p_student: Tensor
    draws: Tensor | None = None


Result = tuple[Tensor, Tensor]


def normalised(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """log_softmax(logits), softmax(logits) [R, V] and logsumexp(logits) [R]; exact for logits of 1e4 too."""
    largest = logits.amax(-1, keepdim=True)
    shifted = logits - largest
    raised = shifted.exp()
    total = raised.sum(-1, keepdim=True)
    log_total = total.log()
    return shifted - log_total, raised * total.reciprocal(), (largest + log_total).squeeze(-1)


def averaged(teachers: Sequence[tuple[Tensor, Tensor]], weights: Sequence[float]) -> tuple[Tensor, Tensor]:
    """log M and M [R, V] of M = sum of w_k T_k, from each teacher's log T_k and T_k.

    The logarithm is not that of M: where every T_k underflows to 0 it is finite still.
    """
    if len(teachers) == 1:
        return teachers[0]
    logs = [log_p + math.log(weight) for (log_p, _), weight in zip(teachers, weights, strict=True)]
    return reduce(torch.logaddexp, logs), sum_of([p for _, p in teachers], weights)


def sum_of(values: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """The sum of w_k times the k-th; itself where there is one."""
    if len(values) == 1:
        return values[0]
    return reduce(torch.add, [value * weight for value, weight in zip(values, weights, strict=True)])


def through_softmax(p: Tensor, slope: Tensor) -> Tensor:
    """The gradient of logits from df/dp."""
    weighted = p * slope
    return weighted - p * weighted.sum(-1, keepdim=True)


def forward_kl(both: Distributions) -> Result:
    value = (both.p_teacher * (both.log_p_teacher - both.log_p_student)).sum(-1)
    return value, both.p_student - both.p_teacher


def reverse_kl(both: Distributions) -> Result:
    apart = both.log_p_student - both.log_p_teacher
    value = (both.p_student * apart).sum(-1)
    return value, both.p_student * (apart - value[:, None])


def jsd(both: Distributions, *, beta: float) -> Result:
    """The terms of KL(T || M) cancel against dM."""
    if beta == 0.0:
        return forward_kl(both)
    if beta == 1.0:
        return reverse_kl(both)
    log_m = mixture(both, beta).log()
    teacher_to_m = (both.p_teacher * (both.log_p_teacher - log_m)).sum(-1)
    apart = both.log_p_student - log_m
    student_to_m = (both.p_student * apart).sum(-1)
    value = beta * teacher_to_m + (1.0 - beta) * student_to_m
    return value, (1.0 - beta) * both.p_student * (apart - student_to_m[:, None])


def skew_kl(both: Distributions, *, alpha: float) -> Result:
    ratio = both.p_teacher / mixture(both, alpha)
    value = (both.p_teacher * ratio.clamp_min(TINY).log()).sum(-1)
    return value, through_softmax(both.p_student, (alpha - 1.0) * ratio)


def skew_reverse_kl(both: Distributions, *, alpha: float) -> Result:
    """With r = S / M the slope is log r + 1 - alpha r; its constant part, which the softmax takes away, is left out."""
    m = mixture(both, 1.0 - alpha)
    ratio, excess = both.p_student / m, (1.0 - alpha) * (both.p_student - both.p_teacher) / m  # r and r - 1
    apart = torch.where(excess > -0.5, excess.log1p(), ratio.clamp_min(TINY).log())
    return (both.p_student * apart).sum(-1), through_softmax(both.p_student, apart - alpha * excess)


def mixture(both: Distributions, share: float) -> Tensor:
    """share T + (1 - share) S; where both underflow any number above 0 gives the right 0."""
    return torch.lerp(both.p_student, both.p_teacher, share).clamp_min(TINY)


def symmetric_kl(both: Distributions, *, forward_share: float) -> Result:
    forward, forward_gradient = forward_kl(both)
    reverse, reverse_gradient = reverse_kl(both)
    value = forward_share * forward + (1.0 - forward_share) * reverse
    return value, forward_share * forward_gradient + (1.0 - forward_share) * reverse_gradient


def adaptive_kl(both: Distributions, *, alpha: float) -> Result:
    """The weights are those of the definition, and constants to the gradient."""
    gap = (both.p_teacher - both.p_student).abs()
    tail = (gap * in_tail(both.p_teacher, alpha)).sum(-1)
    share = 1.0 - tail / gap.sum(-1).clamp_min(TINY)
    forward, forward_gradient = forward_kl(both)
    reverse, reverse_gradient = reverse_kl(both)
    value = share * forward + (1.0 - share) * reverse
    return value, share[:, None] * forward_gradient + (1.0 - share[:, None]) * reverse_gradient


def tvd(both: Distributions) -> Result:
    apart = both.p_student - both.p_teacher
    return 0.5 * apart.abs().sum(-1), through_softmax(both.p_student, 0.5 * apart.sign())


def top1_ce(both: Distributions) -> Result:
    largest, place = both.p_teacher.max(-1, keepdim=True)
    value = -(largest * both.log_p_student.gather(1, place)).squeeze(-1)
    return value, largest * (both.p_student - one_hot(place, both.p_student))


def alpha_beta(both: Distributions, *, alpha: float, beta: float) -> Result:
    """p * df/dp is worked out as one expression, without a division by a probability that may be 0."""
    log_t, log_s = both.log_p_teacher, both.log_p_student
    if alpha == 0.0 and beta == 0.0:
        pulled = log_s - log_t
        value = 0.5 * pulled.square().sum(-1)
    elif alpha == 0.0:
        student = (beta * log_s).exp()
        pulled = student * (log_s - log_t)
        value = (pulled / beta - (student - (beta * log_t).exp()) / beta**2).sum(-1)
    elif beta == 0.0:
        teacher, student = (alpha * log_t).exp(), (alpha * log_s).exp()
        pulled = (student - teacher) / alpha
        value = (teacher * (log_t - log_s) / alpha + pulled / alpha).sum(-1)
    else:
        # Of the larger probability's power, times what expm1 keeps of 1 less the ratio's: 0 where both are equal.
        total, apart = alpha + beta, log_s - log_t
        student_larger, distance = apart > 0.0, apart.abs()
        top = (total * torch.maximum(log_t, log_s)).exp()
        whole = (-total * distance).expm1()
        part = (-torch.where(student_larger, alpha, beta) * distance).expm1()
        value = (top * (torch.where(student_larger, alpha, beta) * whole - total * part)).sum(-1) / (
            alpha * beta * total
        )
        pulled = top * torch.where(student_larger, -part, (1.0 + part) * (-alpha * distance).expm1()) / alpha
    return value, pulled - both.p_student * pulled.sum(-1, keepdim=True)


def top_k_kl(both: Distributions, *, k: float) -> Result:
    if k >= both.p_teacher.shape[1]:
        return forward_kl(both)
    chosen = top(both.log_p_teacher, int(k))
    tail_t, tail_s = log_tail(both.log_p_teacher, chosen), log_tail(both.log_p_student, chosen)
    apart = both.log_p_teacher - both.log_p_student
    value = (both.p_teacher * apart).where(chosen, 0.0).sum(-1) + (tail_t.exp() * (tail_t - tail_s)).squeeze(-1)
    target = torch.where(chosen, both.p_teacher, (tail_t + (both.log_p_student - tail_s).clamp_max(0.0)).exp())
    return value, both.p_student - target


def top_k_reverse_kl(both: Distributions, *, k: float) -> Result:
    if k >= both.p_teacher.shape[1]:
        return reverse_kl(both)
    chosen = top(both.log_p_teacher, int(k))
    tails_apart = log_tail(both.log_p_student, chosen) - log_tail(both.log_p_teacher, chosen)
    apart = torch.where(chosen, both.log_p_student - both.log_p_teacher, tails_apart)
    value = (both.p_student * apart).sum(-1)
    return value, both.p_student * (apart - value[:, None])


def soft_cross_entropy(both: Distributions) -> Result:
    return -(both.p_teacher * both.log_p_student).sum(-1), both.p_student - both.p_teacher


def sampled_kl(both: Distributions, *, samples: float, power: float) -> Result:
    assert both.draws is not None
    proposal = both.p_teacher if power == 1.0 else (power * both.log_p_teacher).exp()
    places, total = drawn_places(proposal, both.draws)
    gaps = (both.log_p_teacher - both.log_p_student).gather(1, places)
    counted = torch.ones_like(gaps)
    if power != 1.0:
        counted = (both.p_teacher / proposal).gather(1, places) * total.float()
    target = torch.zeros_like(both.p_student).scatter_add(1, places, counted) / samples
    return (counted * gaps).mean(-1), counted.mean(-1, keepdim=True) * both.p_student - target


def drawn_places(proposal: Tensor, draws: Tensor) -> tuple[Tensor, Tensor]:
    """Places [R, K] drawn in proportion to [R, V] by uniform numbers [R, K], and the sum of a row, fp64 [R, 1]."""
    # fp64: in fp32 an entry of 2e-8 adds nothing to a sum near 1, and would never be drawn.
    reach = proposal.cumsum(-1, dtype=torch.float64)
    return torch.searchsorted(reach, draws * reach[:, -1:], right=True), reach[:, -1:]


def token_reverse_kl(both: Distributions) -> Result:
    assert both.draws is not None
    token = both.draws.clamp_min(0)
    apart = (both.log_p_student - both.log_p_teacher).gather(1, token) * (both.draws >= 0)
    return apart.squeeze(-1), apart * (one_hot(token, both.p_student) - both.p_student)


def hierarchical_ranking(both: Distributions, *, k: float) -> Result:
    places_t, places_s = (likeliest(p, min(int(k), p.shape[1])) for p in (both.p_teacher, both.p_student))
    student_t, student_s = both.p_student.gather(1, places_t), both.p_student.gather(1, places_s)
    teacher_s = both.p_teacher.gather(1, places_s)
    first = student_t - student_t[:, :1]
    others = (student_s[:, None, :] - student_t[:, :, None]) * (student_s[:, :, None] > teacher_s[:, None, :])
    value = first.clamp_min(0.0).sum(-1) + others.clamp_min(0.0).sum((-1, -2))
    above_first, above = (first > 0.0).float(), (others > 0.0).float()
    slope_t = above_first - above.sum(-1)
    slope_t = torch.cat([slope_t[:, :1] - above_first.sum(-1, keepdim=True), slope_t[:, 1:]], -1)
    slope = torch.zeros_like(both.p_student).scatter_add(1, places_t, slope_t)
    return value, through_softmax(both.p_student, slope.scatter_add(1, places_s, above.sum(-2)))


def one_hot(place: Tensor, like: Tensor) -> Tensor:
    """Whether an entry of [R, V] is the one at `place` [R, 1], as 0.0 and 1.0: cheaper than a scatter in one pass."""
    return (torch.arange(like.shape[1], device=like.device) == place).to(like.dtype)


def top(log_p: Tensor, k: int) -> Tensor:
    """The K likeliest entries of each row [R, V], of equals the first."""
    last = log_p.topk(k, dim=-1).values[:, -1:]
    above = log_p > last
    return above | first_of(log_p == last, k - above.sum(-1, keepdim=True))


def likeliest(p: Tensor, k: int) -> Tensor:
    """Places of the K likeliest entries of each row [R, K], falling; equals in the vocabulary's order."""
    # One key for value and place: topk's own choice among equals is any. Floats from 0 on are in their bits' order.
    rising = torch.arange(p.shape[1], 0, -1, device=p.device)
    return ((p.view(torch.int32).long() << 32) + rising).topk(k, dim=-1).indices


def log_tail(log_p: Tensor, chosen: Tensor) -> Tensor:
    """log of the mass outside of the chosen entries [R, 1]; not of 1 less theirs: next to nothing may be left."""
    return log_p.masked_fill(chosen, float("-inf")).logsumexp(-1, keepdim=True)


def in_tail(p: Tensor, alpha: float) -> Tensor:
    """Entries whose running sum in ascending order (of equals the first come first) is at most alpha; [R, V].

    Without a sort, which costs 17 times as much: up to the largest value that fits whole, then of the next value's
    entries, all alike, as many as still fit.
    """
    limit = tail_limit_compiled(p, alpha) if torch.compiler.is_compiling() else tail_limit(p, alpha)
    whole = p <= limit
    left = alpha - p.where(whole, 0.0).sum(-1, keepdim=True)
    following = torch.where(whole, 2.0, p).amin(-1, keepdim=True)
    return whole | first_of(p == following, (left / following).floor().long())


def tail_limit(p: Tensor, alpha: float) -> Tensor:
    """The largest x such that the entries up to x sum to at most alpha [R, 1]; two bits of the float in each pass."""
    low = torch.zeros_like(p[:, :1]).view(torch.int32)
    for shift in range(BITS_OF_ONE - 2, -1, -2):
        tried = [(low + (digit << shift)).view(torch.float32) for digit in (1, 2, 3)]
        fits = [torch.where(p <= limit, p, 0.0).sum(-1, keepdim=True) <= alpha for limit in tried]
        low = low + ((fits[0].int() + fits[1].int() + fits[2].int()) << shift)
    return low.view(torch.float32)


# An operator of its own within a compiled block: else the softmax is computed anew in every pass.
@torch.library.custom_op("kdpipe::tail_limit", mutates_args=())
def tail_limit_compiled(p: Tensor, alpha: float) -> Tensor:
    return compiled_tail_limit()(p, alpha)


@cache
def compiled_tail_limit() -> Callable[[Tensor, float], Tensor]:
    return torch.compile(tail_limit, fullgraph=True, dynamic=False)


@tail_limit_compiled.register_fake
def _(p: Tensor, alpha: float) -> Tensor:
    return torch.empty_like(p[:, :1])


def first_of(chosen: Tensor, count: Tensor) -> Tensor:
    """The first `count` [R, 1] of the chosen entries of each row [R, V]."""
    return chosen & (chosen.cumsum(-1, dtype=torch.int32) <= count)
