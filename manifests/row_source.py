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
from typing import Protocol, cast

import numpy as np

from kdpipe.manifests.cache import Cache
from kdpipe.manifests.codec import some_rows
from kdpipe.manifests.errors import EngineError
from kdpipe.manifests.fitted import CODEC_FILE, Fitted, open_fitted
from kdpipe.manifests.ring import Message, RingReader

SOME_SAMPLES, ROWS_A_SAMPLE = 32, 8
"""What is looked at of a coded cache to choose how its rows meet the teacher's head."""


class RowSource(Protocol):
    """Teacher rows of the samples of a data set, by running index.

    waited_s: seconds spent waiting for a teacher at work; None where there is none to wait for
    """

    @property
    def waited_s(self) -> float | None: ...

    def want(self, samples: np.ndarray) -> None:
        """Will be asked for, in this order: a cache reads ahead, a ring orders them from its teacher."""

    def rows(self, sample: int) -> np.ndarray:
        """[R, E], of supervised tokens; a view where that is possible, valid until the next rows are asked for."""

    def done(self, samples: np.ndarray) -> None:
        """Their rows were copied: what held them is free."""


class CodedRowSource(RowSource, Protocol):
    """One that may have rows as they are stored.

    fitted: the codec that `parts` are of; None where there are none but rows
    """

    @property
    def fitted(self) -> Fitted | None: ...

    def parts(self, sample: int) -> dict[str, np.ndarray]:
        """A sample's rows as they are stored, the codec's tensors by name."""

    def some_parts(self) -> list[dict[str, np.ndarray]]:
        """A few rows of each of SOME_SAMPLES samples from all over it, always the same ones."""


class CacheRows:
    """The rows of one or more complete caches, one after the other under one running index.

    fitted: the codec that `parts` are of: one that all have, of whose rows none are left out; None where that is not so
    """

    waited_s = None

    def __init__(self, caches: Sequence[Cache]) -> None:
        self.fitted = _shared_codec(caches)
        self._caches = tuple(caches)
        self._first = [0, *accumulate(len(cache) for cache in caches)]

    def want(self, samples: np.ndarray) -> None:
        for sample in samples.tolist():
            cache, within = self._locate(sample)
            cache.prefetch(within)

    def rows(self, sample: int) -> np.ndarray:
        cache, within = self._locate(sample)
        return cache.rows(within)

    def parts(self, sample: int) -> dict[str, np.ndarray]:
        """Its rows as they are stored, the codec's tensors by name."""
        cache, within = self._locate(sample)
        return cache.stored_parts(within)

    def some_parts(self) -> list[dict[str, np.ndarray]]:
        """As of CodedRowSource."""
        assert self.fitted is not None, "rows that are stored in several ways have no parts"
        found = []
        for sample in evenly(self._first[-1], SOME_SAMPLES).tolist():
            parts = self.parts(sample)
            num_rows = len(next(iter(parts.values())))
            found.append(some_rows(self.fitted.codec, parts, evenly(num_rows, ROWS_A_SAMPLE)))
        return found

    def done(self, samples: np.ndarray) -> None:
        """A mapping is let go by the cache itself."""

    def _locate(self, sample: int) -> tuple[Cache, int]:
        which = bisect_right(self._first, sample) - 1
        return self._caches[which], sample - self._first[which]


def evenly(length: int, count: int) -> np.ndarray:
    """At most so many of 0 to length - 1, as far apart as they can be, rising."""
    return np.arange(min(length, count)) * length // max(min(length, count), 1)


def _shared_codec(caches: Sequence[Cache]) -> Fitted | None:
    """The codec of caches that all have the same file of one, and nothing but supervised rows."""
    digests = {cache.plan.teacher_files.get(CODEC_FILE) for cache in caches}
    if len(digests) != 1 or None in digests or any(cache.plan.settings.rows == "all" for cache in caches):
        return None
    return open_fitted(caches[0].path, caches[0].plan)


class JoinedRows:
    """The rows of another source under the running index of a data set.

    places: int64 [N], which of the source's samples each of the data set's is; -1 where it has none
    """

    def __init__(self, source: RowSource, places: np.ndarray) -> None:
        self._source, self._places = source, places

    @property
    def waited_s(self) -> float | None:
        return self._source.waited_s

    @property
    def fitted(self) -> Fitted | None:
        return getattr(self._source, "fitted", None)

    def parts(self, sample: int) -> dict[str, np.ndarray]:
        return cast(CodedRowSource, self._source).parts(self._place(sample))

    def some_parts(self) -> list[dict[str, np.ndarray]]:
        return cast(CodedRowSource, self._source).some_parts()

    def want(self, samples: np.ndarray) -> None:
        self._source.want(self._found(samples))

    def rows(self, sample: int) -> np.ndarray:
        return self._source.rows(self._place(sample))

    def _place(self, sample: int) -> int:
        place = int(self._places[sample])
        assert place >= 0, f"sample {sample} has no rows of this teacher"
        return place

    def done(self, samples: np.ndarray) -> None:
        self._source.done(self._found(samples))

    def _found(self, samples: np.ndarray) -> np.ndarray:
        places = self._places[samples]
        return places[places >= 0]


class RingRows:
    """The rows that a teacher at work puts into a ring, as they are asked for.

    width, dtype: of a row
    Invariant: the ring need hold no more than the longest sample. A sample's slot is free when the next one's rows are
    asked for; rows that came before their turn, because something else was asked for in between, are kept here.
    """

    def __init__(self, ring: RingReader, *, width: int, dtype: np.dtype) -> None:
        self._ring, self._width, self._dtype = ring, width, dtype
        self._asked: Counter[int] = Counter()
        self._early: dict[int, list[np.ndarray]] = {}
        self._held: Message | None = None

    @property
    def waited_s(self) -> float:
        return self._ring.waited_s

    def want(self, samples: np.ndarray) -> None:
        self._asked.update(samples.tolist())
        self._ring.ask(samples)

    def rows(self, sample: int) -> np.ndarray:
        """As RowSource. Raises EngineError where the teacher ended before, and what the ring raises."""
        self._release()
        if not self._asked[sample]:
            self.want(np.array([sample]))
        self._asked[sample] -= 1
        if early := self._early.pop(sample, None):
            if early[1:]:
                self._early[sample] = early[1:]
            return early[0]
        while True:
            message = self._ring.take(f"the rows of sample {sample}")
            if message is None:
                raise EngineError("the teacher ended before its rows came; run it again", where=f"sample {sample}")
            array = message.array.view(self._dtype).reshape(-1, self._width)
            if message.key == sample:
                self._held = message
                return array
            with message:
                self._early.setdefault(message.key, []).append(array.copy())

    def done(self, samples: np.ndarray) -> None:
        self._release()

    def _release(self) -> None:
        if self._held is not None:
            self._held.release()
            self._held = None
