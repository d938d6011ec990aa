"""Tee: rows that pass by on their way to students, kept as shards of a cache.

    rows -> the mapped file of their shard -> committed with its last sample; asked for again -> read from there

Students ask in the order of their steps, so the samples of a shard come one by one over an epoch, and the shards are
finished towards its end. What was kept of a shard that is not finished is lost when the process ends.
Invariant: a shard is committed whole, by the same writer as extract's and with the same bytes.
"""

from dataclasses import dataclass
from types import TracebackType
from typing import Self

import numpy as np

from kdpipe.manifests.cache import Cache
from kdpipe.manifests.claims import Claims
from kdpipe.manifests.progress import Progress
from kdpipe.manifests.shard import ShardWriter, commit_path

MAX_OPEN = 256
"""Shards that are filled at a time, each a mapped file; samples of further ones pass by."""


@dataclass(slots=True, eq=False)
class _Filling:
    """A shard on its way. first_row: of each of its samples; has: which of them are there."""

    writer: ShardWriter
    first_sample: int
    first_row: np.ndarray
    num_rows: np.ndarray
    has: np.ndarray

    def rows(self, sample: int) -> np.ndarray:
        within = sample - self.first_sample
        array, _ = self.writer.rows(int(self.first_row[within]), int(self.num_rows[within]))
        return array


class Tee:
    """with Tee(cache, progress) as tee: tee.keep(sample, rows); tee.rows(sample)"""

    def __init__(self, cache: Cache, progress: Progress) -> None:
        self._cache, self._progress = cache, progress
        self._claims = Claims(cache.path)
        self._open: dict[int, _Filling] = {}
        self._committed = set(cache.committed())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, err: BaseException | None, _: TracebackType | None) -> None:
        for shard in self._open.values():
            shard.writer.__exit__()
        self._open.clear()
        self._claims.close()

    def rows(self, sample: int) -> np.ndarray | None:
        """The rows of a sample [R, E], where they are kept. Raises CorruptError for a shard that is damaged."""
        number = self._cache.plan.shards.find(sample)
        if number in self._committed:
            return self._cache.stored_rows(sample)
        shard = self._open.get(number)
        return shard.rows(sample) if shard is not None and shard.has[sample - shard.first_sample] else None

    def keep(self, sample: int, rows: np.ndarray) -> None:
        """Keep a sample's rows, and commit its shard if they are the last. Raises SpaceError, DriftError."""
        self._claims.keep()
        number = self._cache.plan.shards.find(sample)
        shard = self._shard(number)
        if shard is None:
            return
        shard.rows(sample)[:] = rows
        shard.has[sample - shard.first_sample] = True
        if shard.has.all():
            commit = shard.writer.commit()
            shard.writer.__exit__()
            del self._open[number]
            self._claims.drop(number)
            self._committed.add(number)
            self._progress.event("shard", shard=number, num_bytes=commit.num_bytes, digest=commit.digest)

    def _shard(self, number: int) -> _Filling | None:
        """The open shard of a number; None where it is not to be filled here."""
        if number in self._committed or number in self._open:
            return self._open.get(number)
        if len(self._open) >= MAX_OPEN or not self._claims.take(number):
            return None
        if commit_path(self._cache.path, number).exists():  # by another writer, in the meantime
            self._claims.drop(number)
            self._committed.add(number)
            return None
        samples, plan = self._cache.samples.shard(number), self._cache.plan
        columns = {name: samples.column(name).to_numpy() for name in ("first_row", "num_rows")}
        self._open[number] = _Filling(
            writer=ShardWriter(self._cache.path, plan, number, samples),
            first_sample=plan.shards[number].first_sample,
            has=np.zeros(samples.num_rows, bool),
            **columns,
        )
        return self._open[number]
