"""Formulas on rows made for them: ties, entries too small to sum, equal models."""

import math

import pytest
import torch
from tests.stages.loss.cases import CROSS_ENTROPIES, SAMPLED, make_inputs

from kdpipe.stages.loss import DIVERGENCES
from kdpipe.stages.loss.pointwise import Distributions, likeliest, normalised


def test_an_entry_too_small_for_a_sum_in_fp32_is_still_drawn() -> None:
    # One entry of 0.99 and a million that share the rest: 1e-8 each, a sixth of the last place of a sum near 1.
    vocab = 2**20
    small = 0.01 / (vocab - 1)
    p = torch.full((1, vocab), small)
    p[0, 0] = 0.99
    wanted = torch.arange(7, vocab, vocab // 50)
    draws = (p.double().cumsum(-1)[0, wanted] - small / 2) / p.double().sum()  # the middle of each one's share
    both = Distributions(
        p.log(), p, torch.full_like(p, -math.log(vocab)), torch.full_like(p, 1 / vocab), draws=draws[None]
    )
    count = len(wanted)
    _, gradient = DIVERGENCES["sampled_kl"].value_and_grad(both, samples=count, power=1.0)
    drawn = (gradient[0] < -0.5 / count).nonzero()[:, 0]
    assert torch.equal(drawn, wanted)


@pytest.mark.parametrize("divergence", ["adaptive_kl", "top_k_kl", "top_k_reverse_kl"])
def test_of_equal_probabilities_the_first_are_taken(divergence: str) -> None:
    # bf16 rounds a row of 32771 logits to some hundred values
    inputs = make_inputs(7, 32771, dtype=torch.bfloat16)
    teacher, student = inputs.teacher_hidden @ inputs.teacher_head.T, inputs.student_hidden @ inputs.student_head.T
    assert len(teacher[0].unique()) < 3000
    both = Distributions(*(each for logits in (teacher, student.detach()) for each in normalised(logits.float())[:2]))
    wide = [logits.double().log_softmax(-1) for logits in (teacher, student.detach())]
    options = DIVERGENCES[divergence].resolve({})
    found, right = (
        DIVERGENCES[divergence].value_and_grad(both, **options)[0],
        DIVERGENCES[divergence].reference(*wide, **options),
    )
    torch.testing.assert_close(found.double(), right, rtol=3e-6, atol=0.0)


@pytest.mark.parametrize("k", [1, 5, 40])
def test_the_likeliest_are_taken_in_order_and_equals_in_the_vocabularys(k: int) -> None:
    p = torch.randint(0, 30, (20, 500), generator=torch.Generator().manual_seed(k)).float()
    assert torch.equal(likeliest(p, k), p.sort(dim=-1, descending=True, stable=True).indices[:, :k])


@pytest.mark.parametrize("divergence", sorted(DIVERGENCES.keys() - CROSS_ENTROPIES - SAMPLED))
def test_equal_models_have_no_loss_whatever_the_vocabulary(divergence: str) -> None:
    logits = torch.randn(16, 32771, generator=torch.Generator().manual_seed(0)) * 3
    both = Distributions(*normalised(logits)[:2], *normalised(logits)[:2])
    value, gradient = DIVERGENCES[divergence].value_and_grad(both, **DIVERGENCES[divergence].resolve({}))
    assert value.abs().max() < 3e-7  # of log-probabilities near 15
    assert gradient.abs().max() < 1e-7
