"""Lengths: how many steps a run has, functions of its samples' lengths alone; without torch."""

import numpy as np


def num_steps(num_tokens: np.ndarray, batch_tokens: int) -> int:
    """Steps of an epoch: as few as keep the mean step within batch_tokens, and no more than there are samples."""
    return min(max(-(-int(num_tokens.sum()) // batch_tokens), 1), len(num_tokens))


def planned_steps(num_tokens: np.ndarray, batch_tokens: int, *, epochs: float, max_steps: int | None) -> int:
    """Steps of a run: the smaller of its epochs' and max_steps."""
    wanted = max(round(num_steps(num_tokens, batch_tokens) * epochs), 1)
    return min(wanted, max_steps or wanted)
