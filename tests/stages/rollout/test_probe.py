"""The gap between engine and trainer, and what is said of an engine that is over the bound."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdpipe.manifests.errors import CheckFailed
from kdpipe.stages.rollout.probe import BOUNDS, REMEMBERED, Probe, gap

TRAINER = np.random.default_rng(0).normal(-3.0, 1.0, 63).astype(np.float32)


@given(st.lists(st.tuples(st.floats(-30, 0, width=32), st.floats(-30, 0, width=32)), min_size=1))
def test_the_gap_is_never_negative_and_nothing_between_equals(pairs: list[tuple[float, float]]) -> None:
    engine, trainer = np.array(pairs, np.float32).T
    assert gap(engine, trainer) >= 0.0
    assert gap(engine, engine) == 0.0


def test_the_gap_is_k3_of_the_difference_trainer_less_engine() -> None:
    engine, trainer = np.array([-1.0, -2.0], np.float32), np.array([-1.5, -1.0], np.float32)
    assert gap(engine, trainer) == pytest.approx((np.exp(-0.5) - 0.5 + np.exp(1.0) - 2.0) / 2)


def test_in_the_mean_over_an_engines_tokens_it_is_their_divergence() -> None:
    numbers = np.random.default_rng(0)
    p, q = numbers.dirichlet(np.ones(50)), numbers.dirichlet(np.ones(50))
    drawn = numbers.choice(50, 400_000, p=p)
    found = gap(np.log(p)[drawn].astype(np.float32), np.log(q)[drawn].astype(np.float32))
    assert found == pytest.approx(float((p * np.log(p / q)).sum()), rel=0.05)


@pytest.mark.parametrize("number", [np.nan, -np.inf])
def test_what_is_not_a_number_is_over_any_bound(number: float) -> None:
    engine = TRAINER.copy()
    engine[5] = number
    with pytest.raises(CheckFailed, match="version 3 of the weights: engine and trainer are inf apart"):
        Probe("bfloat16").check(3, engine, TRAINER)


def test_an_engine_is_told_by_the_version_it_answers_as_while_that_is_remembered() -> None:
    probe, rounded = Probe("float32"), TRAINER + np.float32(1e-6)
    said = {version: TRAINER - np.float32(version) for version in range(REMEMBERED + 3)}
    for version in range(REMEMBERED + 1):
        assert probe.check(version, said[version], said[version]) <= BOUNDS["float32"]
    assert 0 < gap(rounded, TRAINER) < BOUNDS["float32"]
    with pytest.raises(CheckFailed, match="answers as version 1 did: the update was skipped"):
        probe.check(REMEMBERED + 1, rounded - np.float32(1), said[REMEMBERED + 1])
    with pytest.raises(CheckFailed, match="answers as no version that is remembered"):
        probe.check(REMEMBERED + 2, rounded - np.float32(1), said[REMEMBERED + 2])
