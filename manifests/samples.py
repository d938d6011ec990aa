"""samples.arrow: every sample's ids, mask and place, written once while planning and read from then on.

Invariant: a record batch is a shard, and the batches of the teacher are a pure function of its samples' lengths. Each
generation of a cache that grew has a file of the samples that it brought.
Cost: memory of one shard's ids while planning; reading copies nothing. Format: FORMAT.md section 2.
"""

# Shapes: N samples of a shard, n tokens of one sample, R rows of one sample.

import hashlib
import os
from array import array
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from kdpipe.manifests.durable import open_regular
from kdpipe.manifests.errors import CorruptError, LayoutError
from kdpipe.manifests.plan import PLAN_FILE, SAMPLES_FILE, plan_folder
from kdpipe.manifests.prepared import Prepared
from kdpipe.manifests.sample import ID_BYTES, Sample, SampleTokens, num_rows
from kdpipe.manifests.shard_table import NO_SHARDS, SHARDS_FILE, ShardTable
from kdpipe.manifests.specs import Io

SAMPLES_HINT = "it says which sample is where: put it back from a copy, or extract into another folder"
KEPT_SHARDS = 256
"""Of so many shards ids and masks stay at hand: a byte a token where samples.arrow is mapped, 5 where it is read."""

SCHEMA = pa.schema(
    [
        pa.field("content_id", pa.binary(ID_BYTES), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("line", pa.int64(), nullable=False),
        pa.field("token_ids", pa.list_(pa.int32()), nullable=False),
        pa.field("supervised", pa.list_(pa.bool_()), nullable=False),
        pa.field("num_tokens", pa.int32(), nullable=False),
        pa.field("shard", pa.int32(), nullable=False),
        pa.field("batch", pa.int32(), nullable=False),
        pa.field("first_row", pa.int64(), nullable=False),
        pa.field("num_rows", pa.int32(), nullable=False),
        pa.field("num_supervised", pa.int32(), nullable=False),
    ]
)


def cut_batches(num_tokens: Sequence[int], batch_tokens: int) -> np.ndarray:
    """The teacher batch of every sample of a shard, int32 [N]: samples of similar length together.

    Sorted by length, then cut so that count times longest stays within batch_tokens; 0 puts every sample alone, in
    order, so that nothing is padded and a row is a function of its own sample.
    """
    if batch_tokens == 0:
        return np.arange(len(num_tokens), dtype=np.int32)
    batches = np.zeros(len(num_tokens), dtype=np.int32)
    batch, count = 0, 0
    for index in np.argsort(np.asarray(num_tokens), kind="stable"):
        # Ascending lengths: the newest sample is the longest of its batch.
        if count and (count + 1) * num_tokens[index] > batch_tokens:
            batch, count = batch + 1, 0
        batches[index] = batch
        count += 1
    return batches


def identity(content_id: bytes, token_ids: np.ndarray, supervised: np.ndarray) -> bytes:
    """What makes a sample the one it is, as bytes: its id, number of tokens, token ids and mask."""
    ids, mask = np.asarray(token_ids, "<i4").tobytes(), np.packbits(supervised).tobytes()
    return content_id + len(token_ids).to_bytes(8, "little") + ids + mask


class SamplesWriter:
    """Writes samples.arrow as samples arrive, one record batch a shard, and keeps the shards' bounds.

    writer = SamplesWriter(path, shard_tokens=65536, batch_tokens=0, every_row=False)
    for sample in samples: writer.add(sample)
    table = writer.close()

    after: the samples of the cache that these are added to; their shards come first
    """

    def __init__(
        self,
        path: Path,
        *,
        shard_tokens: int,
        batch_tokens: int,
        every_row: bool,
        after: "Samples | None" = None,
    ) -> None:
        self._batch_tokens, self._every_row, self._shard_tokens = batch_tokens, every_row, shard_tokens
        self._sink = pa.OSFile(str(path), "wb")
        self._writer = pa.ipc.new_file(self._sink, SCHEMA)
        self._waiting: list[Sample] = []
        self._waiting_tokens = 0
        self._data = hashlib.sha256()
        self._before = NO_SHARDS if after is None else after.plan.shards
        self._num_samples, self._num_tokens, self._num_rows = array("q"), array("q"), array("q")
        if after is not None:
            for each in after.identities():
                self._data.update(each)

    def add(self, sample: Sample) -> None:
        if self._waiting and self._waiting_tokens + len(sample.token_ids) > self._shard_tokens:
            self._flush()
        self._waiting.append(sample)
        self._waiting_tokens += len(sample.token_ids)
        self._data.update(identity(sample.content_id, sample.token_ids, sample.supervised))

    def close(self) -> ShardTable:
        """Finish the file; the bounds of the shards in it."""
        if self._waiting:
            self._flush()
        self._writer.close()
        self._sink.close()
        return ShardTable.of(
            self._num_samples, self._num_tokens, self._num_rows, first=int(self._before.num_samples.sum())
        )

    def data_digest(self) -> str:
        """sha256 over every sample's id, token ids and mask so far."""
        return self._data.hexdigest()

    def _flush(self) -> None:
        samples = self._waiting
        lengths = [len(sample.token_ids) for sample in samples]
        rows = [num_rows(sample.supervised, every=self._every_row) for sample in samples]
        targets = [num_rows(sample.supervised) for sample in samples]
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        columns = {
            "content_id": pa.array([sample.content_id for sample in samples], pa.binary(ID_BYTES)),
            "source": pa.array([sample.source for sample in samples], pa.string()),
            "line": pa.array([sample.line for sample in samples], pa.int64()),
            "token_ids": pa.ListArray.from_arrays(offsets, np.concatenate([sample.token_ids for sample in samples])),
            "supervised": pa.ListArray.from_arrays(offsets, np.concatenate([sample.supervised for sample in samples])),
            "num_tokens": pa.array(lengths, pa.int32()),
            "shard": pa.array([len(self._before) + len(self._num_rows)] * len(samples), pa.int32()),
            "batch": pa.array(cut_batches(lengths, self._batch_tokens)),
            "first_row": pa.array(np.cumsum([0, *rows[:-1]]), pa.int64()),
            "num_rows": pa.array(rows, pa.int32()),
            "num_supervised": pa.array(targets, pa.int32()),
        }
        self._writer.write_batch(pa.record_batch(columns, schema=SCHEMA))
        self._num_samples.append(len(samples))
        self._num_tokens.append(sum(lengths))
        self._num_rows.append(sum(rows))
        self._waiting, self._waiting_tokens = [], 0


class Samples:
    """samples.arrow of every generation: one record batch a shard; columns as numpy arrays.

    The files are checked against their digests when the first column is asked for.
    """

    def __init__(self, cache: Path, plan: Prepared, io: Io = "mmap") -> None:
        self.plan, self.folder = plan, cache
        self.paths = [plan_folder(cache, generation) / SAMPLES_FILE for generation in range(plan.generation + 1)]
        brought = plan.brought()
        self._first = [numbers.start for numbers in brought]
        self._good = False
        for path in self.paths:
            if not path.with_name(plan.FILE).exists():
                raise LayoutError(f"{plan.FILE} is missing; put it back from a copy", where=path.parent)
        self._readers = [
            _open_samples(path, len(numbers), io) for path, numbers in zip(self.paths, brought, strict=True)
        ]
        self._starts = plan.shards.starts
        self._tables: dict[int, _Tokens] = {}

    def tokens(self, index: int) -> SampleTokens:
        """Ids and mask of a sample; the ids are a view. Raises LayoutError where the file is damaged there."""
        number = bisect_right(self._starts, index) - 1
        if number not in self._tables:
            if len(self._tables) == KEPT_SHARDS:
                self._tables.pop(next(iter(self._tables)))
            self._tables[number] = _Tokens.of(self.shard(number))
        return self._tables[number].sample(index - self._starts[number])

    def place(self, index: int) -> str:
        """The file of a sample's record, as the user named it, and its line."""
        number = bisect_right(self._starts, index) - 1
        row = self.shard(number).slice(index - self._starts[number], 1)
        return f"{row.column('source')[0]}:{row.column('line')[0]}"

    def shard(self, index: int) -> pa.RecordBatch:
        """The samples of one shard, zero-copy. Raises LayoutError where the file is damaged there."""
        generation = bisect_right(self._first, index) - 1
        try:
            return self._readers[generation].get_batch(index - self._first[generation])
        except (OSError, pa.ArrowException) as err:
            raise LayoutError(
                f"not readable as Arrow: {err}", where=self.paths[generation], hint=SAMPLES_HINT
            ) from None

    def column(self, name: str) -> np.ndarray:
        """A fixed-width column of all samples as one array: content_id as uint8 [N, 16], the others as they are.

        Raises CorruptError.
        """
        if not self._good:
            self.verify()
        parts = [self.shard(index).column(name) for index in range(len(self.plan.shards))]
        if name == "content_id":
            raw = [np.frombuffer(part.buffers()[1], np.uint8)[: len(part) * ID_BYTES] for part in parts]
            return np.concatenate([np.zeros(0, np.uint8), *raw]).reshape(-1, ID_BYTES)
        none = SCHEMA.field(name).type.to_pandas_dtype()
        return np.concatenate([np.zeros(0, none), *(part.to_numpy() for part in parts)])

    def identities(self) -> Iterator[bytes]:
        """`identity` of every sample, in order; reads all ids."""
        for index in range(len(self.plan.shards)):
            batch = self.shard(index)
            token_ids = batch.column("token_ids").values.to_numpy()
            supervised = batch.column("supervised").values.to_numpy(zero_copy_only=False)
            ends = np.cumsum(batch.column("num_tokens").to_numpy())
            for content_id, begin, end in zip(
                batch.column("content_id").to_pylist(), [0, *ends[:-1]], ends, strict=True
            ):
                yield identity(content_id, token_ids[begin:end], supervised[begin:end])

    def check_counts(self) -> None:
        """Whether every shard has the samples, tokens and rows of the plan: reads two columns. Raises CorruptError."""
        for index, shard in enumerate(self.plan.shards):
            batch = self.shard(index)
            tokens, rows = (int(batch.column(name).to_numpy().sum()) for name in ("num_tokens", "num_rows"))
            if (len(batch), tokens, rows) != (shard.num_samples, shard.num_tokens, shard.num_rows):
                raise CorruptError(
                    f"shard {index} has {len(batch)} samples, {tokens} tokens and {rows} rows, {SHARDS_FILE} says "
                    f"{shard.num_samples}, {shard.num_tokens} and {shard.num_rows}",
                    where=self.paths[bisect_right(self._first, index) - 1],
                )

    def verify(self) -> None:
        """Check every file, and the plans before this one, against their digests in it, 1.7 GB/s.

        Raises CorruptError.
        """
        expected = [(self.paths[-1], self.plan.samples_digest)]
        for path, before in zip(self.paths, self.plan.grown_from, strict=False):
            expected += [(path, before.samples_digest), (path.with_name(PLAN_FILE), before.plan)]
        for path, digest in expected:
            with open(open_regular(path), "rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            if found != digest:
                newest = plan_folder(Path(), self.plan.generation) / self.plan.FILE
                raise CorruptError(f"sha256 {found}, {newest} says {digest}", where=path, hint=SAMPLES_HINT)
        self._good = True


@dataclass(frozen=True, slots=True, eq=False)
class _Tokens:
    """The ids of a shard as they lie in its record batch, and its masks: offsets int32 [N + 1], int32 [n], bool [n]."""

    offsets: np.ndarray
    ids: np.ndarray
    supervised: np.ndarray

    @classmethod
    def of(cls, batch: pa.RecordBatch) -> "_Tokens":
        token_ids, masks = batch.column("token_ids"), batch.column("supervised").values
        supervised = masks.to_numpy(zero_copy_only=False)
        supervised.flags.writeable = False
        return cls(token_ids.offsets.to_numpy(), token_ids.values.to_numpy(), supervised)

    def sample(self, within: int) -> SampleTokens:
        begin, end = int(self.offsets[within]), int(self.offsets[within + 1])
        return SampleTokens(self.ids[begin:end], self.supervised[begin:end])


def _open_samples(path: Path, num_shards: int, io: Io) -> pa.ipc.RecordBatchFileReader:
    try:
        os.close(open_regular(path))  # arrow would wait for ever at a pipe
        reader = pa.ipc.open_file(pa.memory_map(str(path)) if io == "mmap" else pa.OSFile(str(path)))
    except (OSError, pa.ArrowException) as err:
        raise LayoutError(f"not readable as Arrow: {err}", where=path, hint=SAMPLES_HINT) from None
    if reader.schema != SCHEMA:
        # The columns that were found are not named: in a damaged file their names need not be text.
        raise LayoutError(f"its columns are not {', '.join(SCHEMA.names)}", where=path)
    if reader.num_record_batches != num_shards:
        raise LayoutError(f"{reader.num_record_batches} record batches, PLAN.json says {num_shards} shards", where=path)
    return reader
