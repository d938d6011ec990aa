"""Lengths: how many steps a run has, functions of its samples' lengths alone; without torch."""

from collections.abc import Sequence

import numpy as np


def num_steps(num_tokens: np.ndarray, batch_tokens: int) -> int:
    """Steps of an epoch: as few as keep the mean step within batch_tokens, and no more than there are samples."""
    return min(max(-(-int(num_tokens.sum()) // batch_tokens), 1), len(num_tokens))


def planned_steps(steps_per_epoch: int, *, epochs: float, max_steps: int | None) -> int:
    """Steps of a run: the smaller of its epochs' and max_steps."""
    wanted = max(round(steps_per_epoch * epochs), 1)
    return min(wanted, max_steps or wanted)


def quotas(num_supervised: Sequence[np.ndarray], weights: Sequence[float]) -> list[float]:
    """Supervised tokens that an epoch of a mixture takes of each source: its share of what all sources have.

    num_supervised: of the samples of each source; weights: one a source, whatever their sum
    """
    total = sum(int(each.sum()) for each in num_supervised)
    return [total * weight / sum(weights) for weight in weights]


def mixed_tokens(num_tokens: Sequence[np.ndarray], num_supervised: Sequence[np.ndarray], taken: Sequence[float]) -> int:
    """Tokens of an epoch that takes so many supervised tokens of each source, on average over epochs."""
    sizes = zip(num_tokens, num_supervised, taken, strict=True)
    return round(sum(quota * int(tokens.sum()) / int(targets.sum()) for tokens, targets, quota in sizes))


def mixed_steps(
    num_tokens: int, num_supervised: Sequence[np.ndarray], taken: Sequence[float], batch_tokens: int
) -> int:
    """As num_steps, of an epoch of a mixture with so many tokens; no more than any of its epochs has samples.

    Of the middles of consecutive samples no two are further apart than the longest is long.
    """
    least = sum(int(quota // int(targets.max())) for targets, quota in zip(num_supervised, taken, strict=True))
    return min(max(-(-num_tokens // batch_tokens), 1), max(least, 1))
