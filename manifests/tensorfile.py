"""Tensor files: the safetensors container, with a header padded to a page so that the first tensor starts on one.

A file is 8 bytes of little-endian header length, that many bytes of JSON (padded with spaces), then the tensors one
after the other with no gaps. The whole layout is a pure function of names, dtypes and shapes, so the size of a file
is known before its content is. Format: github.com/huggingface/safetensors; ours is a subset any reader opens.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import ml_dtypes
import numpy as np

from kdpipe.manifests.errors import LayoutError

PAGE = 4096
MAX_HEADER_BYTES = 1 << 20

DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
}
TAGS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "uint8": "U8"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Tensor:
    """One tensor's place: `begin` and `end` are byte offsets from the start of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    def view(self, buffer: memoryview | np.ndarray, at: int = 0) -> np.ndarray:
        """The tensor as an array over a buffer that holds the file from byte `at` on; no copy."""
        return np.ndarray(self.shape, DTYPES[self.dtype], buffer=buffer, offset=self.begin - at)


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """A whole file: its header bytes, its tensors by name, its size in bytes."""

    header: bytes
    tensors: Mapping[str, Tensor]
    num_bytes: int

    @property
    def body(self) -> int:
        """Byte offset at which the first tensor starts."""
        return len(self.header)


def lay_out(tensors: Sequence[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str]) -> Layout:
    """The layout of a file holding (name, dtype, shape) tensors in this order."""
    places, offset = [], 0
    for name, dtype, shape in tensors:
        size = math.prod(shape) * DTYPES[dtype].itemsize
        places.append((name, dtype, shape, offset, offset + size))
        offset += size
    tree: dict[str, object] = {"__metadata__": dict(metadata)}
    for name, dtype, shape, begin, end in places:
        tree[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(tree, separators=(",", ":")).encode()
    body = -(-(8 + len(text)) // PAGE) * PAGE
    header = (body - 8).to_bytes(8, "little") + text.ljust(body - 8)
    return Layout(
        header=header,
        tensors={n: Tensor(name=n, dtype=d, shape=s, begin=body + b, end=body + e) for n, d, s, b, e in places},
        num_bytes=body + offset,
    )


def parse(buffer: memoryview, where: object) -> tuple[Layout, dict[str, str]]:
    """The layout and metadata of a file held in `buffer`. Raises LayoutError for whatever is not as written above."""

    def refuse(what: str) -> LayoutError:
        return LayoutError(f"not a tensor file: {what}", where=where)

    if len(buffer) < 8:
        raise refuse(f"{len(buffer)} bytes, a header length takes 8")
    body = 8 + int.from_bytes(buffer[:8], "little")
    if body > min(len(buffer), 8 + MAX_HEADER_BYTES):
        raise refuse(f"a header of {body - 8} bytes in a file of {len(buffer)}")
    try:
        tree = json.loads(bytes(buffer[8:body]))
        metadata = {str(key): str(value) for key, value in tree.pop("__metadata__", {}).items()}
        tensors = {name: _tensor(name, entry, body) for name, entry in tree.items()}
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as err:
        raise refuse(f"header: {type(err).__name__}: {err}") from None
    end = body
    for tensor in sorted(tensors.values(), key=lambda tensor: (tensor.begin, tensor.end)):
        size = math.prod(tensor.shape) * DTYPES[tensor.dtype].itemsize
        if tensor.begin != end or tensor.end - tensor.begin != size or size < 0:
            raise refuse(f"'{tensor.name}' lies at {tensor.begin}-{tensor.end}, expected {end}-{end + size}")
        end = tensor.end
    if end != len(buffer):
        raise refuse(f"tensors end at byte {end}, the file at {len(buffer)}")
    return Layout(header=bytes(buffer[:body]), tensors=tensors, num_bytes=end), metadata


def _tensor(name: str, entry: dict, body: int) -> Tensor:
    begin, end = (int(offset) for offset in entry["data_offsets"])
    shape = tuple(int(size) for size in entry["shape"])
    if entry["dtype"] not in DTYPES or any(size < 0 for size in shape):
        raise ValueError(f"'{name}' is {entry['dtype']} {list(shape)}")
    return Tensor(name=name, dtype=entry["dtype"], shape=shape, begin=body + begin, end=body + end)
