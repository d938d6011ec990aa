"""One token a row: which tokens may be drawn, how often, and what is said of them."""

import pytest
import torch
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from kdpipe.stages.draws import uniform
from kdpipe.stages.rollout.sampling import Sampling, pick

ROWS = 20_000


def drawn(logits: torch.Tensor, sampling: Sampling, seed: int = 0) -> torch.Tensor:
    """Ids drawn from one row of logits [V], with a key each."""
    numbers = uniform(torch.arange(ROWS), 1, seed)[:, 0]
    return pick(logits.expand(ROWS, -1), numbers, sampling).ids


@pytest.mark.parametrize("sampling", [
    Sampling(),
    Sampling(temperature=0.5),
    Sampling(temperature=1.7, top_k=4),
    Sampling(top_p=0.6),
    Sampling(temperature=0.8, top_k=5, top_p=0.7),
])  # fmt: skip
def test_tokens_are_drawn_as_often_as_transformers_gives_them_mass(sampling: Sampling) -> None:
    logits = torch.randn(1, 13, generator=torch.Generator().manual_seed(3)) * 2
    scores = TemperatureLogitsWarper(sampling.temperature)(None, logits)
    if sampling.top_k:
        scores = TopKLogitsWarper(sampling.top_k)(None, scores)
    if sampling.top_p < 1.0:
        scores = TopPLogitsWarper(sampling.top_p)(None, scores)
    expected = scores.softmax(-1)[0]
    counts = torch.bincount(drawn(logits[0], sampling), minlength=13)
    assert not counts[expected == 0].any()
    # 5 standard deviations of a binomial.
    assert ((counts / ROWS - expected).abs() <= 5 * (expected * (1 - expected) / ROWS).sqrt() + 1e-12).all()


def test_temperature_zero_takes_the_most_likely_token() -> None:
    logits = torch.randn(7, 50)
    picked = pick(logits, torch.rand(7, dtype=torch.float64), Sampling(temperature=0.0))
    assert picked.ids.equal(logits.argmax(-1))
    assert torch.allclose(picked.logprobs, logits.log_softmax(-1).max(-1).values)


def test_a_token_of_no_mass_is_never_drawn_whatever_the_number() -> None:
    """A number on the edge between two tokens is the later one's: the first whose cumulated mass exceeds it."""
    logits = torch.tensor([[float("-inf"), 0.0, float("-inf"), 0.0, float("-inf")]]).expand(3, -1)
    numbers = torch.tensor([2.0**-49, 0.5, 1 - 2.0**-49], dtype=torch.float64)
    for sampling in (Sampling(), Sampling(top_k=4), Sampling(top_p=0.9)):
        assert pick(logits, numbers, sampling).ids.tolist() == [1, 3, 3]


def test_the_log_probability_is_that_of_the_temperature_before_anything_is_cut_off() -> None:
    logits = torch.randn(5, 40)
    picked = pick(logits, torch.full((5,), 0.3, dtype=torch.float64), Sampling(temperature=0.7, top_k=3, top_p=0.5))
    expected = (logits / 0.7).log_softmax(-1).gather(-1, picked.ids[:, None])[:, 0]
    assert torch.allclose(picked.logprobs, expected)
    assert torch.allclose(picked.entropies, torch.distributions.Categorical(logits=logits).entropy(), rtol=1e-5)
