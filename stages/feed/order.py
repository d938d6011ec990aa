"""Order: which samples a step takes and which rank computes them, pure functions of lengths, seed and world size.

    shuffle(indices, seed, epoch) -> cut_steps(batch_tokens) -> deal(ranks x accumulation)

Invariant: step s of a run is the same samples whatever was done before it, and the same on any number of ranks, so
there is no state to save.
"""

import numpy as np
import torch

from kdpipe.stages.draws import mixed, mixed_seed
from kdpipe.stages.feed.lengths import num_steps


def shuffle(indices: np.ndarray, seed: int, epoch: int) -> np.ndarray:
    """The order of an epoch: sample indices sorted by a hash of (seed, epoch, index).

    A hash, not a random generator: the order cannot change with numpy's version, and a sample's rank does not depend
    on how many others there are.
    """
    return indices[np.argsort(keys(indices, seed, epoch), kind="stable")]


def keys(indices: np.ndarray, seed: int, epoch: int, times: np.ndarray | None = None) -> np.ndarray:
    """A number uint64 for each index, a hash of (seed, epoch, index).

    times: int64, how often the epoch has taken each before; those of one index then have other numbers
    """
    found = mixed(torch.from_numpy(indices.copy()) ^ mixed_seed(seed, epoch))
    if times is not None:
        again = torch.from_numpy(times)
        found = torch.where(again > 0, mixed(found + again), found)
    return found.numpy().view(np.uint64)


def cut_steps(order: np.ndarray, num_tokens: np.ndarray, batch_tokens: int) -> list[np.ndarray]:
    """As `cut`, into as many steps as keep their mean within batch_tokens."""
    return cut(order, num_tokens, num_steps(num_tokens, batch_tokens))


def cut(order: np.ndarray, num_tokens: np.ndarray, steps: int) -> list[np.ndarray]:
    """An epoch's order cut into so many steps of nearly equal tokens, instead of full ones and a remainder.

    num_tokens: of every sample in `order`. A sample belongs to the step in which its middle token falls, except that
    no step is left empty:

    tokens 4 4 4 4, 3 steps of 5.33 -> [4] [4 4] [4]
    """
    middles = np.cumsum(num_tokens) * 2 - num_tokens
    step_of = middles * steps // (2 * int(num_tokens.sum()))
    bounds = np.searchsorted(step_of, np.arange(1, steps))
    for step in range(1, steps):
        previous = bounds[step - 2] if step > 1 else 0
        bounds[step - 1] = min(max(bounds[step - 1], previous + 1), len(order) - (steps - step))
    return np.split(order, bounds)


def deal(samples: np.ndarray, num_tokens: np.ndarray, num_bins: int) -> list[np.ndarray]:
    """One step's samples dealt into bins of nearly equal tokens: longest first, each to the lightest bin.

    num_tokens: of every sample in `samples`. Fewer samples than bins leave some bins empty.
    """
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    load = [0] * num_bins
    for place in np.argsort(-num_tokens, kind="stable"):
        lightest = load.index(min(load))
        bins[lightest].append(int(samples[place]))
        load[lightest] += int(num_tokens[place])
    return [np.array(members, dtype=np.int64) for members in bins]
