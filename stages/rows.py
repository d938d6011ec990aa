"""Rows as bytes: one view for torch and one digest, the same for every engine and for the gate.

Invariant: nothing here changes or copies a row; bf16 goes between numpy (ml_dtypes) and torch as 16-bit patterns.
"""

import ml_dtypes
import numpy as np
import torch
import xxhash

TORCH_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def as_tensor(array: np.ndarray) -> torch.Tensor:
    """A writable C-contiguous array of bf16 (ml_dtypes), fp16 or fp32 as a tensor over the same memory."""
    if array.dtype.name != "bfloat16":
        return torch.from_numpy(array)
    return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)


# A number is infinite or NaN exactly when its exponent is all ones: as an integer without its sign, from here on.
# By dtype: that integer, the mask that takes the sign away, the first value that is not finite.
NOT_FINITE = {
    "bfloat16": (np.uint16, 0x7FFF, 0x7F80),
    "float16": (np.uint16, 0x7FFF, 0x7C00),
    "float32": (np.uint32, 0x7FFF_FFFF, 0x7F80_0000),
}


def not_finite(array: np.ndarray) -> np.ndarray:
    """Indices of the rows of [R, E] that hold NaN or infinity; 0.2 ns an element, where torch.isfinite takes 10."""
    integer, mask, first = NOT_FINITE[array.dtype.name]
    magnitudes: np.ndarray = array.view(integer) & np.asarray(mask, dtype=integer)
    return np.flatnonzero(magnitudes.max(axis=1, initial=0) >= first)


def checksum(array: np.ndarray) -> int:
    """xxh3-64 of the array's bytes; about 20 GB/s a core."""
    return xxhash.xxh3_64_intdigest(array.view(np.uint8).data)


def as_array(tensor: torch.Tensor) -> np.ndarray:
    """A CPU tensor of bf16, fp16 or fp32 as an array over the same memory (bf16 through ml_dtypes)."""
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()
