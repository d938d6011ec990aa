"""Decoding: coded rows as they lie in a cache travel with the batch; on the device that needs them they become rows.

    stored_rows(codec, parts of some samples) -> tensors by name, which move as any others do
    decoder_of(codec, dtype, device).rows(them) -> [R, E]

What `fisher` adds up can lie in the teacher's head instead: see student/folding.py, which takes its steps.
Invariant: what travels is integers, floats as their bits: a sharded student casts the floats that it is given to the
dtype of its pass.
Cost: the codec's arrays once a device; to decode two operations a column of a row and component, as one product of a
batch. A GPU waits for nothing: what decides a shape is known on the host.
"""

# Shapes: R rows of a batch, E teacher width, K packed components, W words, X exceptions, Y rows stored as they are.

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from kdpipe.manifests.fisher import Fisher
from kdpipe.manifests.fitted import FittedCodec
from kdpipe.manifests.int8 import LIMITS, Int8
from kdpipe.stages.rows import as_tensor

Parts = Mapping[str, np.ndarray]


class Decoder(Protocol):
    """One codec on one device."""

    def rows(self, stored: Mapping[str, Tensor]) -> Tensor:
        """What enters the head that it goes with: rows [R, E] in the dtype that the teacher gave them."""
        ...


class Int8Decoder:
    """Of int8 [R, E] and the bits of scale [R, 1]."""

    def __init__(self, codec: Int8, dtype: torch.dtype, device: torch.device) -> None:
        self._dtype = dtype
        self._mean, self._spread = (
            torch.from_numpy(codec.arrays[name].copy()).to(device) for name in ("mean", "spread")
        )

    def rows(self, stored: Mapping[str, Tensor]) -> Tensor:
        scale = stored["scale"].view(torch.float32)
        return finished(stored["int8"].float() * scale * self._spread + self._mean, self._dtype)


class FisherDecoder:
    """Of packed [R, W], exceptions (row, place, difference [X] each), rows as they are ([Y], their bytes)."""

    def __init__(self, codec: Fisher, dtype: torch.dtype, device: torch.device) -> None:
        self._dtype = dtype
        self._word, self._factor, self._levels = (
            torch.from_numpy(each).to(device) for each in (codec.radix.word, codec.radix.factor, codec.radix.levels)
        )
        self._mean, self._lowest, self._synthesis = (
            torch.from_numpy(each.astype(np.float32)).to(device) for each in (codec.mean, codec.lowest, codec.synthesis)
        )

    def rows(self, stored: Mapping[str, Tensor]) -> Tensor:
        return finished(self.exact(stored), self._dtype)

    def exact(self, stored: Mapping[str, Tensor]) -> Tensor:
        """The same before they are rounded, float32."""
        found = torch.addmm(self._mean, self.steps(stored), self._synthesis)
        if len(stored["whole_row"]):
            found[stored["whole_row"]] = self.whole(stored)
        return found

    def steps(self, stored: Mapping[str, Tensor]) -> Tensor:
        """q, whole numbers, float32 [R, E]; of rows that are stored as they are it says nothing."""
        words = stored["packed"].long() & 0xFFFFFFFF
        digits = words[:, self._word] // self._factor % self._levels
        steps = self._lowest.repeat(len(words), 1)
        steps[:, : digits.shape[1]] += digits
        steps.index_put_((stored["row"], stored["place"]), stored["difference"].float(), accumulate=True)
        return steps

    def whole(self, stored: Mapping[str, Tensor]) -> Tensor:
        """The rows that are stored as they are, float32 [Y, E]."""
        return stored["whole"].view(self._dtype).float()


def finished(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """float32 rows in the teacher's dtype, none beyond its largest number."""
    limits = LIMITS.get(str(dtype).removeprefix("torch."))
    return (rows if limits is None else rows.clamp(*map(float, limits))).to(dtype)


DECODERS: dict[type, Callable[..., Decoder]] = {Int8: Int8Decoder, Fisher: FisherDecoder}


def decoder_of(codec: FittedCodec, dtype: torch.dtype, device: torch.device) -> Decoder:
    """The codec's decoder, its arrays on the device."""
    return DECODERS[type(codec)](codec, dtype, device)


def stored_rows(codec: FittedCodec, parts: Sequence[Parts], *, pin: bool = False) -> dict[str, Tensor]:
    """The rows of some samples as they are stored, one after the other, in tensors of their own."""
    empty = {
        name: part[:0] for name, part in codec.encode(np.zeros((0, len(codec.arrays["mean"])), np.float32)).items()
    }
    whole = {name: np.concatenate([empty[name], *(each[name] for each in parts)]) for name in empty}
    found = split_exceptions(codec, whole) if isinstance(codec, Fisher) else whole
    found = {name: array.view(np.int32) if array.dtype == np.float32 else array for name, array in found.items()}
    tensors = {name: as_tensor(np.ascontiguousarray(array)) for name, array in found.items()}
    return {name: tensor.pin_memory() for name, tensor in tensors.items()} if pin else tensors


def split_exceptions(codec: Fisher, stored: Parts) -> dict[str, np.ndarray]:
    """What FisherDecoder takes: exceptions by row, those that are a row's bytes put together to the row."""
    row = np.repeat(np.arange(len(stored["packed"])), stored["num_exceptions"])
    place, value = stored["exception_places"].astype(np.int64), stored["exception_differences"]
    is_byte = place >= len(codec.mean)
    whole_row = row[is_byte]
    whole_row = whole_row[np.flatnonzero(np.diff(whole_row, prepend=-1))]
    usual = ~is_byte
    return {
        "packed": stored["packed"].view(np.int32),
        "row": row[usual],
        "place": place[usual],
        "difference": value[usual],
        "whole_row": whole_row,
        "whole": value[is_byte].reshape(len(whole_row), -1) if len(whole_row) else value[:0, None],
    }
