"""Head: what turns a hidden state into logits, with the model family's own final touches; and its canary.

Definition, in the order of the transformers modelling files (Cohere, Granite, Gemma 2 and 3):
    logits = (hidden @ weight.T + bias) * scale;  if softcap: logits = softcap * tanh(logits / softcap)
Cohere gives scale = logit_scale, Granite scale = 1 / logits_scaling, Gemma softcap = final_logit_softcapping.
Invariant: a head owns no memory and is never changed.
"""

# Shapes: T tokens, V vocabulary, D width, R rows in a block, M chosen entries of the vocabulary.

import warnings
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kdpipe.manifests.cache import HeadArrays
from kdpipe.manifests.teacher import HeadRecord

CHUNK_ENTRIES = 2048
"""fp32 copies of the head exist for so many entries at a time: 16384 take twice as long, out of the cache."""

COLUMN_ELEMENTS = 1 << 17
"""fp32 elements of the head's rows that are gathered at a time."""

FLOAT32_ERROR = 1e-5
"""What fp32 sums in another order differ by, relative to the logits' root mean square: measured 2e-7 to 1e-6."""


@dataclass(frozen=True, slots=True)
class Finish:
    """What follows the matrix product: bias, scale and softcap, on fp32 logits [R, V]."""

    scale: float = 1.0
    softcap: float | None = None

    def apply(self, raw: Tensor, bias: Tensor | None) -> Tensor:
        logits = raw if bias is None else raw + bias[: raw.shape[1]].to(raw.dtype)
        if self.scale != 1.0:
            logits = logits * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def slope(self, logits: Tensor, gradient: Tensor) -> Tensor:
        """The gradient with respect to raw logits (and to the bias) from that with respect to finished ones."""
        if self.softcap is not None:
            gradient = gradient * (1.0 - (logits / self.softcap).square())
        return gradient if self.scale == 1.0 else gradient * self.scale


@dataclass(frozen=True, slots=True, eq=False)
class Head:
    """An output head: weight [rows, D], bias [rows], final softcap and scale; rows may exceed the vocabulary."""

    weight: Tensor
    bias: Tensor | None = None
    softcap: float | None = None
    scale: float = 1.0

    def logits(self, hidden: Tensor, vocab_size: int) -> Tensor:
        """Logits [T, V] of hidden [T, D], dense and differentiable, in the operands' dtype."""
        bias = None if self.bias is None else self.bias[:vocab_size]
        logits = torch.nn.functional.linear(hidden, self.weight[:vocab_size], bias) * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def entries(self, hidden: Tensor, start: int, stop: int) -> Tensor:
        """Logits [T, stop-start] in fp32 of hidden [T, D] for the vocabulary entries start:stop."""
        bias = None if self.bias is None else self.bias[start:stop]
        return self.finish.apply(hidden.float() @ self.weight[start:stop].float().T, bias)

    def chosen(self, hidden: Tensor, ids: Tensor) -> Tensor:
        """Logits [T, M] in fp32 of hidden [T, D] for other entries in each row, ids [T, M]."""
        block = max(1, COLUMN_ELEMENTS // (ids.shape[1] * hidden.shape[1]))
        products = [
            torch.linalg.vecdot(self.weight[entries].float(), some[:, None].float())
            for some, entries in zip(hidden.split(block), ids.split(block), strict=True)
        ]
        raw = torch.cat(products)
        return self.finish.apply(raw if self.bias is None else raw + self.bias[ids].float(), None)

    def error(self, hidden: Tensor, logits: Tensor) -> float:
        """rms(formula(hidden) - logits) / rms(logits) of the model's own logits [T, rows]; inf for other shapes."""
        if logits.shape != (len(hidden), len(self.weight)):
            return float("inf")
        off = total = 0.0
        for start in range(0, len(self.weight), CHUNK_ENTRIES):
            own = logits[:, start : start + CHUNK_ENTRIES].double()
            ours = self.entries(hidden.to(self.weight.device), start, start + own.shape[1]).to(own.device)
            off += float((ours - own).square().sum())
            total += float(own.square().sum())
        return (off / total) ** 0.5 if total else off**0.5

    @property
    def dtype(self) -> str:
        """ "bfloat16", "float16" or "float32"."""
        return str(self.weight.dtype).removeprefix("torch.")

    @property
    def allowed_error(self) -> float:
        """Of a formula that is the model's own: fp32 summation, or the rounding of each logit to the head's dtype."""
        return max(FLOAT32_ERROR, torch.finfo(self.weight.dtype).eps)

    @property
    def finish(self) -> Finish:
        return Finish(scale=self.scale, softcap=self.softcap)


def loaded_head(arrays: HeadArrays, record: HeadRecord, device: torch.device) -> Head:
    """A cache's head as tensors on `device`, in the dtype it was extracted in."""

    def tensor(array: np.ndarray | None) -> Tensor | None:
        if array is None:
            return None
        with warnings.catch_warnings():
            # Read-only by intent: the head is frozen.
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            bits = torch.from_numpy(array.view(np.uint8))
        return bits.view(getattr(torch, record.dtype)).to(device)

    weight = tensor(arrays.weight)
    assert weight is not None
    return Head(weight=weight, bias=tensor(arrays.bias), softcap=record.softcap, scale=record.scale)
