"""Metric: what an error of a row does to the teacher's distribution: the head's Fisher information, and the KL itself.

For a small error d of a row h, KL(T(h) || T(h + d)) = d' G d / 2 with G = J' (diag(p) - p p') J and J the derivative of
the finished logits: the head's weight, times its scale and the slope of its softcap.
Invariant: only the tokenizer's own part of the vocabulary counts; sums are float64. Cost: two products of the head for
each row of the metric, and one [E, V] x [V, E].
"""

# Shapes: R rows, E teacher width, V vocabulary.

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from kdpipe.stages.models.head import Finish, Head

LOGITS_AT_ONCE = 1 << 24
"""fp32 numbers of one block of logits: 64 MiB."""
ENTRIES_AT_ONCE = 4096
"""Entries of the vocabulary whose weights are float64 at a time."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Lens:
    """A teacher's head as a metric needs it: float32, cut to the vocabulary, on one device."""

    weight: Tensor
    bias: Tensor | None
    finish: Finish

    @classmethod
    def of(cls, head: Head, vocab_size: int, device: torch.device) -> "Lens":
        bias = None if head.bias is None else head.bias[:vocab_size].float().to(device)
        return cls(weight=head.weight[:vocab_size].to(device).float(), bias=bias, finish=head.finish)

    def logits(self, rows: Tensor) -> Tensor:
        """Finished logits [R, V] of float32 rows [R, E]."""
        return self.finish.apply(rows @ self.weight.T, self.bias)

    def blocks(self, num_rows: int) -> Iterator[slice]:
        """So many rows, a block of logits at a time."""
        size = max(1, LOGITS_AT_ONCE // len(self.weight))
        return (slice(first, first + size) for first in range(0, num_rows, size))

    def information(self, rows: Tensor) -> Tensor:
        """G, float64 [E, E]: the mean Fisher information of rows [R, E]."""
        mass = torch.zeros(len(self.weight), dtype=torch.float64, device=rows.device)
        means = torch.zeros(rows.shape[1], rows.shape[1], dtype=torch.float64, device=rows.device)
        for block in self.blocks(len(rows)):
            logits = self.logits(rows[block])
            slope = self.finish.slope(logits, torch.ones_like(logits))
            weighted = logits.softmax(-1) * slope
            mass += (weighted * slope).sum(0, dtype=torch.float64)
            mean = (weighted @ self.weight).double()
            means += mean.T @ mean
        total = -means
        for first in range(0, len(self.weight), ENTRIES_AT_ONCE):
            some = self.weight[first : first + ENTRIES_AT_ONCE].double()
            total += (some.T * mass[first : first + ENTRIES_AT_ONCE]) @ some
        return total / len(rows)

    def compare(self, exact: Tensor, stored: Tensor) -> "Divergences":
        """What is lost of exact rows [R, E] where others are stored in their place."""
        found = [self._compare(exact[block], stored[block]) for block in self.blocks(len(exact))]
        return Divergences(kl=torch.cat([kl for kl, _ in found]), same_top=torch.cat([same for _, same in found]))

    def _compare(self, exact: Tensor, stored: Tensor) -> tuple[Tensor, Tensor]:
        wanted, got = (self.logits(rows).log_softmax(-1) for rows in (exact, stored))
        return divergence(wanted, got), wanted.argmax(-1) == got.argmax(-1)


def divergence(exact: Tensor, stored: Tensor) -> Tensor:
    """KL(exact || stored) in nats of log-probabilities [R, V], float64 [R]."""
    return (exact.exp() * (exact - stored)).sum(-1, dtype=torch.float64).clamp_min(0.0)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Divergences:
    """Of each row KL(exact || stored) in nats, float64 [R], and whether the likeliest token is the same, bool [R]."""

    kl: Tensor
    same_top: Tensor

    @property
    def mean(self) -> float:
        return float(self.kl.mean())
