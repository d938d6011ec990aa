"""Pairs: distances between a row over the student's vocabulary and a row over the teacher's.

`SharedPair` is any divergence over the tokens that both have, `SamePair` one over one vocabulary, `HybridPair` compares
shared tokens one by one and the others by rank. Each gives the gradient of the student's finished logits. S and T are
softmax(logits / temperature) over the whole vocabulary of each.
"""

# Shapes: R rows in a block, V student's vocabulary, U teacher's vocabulary, S shared tokens, N tokens not shared.

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kdpipe.stages.loss.cross.rows import Distance, Rows
from kdpipe.stages.loss.divergences import find
from kdpipe.stages.loss.pointwise import TINY, Distributions, normalised


@dataclass(frozen=True, kw_only=True, slots=True)
class SharedPair:
    """A divergence over the tokens both have, each model's distribution over them renormalised.

    tables: student_ids and teacher_ids int64 [S], places int64 [V] of `places_of`
    """

    divergence: str
    options: tuple[tuple[str, float], ...]
    temperature: float

    @property
    def compiles(self) -> bool:
        return True

    def __call__(self, student: Tensor, teacher: Tensor, rows: Rows, tables: tuple[Tensor, ...]) -> Distance:
        student_ids, teacher_ids, places = tables
        found = distance(self, student.index_select(1, student_ids), teacher.index_select(1, teacher_ids), rows)
        return found._replace(gradient=spread(found.gradient, places))


@dataclass(frozen=True, kw_only=True, slots=True)
class SamePair:
    """A divergence over one vocabulary; only_right: of rows whose teacher likes the row's own token best, else 0."""

    divergence: str
    options: tuple[tuple[str, float], ...]
    temperature: float
    only_right: bool

    @property
    def compiles(self) -> bool:
        return True

    def __call__(self, student: Tensor, teacher: Tensor, rows: Rows, tables: tuple[Tensor, ...]) -> Distance:
        found = distance(self, student, teacher, rows)
        if not self.only_right or rows.tokens is None:
            return found
        right = (teacher.gather(1, rows.tokens[:, None]) == teacher.amax(-1, keepdim=True)).float()
        return found._replace(value=found.value * right[:, 0], gradient=found.gradient * right)


def distance(pair: SharedPair | SamePair, student: Tensor, teacher: Tensor, rows: Rows) -> Distance:
    """The pair's divergence of logits over one vocabulary [R, S]."""
    log_s, p_s, _ = normalised(student / pair.temperature)
    log_t, p_t, _ = normalised(teacher / pair.temperature)
    both = Distributions(log_t, p_t, log_s, p_s, rows.draws)
    value, gradient = find(pair.divergence).value_and_grad(both, **dict(pair.options))
    return Distance(value, gradient / pair.temperature, -(p_t * log_t).sum(-1))


def places_of(ids: Tensor, size: int) -> Tensor:
    """Where in `ids` [S] each of `size` entries is; S for those that are not."""
    places = torch.full((size,), len(ids), dtype=torch.int64, device=ids.device)
    return places.index_copy_(0, ids, torch.arange(len(ids), device=ids.device))


def spread(values: Tensor, places: Tensor) -> Tensor:
    """Values [R, S] at their entries of [R, V], 0 elsewhere; a gather, which compiles into one pass."""
    return torch.cat([values, torch.zeros_like(values[:, :1])], 1).index_select(1, places)


