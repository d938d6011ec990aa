"""Lengths: how many steps a run has, functions of its samples' lengths alone; without torch."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


def num_steps(num_tokens: np.ndarray, batch_tokens: int) -> int:
    """Steps of an epoch: as few as keep the mean step within batch_tokens, and no more than there are samples."""
    return steps_of(len(num_tokens), int(num_tokens.sum()), batch_tokens)


def steps_of(num_samples: int, num_tokens: int, batch_tokens: int) -> int:
    """As num_steps, of samples that are counted alone."""
    return min(max(-(-num_tokens // batch_tokens), 1), num_samples)


def planned_steps(steps_per_epoch: int, *, epochs: float, max_steps: int | None) -> int:
    """Steps of a run: the smaller of its epochs' and max_steps."""
    wanted = max(round(steps_per_epoch * epochs), 1)
    return min(wanted, max_steps or wanted)


@dataclass(frozen=True, kw_only=True, slots=True)
class Shares:
    """What an epoch of a mixture takes of its sources.

    quotas: supervised tokens of each source: its share of those that all sources have
    num_tokens: of an epoch, on average over epochs
    num_steps: as in num_steps; no more than any epoch has samples
    """

    quotas: tuple[float, ...]
    num_tokens: int
    num_steps: int

    @classmethod
    def of(
        cls,
        num_tokens: Sequence[np.ndarray],
        num_supervised: Sequence[np.ndarray],
        weights: Sequence[float],
        batch_tokens: int,
    ) -> "Shares":
        """num_tokens, num_supervised: of the samples of each source; weights: one a source, whatever their sum."""
        supervised = [int(each.sum()) for each in num_supervised]
        quotas = [sum(supervised) * weight / sum(weights) for weight in weights]
        sizes = zip(quotas, num_tokens, supervised, strict=True)
        tokens = round(sum(quota * int(lengths.sum()) / targets for quota, lengths, targets in sizes))
        # Of the middles of consecutive samples no two are further apart than the longest is long.
        least = sum(int(quota // int(each.max())) for quota, each in zip(quotas, num_supervised, strict=True))
        steps = min(max(-(-tokens // batch_tokens), 1), max(least, 1))
        return cls(quotas=tuple(quotas), num_tokens=tokens, num_steps=steps)
