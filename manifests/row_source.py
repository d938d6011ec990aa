"""Row source: where a teacher's rows come from, by sample: a cache today, a ring beside a live teacher later.

    source.want(samples)            they are asked for next, in this order
    source.rows(sample) -> [R, E]
    source.done(samples)            their rows were copied

Invariant: what is read is what the gate let through, or an error; a source without a sample's rows waits for them,
bounded, or raises.
"""

# Shapes: R supervised rows of a sample, E teacher width.

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import Protocol

import numpy as np

from kdpipe.manifests.cache import Cache


class RowSource(Protocol):
    """Teacher rows of the samples of a data set, by running index."""

    def want(self, samples: np.ndarray) -> None:
        """Will be asked for, in this order: a cache reads ahead, a ring orders them from its teacher."""

    def rows(self, sample: int) -> np.ndarray:
        """[R, E], of supervised tokens, valid until `done`; a view where that is possible."""

    def done(self, samples: np.ndarray) -> None:
        """Their rows were copied: what held them is free."""


class CacheRows:
    """The rows of one or more complete caches, one after the other under one running index."""

    def __init__(self, caches: Sequence[Cache]) -> None:
        self._caches = tuple(caches)
        self._first = [0, *accumulate(len(cache) for cache in caches)]

    def want(self, samples: np.ndarray) -> None:
        for sample in samples.tolist():
            cache, within = self._locate(sample)
            cache.prefetch(within)

    def rows(self, sample: int) -> np.ndarray:
        cache, within = self._locate(sample)
        return cache.rows(within)

    def done(self, samples: np.ndarray) -> None:
        """A mapping is let go by the cache itself."""

    def _locate(self, sample: int) -> tuple[Cache, int]:
        which = bisect_right(self._first, sample) - 1
        return self._caches[which], sample - self._first[which]
