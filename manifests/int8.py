"""int8: a byte a number, by a scale of its channel and one of its row.

    row = mean + spread * scale * int8        mean, spread [E] fitted to the teacher, scale of the row's largest number

A channel of large numbers so takes nothing from the others, and one that is always about the same number takes nothing
at all. Cost: E + 4 bytes a row; encoding and decoding are a few operations a number, the same bits everywhere.
"""

# Shapes: R rows, E teacher width.

from collections.abc import Mapping
from typing import ClassVar

import numpy as np

from kdpipe.manifests.codec import TensorSpec
from kdpipe.manifests.specs import Dtype

LARGEST = 127
SCALES = np.float32(1e-30), np.float32(1e36)
"""Between which a row's scale is: a number beyond comes back as the largest there is, and never as none."""


class Int8:
    """The codec of these arrays: mean, spread float32 [E]."""

    ARRAYS: ClassVar[tuple[str, ...]] = ("mean", "spread")

    def __init__(self, arrays: Mapping[str, np.ndarray]) -> None:
        self.arrays = dict(arrays)
        self._mean, self._spread = arrays["mean"], arrays["spread"]

    def tensors(self, num_rows: int, width: int, dtype: Dtype) -> list[TensorSpec]:
        return [("int8", "I8", (num_rows, width)), ("scale", "F32", (num_rows, 1))]

    def encode(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        scaled = (rows.astype(np.float32) - self._mean) / self._spread
        scale = (np.abs(scaled).max(1, keepdims=True, initial=0) / np.float32(LARGEST)).clip(*SCALES)
        return {"int8": np.rint(scaled / scale).clip(-LARGEST, LARGEST).astype(np.int8), "scale": scale}

    def decode(self, parts: Mapping[str, np.ndarray], out: np.ndarray) -> None:
        rows = parts["int8"].astype(np.float32)
        rows *= parts["scale"]
        rows *= self._spread
        rows += self._mean
        out[...] = within(rows, out.dtype)


def within(rows: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """float32 rows as they fit a dtype, in place: what rounding would carry over its largest number is that number."""
    return np.clip(rows, *LIMITS[dtype.name], out=rows) if dtype.name in LIMITS else rows


LIMITS = {"float16": (np.float32(-65504), np.float32(65504))}
"""Largest numbers of the dtypes that rows come near."""
