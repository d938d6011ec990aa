"""Row source: where a teacher's rows come from, by sample: a cache, or a ring beside a teacher at work.

    source.want(samples)            they are asked for next, in this order
    source.rows(sample) -> [R, E]
    source.done(samples)            their rows were copied

Invariant: what is read is what the gate let through, or an error; a source without a sample's rows waits for them,
bounded, or raises.
"""

# Shapes: R supervised rows of a sample, E teacher width.

from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from itertools import accumulate
from typing import Protocol

import numpy as np

from kdpipe.manifests.cache import Cache
from kdpipe.manifests.errors import EngineError
from kdpipe.manifests.ring import Message, RingReader


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


class RingRows:
    """The rows that a teacher at work puts into a ring, as they are asked for.

    width, dtype: of a row
    Invariant: rows that came before their turn, because something else was asked for in between, are kept in this
    process and leave the ring: it need hold no more than the longest sample.
    """

    def __init__(self, ring: RingReader, *, width: int, dtype: np.dtype) -> None:
        self._ring, self._width, self._dtype = ring, width, dtype
        self._asked: Counter[int] = Counter()
        self._early: dict[int, list[np.ndarray]] = {}
        self._held: dict[int, Message] = {}

    def want(self, samples: np.ndarray) -> None:
        self._asked.update(samples.tolist())
        self._ring.ask(samples)

    def rows(self, sample: int) -> np.ndarray:
        if not self._asked[sample]:
            self.want(np.array([sample]))
        if self._early.get(sample):
            return self._early[sample][0]
        while True:
            message = self._ring.take(f"the rows of sample {sample}")
            if message is None:
                raise EngineError("the teacher ended before its rows came; run it again", where=f"sample {sample}")
            array = message.array.view(self._dtype).reshape(-1, self._width)
            if message.key == sample:
                self._held[sample] = message
                return array
            with message:
                self._early.setdefault(message.key, []).append(array.copy())

    def done(self, samples: np.ndarray) -> None:
        for sample in samples.tolist():
            self._asked[sample] -= 1
            if sample in self._held:
                self._held.pop(sample).release()
            else:
                self._early[sample].pop(0)