@dataclass(frozen=True, kw_only=True, slots=True)
class HybridPair:
    """matched * D over matched tokens + unmatched * sum of |q - t| over the others, each side sorted, the shorter
    one padded with zeros. q = c S and t = d T, log c and log d of `Rows`, 0 where they are not given.

    D = beta sum t log(t / m) + (1 - beta) sum q log(q / m), m = beta t + (1 - beta) q; beta = 0: sum t log(t / q),
    beta = 1: sum q log(q / t): Jensen-Shannon and the two KL of distributions that need not sum to 1.
    tables: student_ids, teacher_ids int64 [S]; other_student, other_teacher int64 [N] each; places int64 [V] in the
    row of the first and the third
    """

    beta: float
    matched: float
    unmatched: float
    temperature: float

    @property
    def compiles(self) -> bool:
        return False  # sorting is not for torch.compile

    def __call__(self, student: Tensor, teacher: Tensor, rows: Rows, tables: tuple[Tensor, ...]) -> Distance:
        student_ids, teacher_ids, other_student, other_teacher, places = tables
        log_s, p_s, _ = normalised(student / self.temperature)
        log_t, p_t, _ = normalised(teacher / self.temperature)
        entropy = -(p_t * log_t).sum(-1)
        log_q = log_s if rows.log_student is None else log_s + rows.log_student[:, None]
        log_t = log_t if rows.log_teacher is None else log_t + rows.log_teacher[:, None]
        value, pulled = matched_distance(
            log_q.index_select(1, student_ids), log_t.index_select(1, teacher_ids), self.beta
        )
        ranked, by_rank = ranked_distance(
            log_q.index_select(1, other_student).exp_(), log_t.index_select(1, other_teacher).exp_()
        )
        value = self.matched * value + self.unmatched * ranked
        # q df/dq of every token: what the softmax takes, and what a factor of q as a whole takes.
        pulled = torch.cat([self.matched * pulled, self.unmatched * by_rank], 1).index_select(1, places)
        pull = pulled.sum(-1)
        return Distance(value, (pulled - p_s * pull[:, None]) / self.temperature, entropy, pull)


def matched_distance(log_q: Tensor, log_t: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """D of HybridPair [R], and q dD/dq [R, S]."""
    q, t = log_q.exp(), log_t.exp()
    if beta == 0.0:
        return (t * (log_t - log_q)).sum(-1), -t
    if beta == 1.0:
        pulled = q * (log_q - log_t)
        return pulled.sum(-1), pulled + q
    log_m = torch.lerp(q, t, beta).clamp_min(TINY).log()
    pulled = (1.0 - beta) * q * (log_q - log_m)
    return (beta * t * (log_t - log_m)).sum(-1) + pulled.sum(-1), pulled


def ranked_distance(q: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of |q - t| of two rows [R, N], [R, M] sorted and padded with zeros [R], and q times its slope [R, N]."""
    order, rising = ordered(q)
    missing = q.shape[1] - t.shape[1]
    of_teacher = in_order(t)
    # Both rise: what the shorter row lacks are zeros in front.
    apart = (
        rising - torch.nn.functional.pad(of_teacher, (missing, 0))
        if missing >= 0
        else rising - of_teacher[:, -missing:]
    )
    value = apart.abs().sum(-1)
    if missing < 0:
        value = value + of_teacher[:, :-missing].sum(-1)
    return value, torch.zeros_like(q).scatter_(1, order, rising * apart.sign())


def ordered(values: Tensor) -> tuple[Tensor, Tensor]:
    """Places of rising values [R, N], and the values; none is below 0."""
    if values.device.type != "cpu":
        rising, order = values.sort(dim=-1)
        return order, rising
    # numpy's vectorised sort of one key for value and place is several times as fast as torch's on a CPU; floats from
    # 0 on are in the order of their bits.
    keys = (values.view(torch.int32).long() << 32) + torch.arange(values.shape[1])
    sorted_keys = torch.from_numpy(np.sort(keys.numpy(), axis=-1))
    return sorted_keys & 0xFFFFFFFF, (sorted_keys >> 32).int().view(torch.float32)


def in_order(values: Tensor) -> Tensor:
    """The values [R, N], rising in each row."""
    if values.device.type != "cpu":
        return values.sort(dim=-1).values
    return torch.from_numpy(np.sort(values.numpy(), axis=-1))
