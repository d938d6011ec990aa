"""Shelves: where a teacher's rows go. The shard of a cache, committed when its last row is in; a file for a while.

Invariant: no shard is committed whose rows were not all identified by the gate.
"""

import os
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from kdpipe.manifests.cache import Cache
from kdpipe.manifests.claims import Claims
from kdpipe.manifests.progress import Progress
from kdpipe.manifests.shard import ShardWriter, commit_path
from kdpipe.stages.models.head import Head
from kdpipe.stages.teacher.engine import Ack, Request, RowTarget
from kdpipe.stages.teacher.gate import check_identity


@dataclass(slots=True, eq=False)
class OpenShard:
    """A shard on its way: its writer, where each of its samples begins, what was accepted so far."""

    number: int
    writer: ShardWriter
    first_sample: int
    first_row: np.ndarray
    requests: list[Request] = field(default_factory=list)
    acks: list[Ack] = field(default_factory=list)


class ShardShelf:
    """The claimed shards of a cache, filled in the order in which they were opened.

    with ShardShelf(cache, head, claims, progress) as shelf: shelf.open(7); shelf.place(...); shelf.accept(...)
    """

    def __init__(self, cache: Cache, head: Head, claims: Claims, progress: Progress) -> None:
        self._cache, self._head, self._claims, self._progress = cache, head, claims, progress
        self._open: list[OpenShard] = []
        self._started = time.perf_counter()

    def __enter__(self) -> "ShardShelf":
        return self

    def __exit__(self, *_: object) -> None:
        for shard in self._open:
            shard.writer.__exit__()

    @property
    def doing(self) -> str:
        number = self._open[0].number + 1 if self._open else len(self._cache.plan.shards)
        return f"shard {number}/{len(self._cache.plan.shards)}"

    def open(self, number: int) -> bool:
        """Make place for a shard, unless another writer has claimed it, or has finished it by now."""
        if not self._claims.take(number):
            return False
        if commit_path(self._cache.path, number).exists():
            self._claims.drop(number)
            return False
        samples, plan = self._cache.samples.shard(number), self._cache.plan
        self._open.append(
            OpenShard(
                number=number,
                writer=ShardWriter(self._cache.path, plan, number, samples),
                first_sample=plan.shards[number].first_sample,
                first_row=samples.column("first_row").to_numpy(),
            )
        )
        return True

    def place(self, sample: int, num_rows: int) -> RowTarget:
        """The place of a sample of the shard that was opened last."""
        shard = self._open[-1]
        array, offset = shard.writer.rows(int(shard.first_row[sample - shard.first_sample]), num_rows)
        return RowTarget(array=array, path=shard.writer.path, offset=offset)

    def accept(self, request: Request, ack: Ack) -> None:
        shard = self._open[0]
        shard.requests.append(request)
        shard.acks.append(ack)
        self._claims.keep()
        if len(shard.acks) == len(shard.first_row):
            self._seal(shard)

    def _seal(self, shard: OpenShard) -> None:
        """The last look, then the commit."""
        error = check_identity(shard.requests, shard.acks, self._head)
        commit = shard.writer.commit()
        shard.writer.__exit__()
        self._open.remove(shard)
        self._claims.drop(shard.number)
        seconds, self._started = time.perf_counter() - self._started, time.perf_counter()
        self._progress.event(
            "shard",
            shard=shard.number,
            num_tokens=self._cache.plan.shards[shard.number].num_tokens,
            num_bytes=commit.num_bytes,
            digest=commit.digest,
            worst_logprob_error=error,
            seconds=seconds,
        )


@dataclass(slots=True, eq=False)
class ScratchShelf:
    """Rows that are looked at and thrown away: a file of exactly their size, in one place after the other."""

    path: Path
    width: int
    dtype: np.dtype
    requests: list[Request] = field(default_factory=list)
    doing: str = ""
    num_rows: int = 0

    def place(self, sample: int, num_rows: int) -> RowTarget:
        """Room for some more rows."""
        offset, size = self.num_rows * self.width * self.dtype.itemsize, num_rows * self.width * self.dtype.itemsize
        os.truncate(self.path, max(offset + size, 1))
        shape = (num_rows, self.width)
        array = np.zeros(shape, self.dtype)
        if num_rows:
            array = np.memmap(self.path, self.dtype, "r+", offset, shape)
        self.num_rows += num_rows
        return RowTarget(array=array, path=self.path, offset=offset)

    def accept(self, request: Request, ack: Ack) -> None:
        self.requests.append(request)
