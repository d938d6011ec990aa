"""Which gradients a loss makes: none of a frozen head, and a low-rank one of an adapter on it."""

# Shapes: T tokens, V vocabulary, D width, r rank of the adapter.

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from kdpipe.manifests.specs import LossSpec
from kdpipe.stages.loss import Head, LowRank, Problem, Side, distill, pose
from kdpipe.stages.loss.importance import logprobs

T, V, D, R = 53, 67, 24, 3
LOSS = LossSpec(divergence="jsd", kd_weight=0.6, temperature=1.5, options={"beta": 0.3})


def made(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def posed(student: Side, dtype: torch.dtype = torch.float64) -> Problem:
    teacher = Side(made(T, 2 * D, seed=5, dtype=dtype), Head(made(V, 2 * D, seed=6, dtype=dtype) * 0.3))
    return pose(student, [teacher], torch.arange(T) % V, loss=LOSS)


@pytest.mark.parametrize("chunk", [None, 16])
def test_a_frozen_head_costs_no_product(chunk: int | None) -> None:
    """A trained one costs T*V*D multiplications more."""
    flops = {}
    for trained in (True, False):
        head = Head((made(V, D, seed=2, dtype=torch.bfloat16) * 0.3).requires_grad_(trained))
        side = Side(made(T, D, seed=1, dtype=torch.bfloat16).requires_grad_(), head)
        with FlopCounterMode(display=False) as counter:
            distill(posed(side, torch.bfloat16), chunk_tokens=chunk).loss.backward()
        flops[trained] = counter.get_total_flops()
        assert (head.weight.grad is not None) == trained
        assert side.hidden.grad is not None
    assert flops[True] - flops[False] == 2 * T * V * D


@pytest.mark.parametrize("chunk", [None, 16])
def test_an_adapter_on_the_head_has_the_gradients_of_the_merged_head(chunk: int | None) -> None:
    hidden, weight, rows, up = (
        made(*shape, seed=seed).mul(0.3).requires_grad_()
        for seed, shape in enumerate([(T, D), (V, D), (T, R), (V + 4, R)])
    )
    bias = made(V, seed=9).requires_grad_()
    out = distill(posed(Side(hidden, Head(weight, bias, softcap=7.0), LowRank(rows, up))), chunk_tokens=chunk)
    found = torch.autograd.grad(out.loss, [hidden, weight, rows, up, bias])
    wide = torch.cat([hidden, rows], 1), torch.cat([weight, up[:V]], 1)
    right = distill(posed(Side(wide[0], Head(wide[1], bias, softcap=7.0))))
    assert float(out.loss.detach()) == pytest.approx(float(right.loss.detach()), rel=1e-6)
    for ours, truth in zip(found, torch.autograd.grad(right.loss, [hidden, weight, rows, up, bias]), strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-5, atol=1e-6)


def test_some_rows_of_a_side_keep_their_adapter() -> None:
    side = Side(made(T, D, seed=1), Head(made(V, D, seed=2)), LowRank(made(T, R, seed=3), made(V, R, seed=4)))
    places = torch.tensor([3, 50, 7])
    whole, some = torch.empty(T, V, dtype=torch.float64), torch.empty(3, V, dtype=torch.float64)
    side.raw_logits(0, T, whole)
    side.at(places).raw_logits(0, 3, some)
    torch.testing.assert_close(some, whole[places])
    assert logprobs(Side(side.hidden, side.head), torch.zeros(T, dtype=torch.int64), V, 1.0).shape == (T,)
