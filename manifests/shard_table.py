"""The shard table: where every shard of a cache begins and how large it is, in shards.arrow; in memory four columns.

Invariant: what is used are the very bytes whose sha256 the plan holds, so a table that was lost, torn, edited or taken
from another cache is an error when the cache is opened. The file is written once, with its plan; each generation of a
cache that grew has a file of the shards that it brought.
Cost: 32 bytes a shard, read and digested whenever a plan is read: 0.5 s for 10^7 shards (6.5e11 tokens at the usual
size) and 320 MB in every process; finding a sample's shard takes 0.2 to 0.7 us. Format: FORMAT.md section 3.
"""

import hashlib
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from kdpipe.manifests.durable import read_small
from kdpipe.manifests.errors import CorruptError, LayoutError

SHARDS_FILE = "shards.arrow"
SHARDS_HINT = "it says where every shard begins: put it back from a copy, or extract into another folder"
SHARD_BYTES = 32
SHORT = 1 << 17
"""Shards of which a list takes a few MB; it is searched in two thirds of the time."""
FRAME_BYTES = 1 << 16
"""What Arrow writes around the columns, at most."""


class ShardPlan(NamedTuple):
    """Bounds of one shard: a run of samples."""

    first_sample: int
    num_samples: int
    num_tokens: int
    num_rows: int


SCHEMA = pa.schema([pa.field(name, pa.int64(), nullable=False) for name in ShardPlan._fields])


class ShardTable:
    """The bounds of consecutive shards, int64 [shards] each; `table[i]` is a ShardPlan.

    starts: first_sample, out of which plain ints come at once: a list where the table is short, else a memoryview
    """

    def __init__(
        self, first_sample: np.ndarray, num_samples: np.ndarray, num_tokens: np.ndarray, num_rows: np.ndarray
    ) -> None:
        self.first_sample, self.num_samples = first_sample, num_samples
        self.num_tokens, self.num_rows = num_tokens, num_rows
        self.starts: Sequence[int] = first_sample.tolist() if len(first_sample) <= SHORT else first_sample.data

    @classmethod
    def of(
        cls, num_samples: Sequence[int], num_tokens: Sequence[int], num_rows: Sequence[int], *, first: int = 0
    ) -> "ShardTable":
        """The table of shards of these sizes, the first of which begins at sample `first`."""
        samples, tokens, rows = (np.array(each, np.int64) for each in (num_samples, num_tokens, num_rows))
        return cls(first + np.cumsum(samples) - samples, samples, tokens, rows)

    @classmethod
    def joined(cls, tables: Sequence["ShardTable"]) -> "ShardTable":
        """One table after the other."""
        if len(tables) == 1:
            return tables[0]
        return cls(*(np.concatenate([table.columns[name] for table in tables]) for name in ShardPlan._fields))

    @property
    def columns(self) -> dict[str, np.ndarray]:
        """The columns by name, in the order of the file."""
        return {name: getattr(self, name) for name in ShardPlan._fields}

    def __len__(self) -> int:
        return len(self.first_sample)

    def __getitem__(self, number: int) -> ShardPlan:
        return ShardPlan(*(int(column[number]) for column in self.columns.values()))

    def __iter__(self) -> Iterator[ShardPlan]:
        return (self[number] for number in range(len(self)))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ShardTable):
            return NotImplemented
        return all(np.array_equal(column, other.columns[name]) for name, column in self.columns.items())

    __hash__ = None  # type: ignore[assignment]

    def __reduce__(self) -> tuple[type["ShardTable"], tuple[np.ndarray, ...]]:
        return ShardTable, tuple(self.columns.values())  # a memoryview has no copy of itself

    def find(self, sample: int) -> int:
        """The number of the shard that holds a sample."""
        return bisect_right(self.starts, sample) - 1

    def since(self, number: int) -> "ShardTable":
        """The shards from this number on."""
        return ShardTable(*(column[number:] for column in self.columns.values()))


NO_SHARDS = ShardTable.of((), (), ())


def write_shards(path: Path, table: ShardTable) -> str:
    """Write a generation's shards into a folder that is not in place yet; the sha256 of the file."""
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, SCHEMA) as writer:
        writer.write_batch(pa.record_batch([pa.array(column) for column in table.columns.values()], schema=SCHEMA))
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_shards(path: Path, *, digest: str, num_shards: int, plan: Path) -> ShardTable:
    """The shards of one generation. plan: the file, for people, that says which digest and number they have.

    Raises CorruptError for a file of another digest, LayoutError for one that is missing or no table.
    """
    try:
        data = read_small(path, num_shards * SHARD_BYTES + FRAME_BYTES)
    except (FileNotFoundError, NotADirectoryError):
        raise LayoutError("it is missing", where=path, hint=SHARDS_HINT) from None
    found = hashlib.sha256(data).hexdigest()
    if found != digest:
        raise CorruptError(f"sha256 {found}, {plan} says {digest}", where=path, hint=SHARDS_HINT)
    try:
        table = pa.ipc.open_file(pa.py_buffer(data)).read_all()
    except (OSError, pa.ArrowException) as err:
        raise LayoutError(f"not readable as Arrow: {err}", where=path, hint=SHARDS_HINT) from None
    if table.schema != SCHEMA or len(table) != num_shards:
        raise LayoutError(f"not {num_shards:,} shards with {', '.join(SCHEMA.names)}", where=path, hint=SHARDS_HINT)
    return ShardTable(*(table.column(name).to_numpy() for name in SCHEMA.names))
