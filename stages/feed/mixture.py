"""Mixture: epochs in which every source has its share of the supervised tokens.

Each source is an endless row of passes over its training samples, each pass in an order of its own:

    source A   [ 3 1 2 ][ 1 3 2 ][ 2 3 1 ] ...        every sample once a pass
    epoch       0 0 0 0  0 1 1 1  1 1 ...             the next q tokens of the row

An epoch takes the next q supervised tokens of each row, q = the source's share of the tokens of all sources; a sample
belongs to the epoch in which its middle one falls. So an epoch has as many supervised tokens as all sources together, a
source that is asked for more than it has is gone through more than once, one that is asked for less is gone through
over several epochs, and no sample is taken again before all others of its source were.
Invariant: an epoch is a pure function of seed and epoch, and what it takes of a source is its share to within one
sample; where the shares are those that the sources have anyway, it is the epoch of `Shuffled`, bit for bit.
Cost: of an epoch, sorting its samples twice.
"""

# Shapes: N training samples of a source.

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from kdpipe.manifests.errors import ConfigError
from kdpipe.stages.draws import mixed_seed
from kdpipe.stages.feed.dataset import Dataset
from kdpipe.stages.feed.lengths import Shares, num_steps
from kdpipe.stages.feed.order import keys, shuffle

PASSES = 0x6D6978
"""Keeps the order of a pass apart from that of an epoch."""


class Epochs(Protocol):
    """The samples of every epoch of a run, in order.

    num_steps: of an epoch
    """

    num_steps: int

    def order(self, epoch: int) -> np.ndarray:
        """Sample indices int64, one taken twice named twice."""

    def members(self, epoch: int) -> np.ndarray:
        """The same, in whatever order."""


class Shuffled:
    """All training samples once an epoch."""

    def __init__(self, dataset: Dataset, samples: np.ndarray, seed: int, batch_tokens: int) -> None:
        self._samples, self._seed = samples, seed
        self.num_steps = num_steps(dataset.num_tokens[samples], batch_tokens)

    def order(self, epoch: int) -> np.ndarray:
        return shuffle(self._samples, self._seed, epoch)

    def members(self, epoch: int) -> np.ndarray:
        return self._samples


class Mixture:
    """The training samples of what a data set is made of in shares of an epoch's supervised tokens.

    weights: one a plan, above 0, whatever their sum
    Raises ConfigError for a plan of whose samples no supervised token is left to train on.
    """

    def __init__(
        self, dataset: Dataset, samples: np.ndarray, seed: int, batch_tokens: int, weights: Sequence[float]
    ) -> None:
        source = dataset.source_of(samples)
        self._sources = [samples[source == number] for number in range(len(dataset.plans))]
        self._num_supervised, self._seed = dataset.num_supervised, seed
        supervised = [dataset.num_supervised[source] for source in self._sources]
        for number, targets in enumerate(supervised, start=1):
            if not targets.sum():
                raise ConfigError(
                    f"no supervised token of cache number {number} is left to train on; leave it out",
                    where="cache.weights",
                )
        lengths = [dataset.num_tokens[source] for source in self._sources]
        shares = Shares.of(lengths, supervised, weights, batch_tokens)
        self._quotas, self.num_steps = shares.quotas, shares.num_steps

    def order(self, epoch: int) -> np.ndarray:
        samples, times = self._taken(epoch)
        return samples[np.argsort(keys(samples, self._seed, epoch, times), kind="stable")]

    def members(self, epoch: int) -> np.ndarray:
        return self._taken(epoch)[0]

    def _taken(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The samples of an epoch, and how often it has taken each before."""
        taken = [self._taken_of(source, epoch) for source in range(len(self._sources))]
        return np.concatenate([samples for samples, _ in taken]), np.concatenate([times for _, times in taken])

    def _taken_of(self, source: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """As _taken, of one source."""
        samples, quota = self._sources[source], self._quotas[source]
        begin, end = round(epoch * quota), round((epoch + 1) * quota)
        size = int(self._num_supervised[samples].sum())
        first, last = begin // size, max(end - 1, begin) // size
        parts = [
            self._window(source, number, begin, end) for number in range(first, last + 1) if number in (first, last)
        ]
        parts[1:1] = [samples] * (last - first - 1)  # of a whole pass the order is of no matter
        times = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
        return np.concatenate(parts), times

    def _window(self, source: int, number: int, begin: int, end: int) -> np.ndarray:
        """The samples of a pass whose middle supervised token is one of begin .. end of the source's row."""
        order = shuffle(self._sources[source], mixed_seed(self._seed, PASSES, source), number)
        counts = self._num_supervised[order]
        ends = np.cumsum(counts)
        # Doubled, to stay whole; a sample without a supervised token is where the one before it ends.
        middles = np.maximum(2 * ends - np.maximum(counts, 1), 0) + 2 * number * int(ends[-1])
        return order[(middles >= 2 * begin) & (middles < 2 * end)]
