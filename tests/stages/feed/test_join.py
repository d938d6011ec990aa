"""Several teachers in one data set: the same samples of all, or each those of its own caches."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.caches import make_cache, make_samples

from kdpipe.manifests.cache import Cache
from kdpipe.manifests.errors import CacheError, ConfigError
from kdpipe.manifests.sample import Sample
from kdpipe.manifests.specs import LossSpec
from kdpipe.stages.feed.dataset import of_caches
from kdpipe.stages.feed.packing import Packer

TOGETHER, ROUTED = LossSpec(teacher_mix="distributions"), LossSpec(teacher_mix="route")
Make = Callable[..., Cache]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """A cache of a teacher with a width of its own: make("b", samples)."""

    def make(teacher: str, samples: list[Sample], **more: float) -> Cache:
        folder = tmp_path / f"{teacher}{len(list(tmp_path.iterdir()))}"
        return make_cache(
            folder, samples=samples, teacher=teacher, hidden_size=11 + ord(teacher), seed=ord(teacher), **more
        )

    return make


def rows_of(cache: Cache, index: int) -> bytes:
    return cache.rows(index).tobytes()


def test_teachers_of_the_same_samples_are_joined_whatever_their_order(make: Make) -> None:
    samples = make_samples(30)
    mixed = [samples[place] for place in np.random.default_rng(3).permutation(30)]
    a, b, c = make("a", samples), make("b", mixed), make("c", samples[20:])
    d = make("c", samples[:20])
    dataset = of_caches([a, c, b, d], TOGETHER)
    assert [teacher.record.hidden_size for teacher in dataset.teachers] == [11 + ord(each) for each in "acb"]
    assert len(dataset) == 30
    assert dataset.plans == (a.plan, c.plan, b.plan, d.plan)
    batch = Packer(dataset).pack([7, 25, 0])
    assert batch.teacher_places == ()
    for teacher, rows in zip(dataset.teachers, batch.teacher_rows, strict=True):
        assert len(rows) == len(batch.labels)
        teacher.rows.want(np.arange(30))
    of_c = [(c, 5) if place == 25 else (d, place) for place in (7, 25, 0)]
    of_b = [(b, next(n for n, each in enumerate(mixed) if each is samples[place])) for place in (7, 25, 0)]
    for number, found in enumerate(([(a, 7), (a, 25), (a, 0)], of_c, of_b)):
        written = b"".join(rows_of(*each) for each in found)
        assert batch.teacher_rows[number].view(torch.int16).numpy().tobytes() == written


def test_samples_that_a_teacher_lacks_are_refused_with_their_place_or_left_out_and_counted(make: Make) -> None:
    samples = make_samples(30)
    caches = [make("a", samples[:28]), make("b", samples[3:])]
    with pytest.raises(CacheError) as caught:
        of_caches(caches, TOGETHER)
    assert "3 samples of" in str(caught.value)
    assert "(the first is data.jsonl:1)" in str(caught.value)
    assert "2 samples of" in str(caught.value)
    assert "(the first is data.jsonl:29)" in str(caught.value)
    assert "cache.unmatched=leave_out" in str(caught.value)
    dataset = of_caches(caches, TOGETHER, unmatched="leave_out")
    (note,) = dataset.notes
    assert note.startswith("left out: 3 samples of")
    training, heldout = dataset.split(0.3)
    assert sorted([*training, *heldout]) == list(range(3, 28))
    bare = dataset.without_teachers()
    assert [part.tolist() for part in bare.split(0.3)] == [training.tolist(), heldout.tolist()]
    with pytest.raises(CacheError, match="its teacher has none of the samples of the others"):
        of_caches([caches[0], make("b", make_samples(5, seed=9))], TOGETHER, unmatched="leave_out")


def test_a_text_that_another_template_made_other_tokens_of_is_not_the_same_sample(make: Make) -> None:
    samples = make_samples(10)
    other = [*samples[:9], replace(samples[9], token_ids=(samples[9].token_ids + 1) % 97)]
    with pytest.raises(CacheError, match="some of these texts are in both, as other tokens: another template"):
        of_caches([make("a", samples), make("b", other)], TOGETHER)
    flipped = replace(samples[9], supervised=~samples[9].supervised)
    with pytest.raises(CacheError, match=r"1 sample of .* is not in"):
        of_caches([make("a", samples), make("b", [*samples[:9], flipped])], TOGETHER)


def test_what_any_cache_holds_out_is_held_out_of_all(make: Make) -> None:
    samples = make_samples(40)
    half, little = (0.5, 0.05)
    for first, second in ((half, little), (little, half)):
        caches = [make("a", samples, heldout_fraction=first), make("b", samples, heldout_fraction=second)]
        for loss in (TOGETHER, ROUTED):
            dataset = of_caches(caches, loss)
            assert dataset.heldout_fraction == 0.5
            training, heldout = (set((part % 40).tolist()) for part in dataset.split(None))
            assert not training & heldout


def test_under_route_every_sample_has_the_teacher_of_its_cache(make: Make) -> None:
    one, two = make_samples(12), make_samples(9, seed=1)
    a, b, again = make("a", one[:8]), make("b", two), make("a", one[8:])
    dataset = of_caches([a, b, again], ROUTED)
    assert len(dataset) == 21
    assert dataset.taught_by is not None
    assert dataset.taught_by.tolist() == [0] * 8 + [1] * 9 + [0] * 4
    batch = Packer(dataset).pack([20, 9, 3, 16])
    counts = [int(dataset.num_supervised[sample]) for sample in (20, 9, 3, 16)]
    of_a, of_b = (places.tolist() for places in batch.teacher_places)
    owner = np.repeat([0, 1, 0, 1], counts)
    assert (of_a, of_b) == (np.flatnonzero(owner == 0).tolist(), np.flatnonzero(owner == 1).tolist())
    found = [rows.view(torch.int16).numpy().tobytes() for rows in batch.teacher_rows]
    assert found == [rows_of(again, 3) + rows_of(a, 3), rows_of(b, 1) + rows_of(b, 8)]
    assert [places.tolist() for places in Packer(dataset).empty().teacher_places] == [[], []]
    alone = Packer(dataset).pack([9])
    assert [len(rows) for rows in alone.teacher_rows] == [0, counts[1]]
    for teacher in dataset.teachers:
        teacher.rows.want(np.arange(21))


@pytest.mark.parametrize(
    ("loss", "problem"),
    [
        (LossSpec(), r"its teacher is b, that of .* is a; loss.teacher_mix says what several teachers are"),
        (LossSpec(teacher_mix="losses", teacher_weights=(1, 2, 3)), "3 weights, the caches are of 2 teachers"),
        (LossSpec(teacher_mix="route", teacher_weights=(1, 2)), "under route a sample has one teacher"),
    ],
)
def test_caches_of_several_teachers_need_a_loss_that_is_for_them(loss: LossSpec, problem: str, make: Make) -> None:
    samples = make_samples(6)
    with pytest.raises((CacheError, ConfigError), match=problem):
        of_caches([make("a", samples), make("b", samples)], loss)


def test_a_loss_of_several_teachers_is_refused_for_caches_of_one(make: Make) -> None:
    for key in ({"teacher_mix": "route"}, {"teacher_weights": (1.0,)}):
        with pytest.raises(ConfigError, match=f"loss.{next(iter(key))}: all caches are of one teacher; leave it out"):
            of_caches([make("a", make_samples(6))], LossSpec.model_validate(key))
