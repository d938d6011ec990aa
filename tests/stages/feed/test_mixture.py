"""Mixtures: shares of an epoch's supervised tokens, exact to within a sample, and functions of seed and epoch."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.caches import make_cache, make_samples

from kdpipe.manifests.errors import ConfigError
from kdpipe.stages.feed.batches import PlannedBatches
from kdpipe.stages.feed.dataset import Dataset, of_caches
from kdpipe.stages.feed.mixture import Mixture, Shuffled


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Three caches of one teacher, of 40, 15 and 7 samples."""
    folder = tmp_path_factory.mktemp("mixture")
    return of_caches(
        [make_cache(folder / f"{count}", samples=make_samples(count, seed=count)) for count in (40, 15, 7)]
    )


def taken(dataset: Dataset, samples: np.ndarray) -> np.ndarray:
    """Supervised tokens of some samples by the table they are of."""
    return np.bincount(dataset.source_of(samples), weights=dataset.num_supervised[samples], minlength=3)


@settings(max_examples=40)
@given(st.tuples(*[st.floats(0.01, 50.0)] * 3), st.integers(0, 2**32), st.integers(0, 9))
def test_every_source_has_its_share_of_each_epoch_to_within_a_sample(
    three: Dataset, weights: tuple[float, ...], seed: int, epoch: int
) -> None:
    samples = np.arange(len(three))
    order = Mixture(three, samples, seed, 200, weights).order(epoch)
    wanted = int(three.num_supervised.sum()) * np.array(weights) / sum(weights)
    longest = [int(three.num_supervised[three.source_of(samples) == table].max()) for table in range(3)]
    assert (abs(taken(three, order) - wanted) <= np.array(longest) + 1).all()


@pytest.mark.parametrize("weights", [(1, 1, 1), (0.05, 0.9, 0.05)])
def test_no_sample_comes_again_before_all_others_of_its_source(three: Dataset, weights: tuple[float, ...]) -> None:
    mixture = Mixture(three, np.arange(len(three)), 3, 200, weights)
    times: Counter[int] = Counter()
    for epoch in range(12):
        times.update(mixture.members(epoch).tolist())
        for table in range(3):
            members = np.flatnonzero(three.source_of(np.arange(len(three))) == table).tolist()
            counts = [times[member] for member in members if three.num_supervised[member]]
            assert max(counts) - min(counts) <= 1


def test_the_shares_that_the_sources_have_give_the_epochs_without_any(three: Dataset) -> None:
    samples = np.flatnonzero(np.arange(len(three)) % 5)
    mixture = Mixture(three, samples, 8, 200, taken(three, samples).tolist())
    shuffled = Shuffled(three, samples, 8, 200)
    assert mixture.num_steps == shuffled.num_steps
    for epoch in range(4):
        assert mixture.order(epoch).tolist() == shuffled.order(epoch).tolist()


def test_epochs_are_functions_of_seed_and_epoch_and_their_order_is_mixed(three: Dataset) -> None:
    samples, weights = np.arange(len(three)), (1, 1, 4)
    ours, again = (Mixture(three, samples, 5, 200, weights) for _ in range(2))
    assert again.order(3).tolist() == ours.order(3).tolist(), "whatever was asked before"
    assert ours.order(0).tolist() != ours.order(1).tolist()
    assert ours.order(0).tolist() != Mixture(three, samples, 6, 200, weights).order(0).tolist()
    order = ours.order(0)
    assert sorted(order) == sorted(ours.members(0))
    assert (np.diff(order) == 0).sum() < 3, "a sample that is taken several times is not learnt several times in a row"
    first, second = (taken(three, half) / taken(three, half).sum() for half in np.array_split(order, 2))
    assert abs(first - second).max() < 0.3


@pytest.mark.parametrize("batch_tokens", [1, 150, 10**6])
def test_steps_of_a_mixture_are_never_empty_and_count_what_they_take(three: Dataset, batch_tokens: int) -> None:
    samples = np.arange(3, len(three))
    feed = PlannedBatches(three, samples, seed=2, batch_tokens=batch_tokens, epochs=3.0, weights=(0.2, 0.1, 0.7))
    assert feed.num_steps == 3 * feed.steps_per_epoch
    steps = [feed.samples(step) for step in range(feed.num_steps)]
    assert all(len(step) for step in steps)
    assert feed.num_tokens(1, feed.num_steps) == sum(int(three.num_tokens[step].sum()) for step in steps[1:])
    assert feed.num_samples_before(feed.num_steps) == sum(map(len, steps))
    if batch_tokens == 150:
        mean = np.mean([three.num_tokens[step].sum() for step in steps])
        assert 130 < mean < 165
        batches = list(feed.step(4))
        assert sum(len(batch.labels) for batch in batches) == feed.num_supervised(4)


def test_a_source_much_smaller_than_its_share_is_no_slower(tmp_path: Path) -> None:
    """A million passes of one source an epoch would be, one by one, a million shuffles."""
    many = make_cache(tmp_path / "many", samples=make_samples(400))
    few = make_cache(tmp_path / "few", samples=make_samples(1, seed=1))
    dataset = of_caches([many, few])
    mixture = Mixture(dataset, np.arange(401), 0, 10**4, (1e-9, 1.0))
    assert len(mixture.order(2)) > 100
    assert set(mixture.order(2).tolist()) == {400}


def test_a_source_without_a_supervised_token_is_refused(three: Dataset, tmp_path: Path) -> None:
    samples = np.flatnonzero(three.source_of(np.arange(len(three))) != 1)
    with pytest.raises(ConfigError, match=r"cache.weights: no supervised token of cache number 2 is left"):
        Mixture(three, samples, 0, 200, (1, 1, 1))


def test_what_is_held_out_is_in_no_epoch(three: Dataset) -> None:
    training, heldout = three.split(0.3, 0.8)
    mixture = Mixture(three, training, 0, 200, (1, 2, 3))
    seen = set(np.concatenate([mixture.members(epoch) for epoch in range(8)]).tolist())
    assert seen == set(training.tolist())
    assert not seen & set(heldout.tolist())


def test_a_sample_is_of_the_table_that_it_lies_in(three: Dataset) -> None:
    assert three.source_of(np.array([0, 39, 40, 54, 55, 61])).tolist() == [0, 0, 1, 1, 2, 2]


def test_shares_are_of_what_the_samples_are_of_where_one_table_has_them_all(three: Dataset) -> None:
    """As for a student with a tokenizer of its own: its samples are one table, whatever cache each is of."""
    sources = np.arange(40) % 3
    dataset = Dataset([three.tables[0]], plans=three.plans, sources=sources)
    mixture = Mixture(dataset, np.arange(40), 0, 200, (1, 1, 8))
    shares = np.bincount(sources[mixture.order(0)], weights=dataset.num_supervised[mixture.order(0)])
    assert shares / shares.sum() == pytest.approx([0.1, 0.1, 0.8], abs=0.1)
