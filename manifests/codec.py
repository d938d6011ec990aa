"""Codecs: how the rows of a cache are stored, and come back as numbers. One table, `CODECS`; a process may add to it.

    parts = codec.encode(rows)        rows [R, E] as the teacher gave them -> the shard's tensors by name, [R, ...] each
    codec.decode(parts, out)          out [R, E] in the dtype of the plan

Invariant: each row is stored by itself in a fixed number of bytes, so that a shard's size is known before the teacher
runs and any run of rows is read alone: encoding some rows gives those rows of all the tensors.
Cost: raw copies nothing; another codec costs a copy of the rows that are read, and one of a shard's while it is filled.
"""

# Shapes: R rows, E teacher width.

import math
from collections.abc import Mapping
from typing import Protocol

import numpy as np

from kdpipe.manifests.errors import ConfigError
from kdpipe.manifests.nearest import nearest
from kdpipe.manifests.specs import Dtype
from kdpipe.manifests.tensorfile import DTYPES, TAGS

TensorSpec = tuple[str, str, tuple[int, ...]]
"""Name, dtype by its safetensors tag, shape."""
ENCODED_ROWS = 4096
"""Rows that a writer encodes at a time."""


class Codec(Protocol):
    """One way to store rows. Its tensors lie in a shard in this order, before the tables."""

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


CODECS: dict[str, Codec] = {"raw": Raw()}
"""By the name that a plan has. One's own is added before a cache of it is made or read."""


def find_codec(name: str, *, where: object) -> Codec:
    """The codec of this name. Raises ConfigError for one that is not in CODECS; where: what asks for it."""
    if name not in CODECS:
        known = ", ".join(sorted(CODECS))
        raise ConfigError(
            f"there is no codec '{name}' here{nearest(name, CODECS)} (known: {known}); one of your own is added to "
            "kdpipe.manifests.codec.CODECS first",
            where=where,
        )
    return CODECS[name]


def num_bytes(codec: Codec, num_rows: int, width: int, dtype: Dtype) -> int:
    """Bytes of so many rows."""
    return sum(math.prod(shape) * DTYPES[tag].itemsize for _, tag, shape in codec.tensors(num_rows, width, dtype))


def as_stored(codec: Codec, rows: np.ndarray) -> np.ndarray:
    """Rows [R, E] as a reader of a cache will see them: those given, where nothing is lost."""
    if isinstance(codec, Raw):
        return rows
    out = np.empty_like(rows)
    codec.decode(codec.encode(rows), out)
    return out
