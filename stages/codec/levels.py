"""Levels: how many values of q a component is given room for, and from which on; those beyond are exceptions.

A component of n levels takes log2(n) bits, and an exception EXCEPTION_BITS; of all runs of levels that leave out so
many of the smallest and so many of the largest q, each component takes the one that costs least.
"""

# Shapes: N rows, E components.

from dataclasses import dataclass

import torch
from torch import Tensor

from kdpipe.manifests.fisher import EXCEPTION_BYTES
from kdpipe.manifests.radix import MOST_LEVELS

EXCEPTION_BITS = 8 * EXCEPTION_BYTES
MOST_OUTSIDE = 0.06
"""Share of a component's q that may be left out at either end."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Levels:
    """Of every component the lowest q and how many there is room for, int64 [E]; bits of a row, exceptions counted."""

    lowest: Tensor
    count: Tensor
    bits: float


def levels_of(z: Tensor, step: float) -> Levels:
    """The levels that cost least at a step; z: float64 [N, E], each column rising."""
    q = (z / step).round_()
    tails = _tails(len(q))
    low, high = q[tails], q[len(q) - 1 - tails]  # [t, E] each: what is left when so many are left out
    spans = (high[:, None] - low[None] + 1).clamp(1, MOST_LEVELS)
    cost = spans.log2() + EXCEPTION_BITS / len(q) * (tails[:, None] + tails[None])[..., None]
    best, which = cost.flatten(0, 1).min(0)
    columns = torch.arange(q.shape[1], device=q.device)
    lowest = low[which % len(tails), columns]
    count = spans.flatten(0, 1)[which, columns]
    return Levels(lowest=lowest.long(), count=count.long(), bits=float(best.sum()))


def _tails(num_rows: int) -> Tensor:
    """Numbers of q to leave out at one end: 0 to MOST_OUTSIDE of them, ever further apart."""
    most = max(int(num_rows * MOST_OUTSIDE), 0)
    found, at = [], 0
    while at <= most:
        found.append(at)
        at = max(at + 1, int(at * 1.25))
    return torch.tensor(found)
