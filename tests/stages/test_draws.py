"""Draws: splitmix64's own values, and numbers that depend on seed, key and column alone."""

import torch

from kdpipe.stages.draws import mixed, mixed_seed, uniform


def test_mixed_is_splitmix64() -> None:
    # The first outputs of the reference implementation started at 0: its state grows by the golden gamma.
    gamma = 0x9E3779B97F4A7C15
    states = torch.tensor([(k * gamma + 2**63) % 2**64 - 2**63 for k in range(3)])
    assert [value % 2**64 for value in mixed(states).tolist()] == [
        0xE220A8397B1DCDAF,
        0x6E789E6AA1B965F4,
        0x06C45D188009454F,
    ]


def test_a_row_depends_on_its_key_and_the_seed_alone() -> None:
    keys = torch.arange(100) * 7
    whole = uniform(keys, 5, seed=3)
    assert torch.equal(uniform(keys[40:50], 5, seed=3), whole[40:50])
    assert torch.equal(uniform(keys.flip(0), 9, seed=3)[:, :5], whole.flip(0))
    assert not (uniform(keys, 5, seed=4) == whole).any()


def test_seeds_of_several_numbers_are_told_apart() -> None:
    assert len({mixed_seed(a, b) for a in range(30) for b in range(30)}) == 900


def test_numbers_are_uniform_and_independent() -> None:
    drawn = uniform(torch.arange(50_000), 4, seed=0)
    assert drawn.min() > 0
    assert drawn.max() < 1
    assert abs(drawn.mean() - 0.5) < 4 * (1 / 12 / drawn.numel()) ** 0.5
    counts = torch.histc(drawn, 100, 0, 1)
    assert ((counts - 2000) ** 2 / 2000).sum() < 99 + 4 * (2 * 99) ** 0.5  # chi squared of 99 degrees, 4 sigma
    between = torch.corrcoef(drawn.T) - torch.eye(4)
    assert between.abs().max() < 4 / 50_000**0.5


def test_no_number_can_be_zero_or_one() -> None:
    """Each lies in the middle of one of 2^48 equal parts: the smallest there can be is 2^-49."""
    drawn = uniform(torch.arange(1000), 4, seed=0) * 2.0**49
    assert bool((drawn % 2 == 1).all())
