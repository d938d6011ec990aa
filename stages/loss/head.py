"""Side: one model's half of a loss, its hidden states and its head, and whether they fit each other."""

# Shapes: T tokens, V vocabulary, r rank of an adapter on the head.

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kdpipe.manifests.errors import ConfigError
from kdpipe.stages.loss.divergences import is_number
from kdpipe.stages.models.head import Head

DTYPES = {torch.float64, torch.float32, torch.bfloat16, torch.float16}


@dataclass(frozen=True, slots=True, eq=False)
class LowRank:
    """What an adapter adds to a head's raw logits: rows [T, r] @ up [V, r].T. Its gradient takes no [V, width]."""

    rows: Tensor
    up: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Side:
    """One model's half of a loss: the rows that enter its head [T, width], the head, and an adapter on it."""

    hidden: Tensor
    head: Head
    low: LowRank | None = None
    is_ranked: ClassVar[bool] = True
    """Whether its likeliest tokens are known, and so the metrics that compare them."""

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """What a loss may have gradients to: hidden, weight, bias, and rows and up of the adapter."""
        low = (None, None) if self.low is None else (self.low.rows, self.low.up)
        return self.hidden, self.head.weight, self.head.bias, *low

    def at(self, places: Tensor) -> "Side":
        """Some of its rows, by places int64 [K]."""
        low = None if self.low is None else LowRank(self.low.rows[places], self.low.up)
        return Side(self.hidden[places], self.head, low)

    def dense(self, vocab_size: int) -> Tensor:
        """Finished logits [T, V] in fp32, or in fp64 where the hidden states are fp64; differentiable."""
        dtype = torch.promote_types(self.hidden.dtype, torch.float32)
        raw = self.hidden.to(dtype) @ self.head.weight[:vocab_size].to(dtype).T
        if self.low is not None:
            raw = raw + self.low.rows.to(dtype) @ self.low.up[:vocab_size].to(dtype).T
        return self.head.finish.apply(raw, self.head.bias)

    def raw_logits(self, start: int, stop: int, out: Tensor) -> Tensor:
        """hidden[start:stop] @ weight.T into out's first rows [stop - start, V], in the inputs' dtype, unfinished."""
        raw = torch.mm(self.hidden[start:stop], self.head.weight[: out.shape[1]].T, out=out[: stop - start])
        return raw if self.low is None else raw.addmm_(self.low.rows[start:stop], self.low.up[: out.shape[1]].T)

    def check(self, vocab_size: int, owner: str) -> None:
        """ConfigError where the head does not fit its rows or is smaller than the vocabulary."""
        weight, bias, softcap = self.head.weight, self.head.bias, self.head.softcap
        if self.hidden.dim() != 2 or weight.dim() != 2:
            shapes = f"{list(self.hidden.shape)} and {list(weight.shape)}"
            raise ConfigError(f"expected hidden [T, width] and head [rows, width], got {shapes}", where=owner)
        rows, width = weight.shape
        for tensor in (self.hidden, weight, *([] if bias is None else [bias])):
            if tensor.dtype not in DTYPES:
                raise ConfigError(f"expected floating-point numbers, got {tensor.dtype}", where=owner)
        if self.hidden.shape[1] != width:
            raise ConfigError(
                f"hidden states are {self.hidden.shape[1]} wide, the head takes {width}; are they of one model?",
                where=owner,
            )
        if self.hidden.dtype != weight.dtype:
            raise ConfigError(
                f"hidden states are {self.hidden.dtype}, the head is {weight.dtype}; cast one of them", where=owner
            )
        if not isinstance(vocab_size, int) or not 0 < vocab_size <= rows:
            raise ConfigError(f"the head has {rows} rows, vocab_size is {vocab_size}; use 1..{rows}", where=owner)
        if bias is not None and bias.shape != (rows,):
            raise ConfigError(f"expected a bias of {rows} numbers, got {list(bias.shape)}", where=owner)
        if softcap is not None and not (is_number(softcap) and 0 < softcap < float("inf")):
            raise ConfigError(f"softcap must be a number above 0, got {softcap!r}; None means no softcap", where=owner)
        if not (is_number(self.head.scale) and 0 < abs(self.head.scale) < float("inf")):
            raise ConfigError(f"scale must be a number other than 0, got {self.head.scale!r}", where=owner)
