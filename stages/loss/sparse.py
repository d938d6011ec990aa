"""Sparse sides: teachers of which a row has a few numbers of their distribution, and no hidden state (side-cars).

Each stands for its teacher by logits [C, V] that are right for the divergences which it serves, and for no others.
What those are is said by Divergence.is_of; the rows are described in manifests/sidecar.py.
"""

# Shapes: T tokens, V vocabulary, K tokens of a row, W bytes of an id.

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kdpipe.manifests.sidecar import MEAN_BYTES, id_bytes
from kdpipe.stages.loss.head import Side
from kdpipe.stages.models.head import Head

LEAST_LEFT = 1e-12
"""Probability that the tokens which are not known have at least: their sum may have been scaled to 1."""
NEVER = -1e4
"""A logit of probability 0 in fp32, that takes part in sums without a NaN."""


class TopKSide(Side):
    """A teacher of which a row has the K likeliest tokens alone: hidden [T, 2 K] is their log-probabilities, then ids.

    Its logits are log-probabilities: those of the K, and what they leave of 1 spread evenly over all others, which is
    right for a loss that looks at the K and at the others' sum, and for no other.
    """

    @classmethod
    def of(cls, rows: Tensor, vocab_size: int) -> "TopKSide":
        """Of rows [T, 2 K]; its head is none, but takes them."""
        return cls(rows, _no_head(rows, vocab_size))

    def dense(self, vocab_size: int) -> Tensor:
        out = self.hidden.new_empty(len(self.hidden), vocab_size)
        return self.raw_logits(0, len(self.hidden), out)

    def raw_logits(self, start: int, stop: int, out: Tensor) -> Tensor:
        logprobs, ids = self.hidden[start:stop].chunk(2, dim=-1)
        others = max(out.shape[1] - ids.shape[1], 1)
        left = (1.0 - logprobs.double().exp().sum(-1, keepdim=True)).clamp_min(LEAST_LEFT)
        rows = out[: stop - start]
        rows.copy_((left.log() - math.log(others)).expand_as(rows))
        return rows.scatter_(1, ids.long(), logprobs.to(out.dtype))


class TokenSide(TopKSide):
    """A teacher of which the log-probability of the token that follows is known: a TopKSide of that one token."""

    is_ranked: ClassVar[bool] = False

    @classmethod
    def of_tokens(cls, rows: Tensor, tokens: Tensor, vocab_size: int) -> "TokenSide":
        """Of rows [T, 1] and the tokens that follow, int64 [T]."""
        both = torch.cat([rows, tokens[:, None].to(rows.dtype)], -1)
        return cls(both, _no_head(both, vocab_size))


@dataclass(frozen=True, slots=True, eq=False)
class DrawnSide(Side):
    """A teacher of which a row has K tokens that were drawn from it: hidden [T, K] is their ids, as numbers.

    Its distribution is that of the draws, a token's share of them. Where a divergence is linear in the teacher's
    distribution its mean over draws is the teacher's own, and so is its gradient's.
    mean_logprob: of the drawn tokens, fp32 [T]: what makes a KL of a cross-entropy, on average
    """

    mean_logprob: Tensor | None = None
    is_ranked: ClassVar[bool] = False

    @classmethod
    def of(cls, rows: Tensor, vocab_size: int) -> "DrawnSide":
        """Of rows uint8 [T, 4 + K W]."""
        mean = rows.new_empty(len(rows), MEAN_BYTES).copy_(rows[:, :MEAN_BYTES]).view(torch.float32)[:, 0]
        size = id_bytes(vocab_size)
        digits = rows[:, MEAN_BYTES:].reshape(len(rows), (rows.shape[1] - MEAN_BYTES) // size, size).long()
        ids = (digits << (8 * torch.arange(digits.shape[-1], device=rows.device))).sum(-1).float()
        return cls(ids, _no_head(ids, vocab_size), mean_logprob=mean)

    def dense(self, vocab_size: int) -> Tensor:
        out = self.hidden.new_empty(len(self.hidden), vocab_size)
        return self.raw_logits(0, len(self.hidden), out)

    def raw_logits(self, start: int, stop: int, out: Tensor) -> Tensor:
        ids = self.hidden[start:stop].long()
        rows = out[: stop - start].zero_()
        rows.scatter_add_(1, ids, torch.full_like(self.hidden[start:stop], 1.0 / ids.shape[1]).to(rows.dtype))
        return rows.log_().clamp_min_(NEVER)


def _no_head(rows: Tensor, vocab_size: int) -> Head:
    """What stands for the head of rows that none is multiplied with."""
    return Head(rows.new_zeros(1, 1).expand(vocab_size, rows.shape[1]))
