"""Codecs: how the rows of a cache are stored, and come back as numbers.

    parts = codec.encode(rows)        rows [R, E] as the teacher gave them -> the shard's tensors by name, [R, ...] each
    codec.decode(parts, out)          out [R, E] in the dtype of the plan

A plan names one: "raw", or one of your own, added to `CODECS` by a process; or one that is fitted to the teacher, whose
numbers lie in the cache (fitted.py).
Invariant: each row is stored by itself in a fixed number of bytes, so that any run of rows is read alone: encoding some
rows gives those rows of all the tensors. What does not fit there follows in a ragged part, some entries for each row.
Cost: raw copies nothing; another codec costs a copy of the rows that are read, and one of a shard's while it is filled.
"""

# Shapes: R rows, E teacher width, X entries of the ragged part.

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from kdpipe.manifests.specs import Dtype
from kdpipe.manifests.tensorfile import DTYPES, TAGS

TensorSpec = tuple[str, str, tuple[int, ...]]
"""Name, dtype by its safetensors tag, shape."""
ENCODED_ROWS = 4096
"""Rows that a writer encodes at a time."""


@dataclass(frozen=True, slots=True)
class Ragged:
    """Entries that some rows have more of than others; they lie behind a shard's tables.

    counts: the codec's tensor [R] that says how many each row has
    tensors: name and dtype by its safetensors tag, [X] each
    """

    counts: str
    tensors: tuple[tuple[str, str], ...]

    @property
    def entry_bytes(self) -> int:
        return sum(DTYPES[tag].itemsize for _, tag in self.tensors)


class Codec(Protocol):
    """One way to store rows. Its tensors lie in a shard in this order, before the tables.

    One that has a ragged part says so by an attribute `ragged`; encode and decode then have its tensors too.
    """

    def tensors(self, num_rows: int, width: int, dtype: Dtype) -> list[TensorSpec]:
        """The tensors of so many rows of the teacher's width and dtype, [num_rows, ...] each."""
        ...

    def encode(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """Rows [R, E] as these tensors, by name."""
        ...

    def decode(self, parts: Mapping[str, np.ndarray], out: np.ndarray) -> None:
        """Write the rows that these tensors hold into out [R, E]."""
        ...


class Raw:
    """Rows as they come; a reader sees them in the file, without a copy."""

    def tensors(self, num_rows: int, width: int, dtype: Dtype) -> list[TensorSpec]:
        return [("hidden", TAGS[dtype], (num_rows, width))]

    def encode(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        return {"hidden": rows}

    def decode(self, parts: Mapping[str, np.ndarray], out: np.ndarray) -> None:
        out[...] = parts["hidden"]


RAW = Raw()
CODECS: dict[str, Codec] = {"raw": RAW}
"""By the name that a plan has. One's own is added before a cache of it is made or read."""


def ragged_of(codec: Codec) -> Ragged | None:
    """Its ragged part, None for a codec all of whose rows are of one size."""
    return getattr(codec, "ragged", None)


def some_rows(codec: Codec, parts: Mapping[str, np.ndarray], rows: np.ndarray) -> dict[str, np.ndarray]:
    """The parts of some of the rows that parts hold, by their places, rising."""
    ragged = ragged_of(codec)
    if ragged is None:
        return {name: part[rows] for name, part in parts.items()}
    counts, entries = parts[ragged.counts], {name for name, _ in ragged.tensors}
    wanted = np.isin(np.repeat(np.arange(len(counts)), counts), rows)
    return {name: part[wanted] if name in entries else part[rows] for name, part in parts.items()}


def num_bytes(codec: Codec, num_rows: int, width: int, dtype: Dtype) -> int:
    """Bytes of so many rows, without a ragged part."""
    return sum(math.prod(shape) * DTYPES[tag].itemsize for _, tag, shape in codec.tensors(num_rows, width, dtype))


def as_stored(codec: Codec, rows: np.ndarray) -> np.ndarray:
    """Rows [R, E] as a reader of a cache will see them: those given, where nothing is lost."""
    if isinstance(codec, Raw):
        return rows
    out = np.empty_like(rows)
    codec.decode(codec.encode(rows), out)
    return out
