"""Sampling: the next token of each row, from its logits and one number in (0, 1).

    logits / temperature -> the top_k largest -> the most likely ones that reach top_p -> where `uniform` falls in them

Invariant: a pure function; the numbers come from `draws`, so a row depends on its own key and logits alone.
The cuts come in the order of transformers and SGLang: temperature, top-k, then top-p of what that left.
"""

# Shapes: B rows, V vocabulary.

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How an answer is written.

    temperature: logits are divided by it; 0 takes the most likely token each time
    top_p: least mass of the most likely tokens among which one is drawn; 1 draws among all
    top_k: how many of the most likely tokens one is drawn among; 0 draws among all
    max_new_tokens: longest answer
    stop_ids: tokens that end an answer, and belong to it
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_new_tokens: int = 512
    stop_ids: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True, eq=False)
class Picked:
    """ids int64 [B], log-probability of each under softmax(logits / temperature) fp32 [B], entropy of softmax(logits).

    The log-probability is that before top_k and top_p cut anything off; of temperature 0 it is that of temperature 1.
    """

    ids: Tensor
    logprobs: Tensor
    entropies: Tensor


def pick(logits: Tensor, uniform: Tensor, sampling: Sampling) -> Picked:
    """The next token of rows of logits [B, V]; uniform: fp64 [B], one number in (0, 1) for each."""
    logits = logits.float()
    raw = logits.log_softmax(-1)
    entropies = -(raw.exp() * raw).nan_to_num(0.0).sum(-1)  # 0 * log 0 is 0
    greedy = sampling.temperature == 0.0
    scaled = raw if greedy or sampling.temperature == 1.0 else (logits / sampling.temperature).log_softmax(-1)
    ids = logits.argmax(-1) if greedy else _drawn(scaled, uniform, sampling)
    return Picked(ids, scaled.gather(-1, ids[:, None])[:, 0], entropies)


def _drawn(logprobs: Tensor, uniform: Tensor, sampling: Sampling) -> Tensor:
    """By inversion: the first of the sorted tokens whose cumulated mass exceeds uniform times all that was left."""
    count = min(sampling.top_k or logprobs.shape[-1], logprobs.shape[-1])
    if count < logprobs.shape[-1] or sampling.top_p < 1.0:
        sorted_, order = logprobs.sort(dim=-1, descending=True, stable=True)
        masses = sorted_[:, :count].double().exp()
        if sampling.top_p < 1.0:
            before = masses.cumsum(-1) - masses
            masses = masses.where(before < sampling.top_p * masses.sum(-1, keepdim=True), 0.0)
        return order.gather(-1, _fallen_into(masses, uniform))[:, 0]
    return _fallen_into(logprobs.double().exp(), uniform)[:, 0]


def _fallen_into(masses: Tensor, uniform: Tensor) -> Tensor:
    """[B, 1] the column where uniform * sum falls in the cumulated masses [B, V]; never one of mass 0."""
    sums = masses.cumsum(-1)
    wanted = uniform.to(sums.device)[:, None] * sums[:, -1:]
    return torch.searchsorted(sums, wanted, right=True).clamp_max(masses.shape[-1] - 1)
