"""Prospect: what a sweep will take is what its runs turn out to take, and a disk without the room ends it."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from tests.caches import make_cache
from tests.finished import write_events, write_record

from kdpipe.manifests.cache import Cache
from kdpipe.manifests.errors import SpaceError, StudentError
from kdpipe.manifests.specs import load, members_of
from kdpipe.pipeline.prospect import Prospect, prospect_of
from kdpipe.pipeline.steps import disk_of, steps_of
from kdpipe.stages.feed.batches import PlannedBatches
from kdpipe.stages.feed.dataset import of_caches

RUN = """
[cache]
path = "c"
[student]
path = "s"
[train]
output = "out"
device = "cpu"
batch_tokens = 100
keep = 1
[sweep]
jobs = 2
report = false
[sweep.grid]
train.seed = [1, 2, 3]
"""
Foreseen = Callable[..., Prospect]


@pytest.fixture
def foreseen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Foreseen:
    """The prospect of a run file over a cache of 43 samples and a student of 100 parameters."""
    monkeypatch.chdir(tmp_path)
    Path("run.toml").write_text(RUN)
    make_cache(Path("c"), num_samples=43)
    Path("s").mkdir()
    save_file({"w": np.zeros((10, 10), np.float32)}, "s/model.safetensors")

    def of(*sets: str, text: str = RUN) -> Prospect:
        Path("run.toml").write_text(text)
        run = load(Path("run.toml"), sets)
        return prospect_of(Path("run.toml"), run, steps_of(Path("run.toml"), run, disk_of(run), sets), sets)

    return of


def finish(seeds: str, rate: float, *sets: str) -> None:
    """Students of some seeds, that have trained so many tokens a second."""
    for member in members_of(load(Path("run.toml"), (f"sweep.grid.train.seed={seeds}", *sets))):
        write_record(member, metrics={"heldout_kl": 0.5})
        write_events(member.output, "end", task="train", done=1000, seconds=1000 / rate)


@pytest.mark.parametrize(
    ("heldout", "subset", "epochs", "most"), [(0.25, 1.0, 1.0, None), (0.25, 0.5, 2.5, None), (0.0, 1.0, 3.0, 4)]
)
def test_steps_and_tokens_are_those_that_the_runs_will_have(
    foreseen: Foreseen, heldout: float, subset: float, epochs: float, most: int | None
) -> None:
    limit = () if most is None else (f"train.max_steps={most}",)
    sets = (f"data.heldout_fraction={heldout}", f"data.subset={subset}", f"train.epochs={epochs}", *limit)
    finish("[3]", 50.0, *sets)
    found = foreseen(*sets).work
    dataset = of_caches([Cache.open(Path("c"))])
    samples, _ = dataset.split(heldout, subset)
    batches = PlannedBatches(dataset, samples, seed=1, batch_tokens=100, epochs=epochs, max_steps=most)
    assert found is not None
    assert found.num_steps == 2 * batches.num_steps
    assert found.num_tokens == pytest.approx(2 * batches.num_tokens(0, batches.num_steps), rel=0.1)


def test_time_is_measured_where_finished_students_say_it_and_else_a_bound(foreseen: Foreseen) -> None:
    before = foreseen()
    assert (before.num_left, before.num_finished, before.is_measured) == (3, 0, False)
    assert "(estimated)" in before.lines()[0]
    assert before.work is not None
    finish("[1]", 50.0)
    after = foreseen()
    assert (after.num_left, after.num_finished, after.is_measured) == (2, 1, True)
    assert after.seconds == pytest.approx(before.work.num_tokens * 2 / 3 / 50.0 / 2), "two runs, two at a time"
    assert "as measured in finished runs" in after.lines()[0]


def test_students_and_the_checkpoints_of_the_runs_at_a_time_need_room(foreseen: Foreseen) -> None:
    finish("[3]", 50.0)
    size = os.path.getsize("s/model.safetensors")
    found = foreseen()
    assert (found.student_bytes, found.checkpoint_bytes) == (2 * size, 2 * 2 * 12 * 100)
    assert foreseen("train.save_every=0").checkpoint_bytes == 0
    os.truncate("s/model.safetensors", 4 << 40)
    with pytest.raises(SpaceError, match=r"E-SPACE out: the sweep needs 8\.0 TiB here, "):
        foreseen()


def test_what_is_not_known_before_a_run_begins_is_not_guessed(foreseen: Foreseen) -> None:
    for text in (
        RUN.replace('[cache]\npath = "c"', '[data]\npaths = ["d"]'),
        RUN.replace('[cache]\npath = "c"', '[teacher]\npath = "t"\n[data]\npaths = ["d"]').replace(
            "[sweep]", '[sweep]\ncommand = "stream"'
        ),
    ):
        found = foreseen(text=text)
        assert (found.work, found.seconds) == (None, None)
        assert found.lines()[0] == "3 runs to do"


def test_every_student_is_looked_at_before_the_first_run(foreseen: Foreseen) -> None:
    with pytest.raises(StudentError, match="E-STUDENT nowhere: no such folder"):
        foreseen(text=RUN + 'student.path = ["s", "nowhere"]\n')


def test_nothing_left_takes_nothing(foreseen: Foreseen) -> None:
    finish("[1, 2, 3]", 1.0)
    assert foreseen().work is None
    assert foreseen().student_bytes == 0


def test_steps_and_tokens_of_a_mixture_are_those_that_the_runs_will_have(foreseen: Foreseen) -> None:
    make_cache(Path("d"), num_samples=20, seed=3)
    sets = ("cache.path=['c', 'd']", "cache.weights=[0.2, 0.8]", "train.epochs=2")
    found = foreseen(*sets).work
    dataset = of_caches([Cache.open(Path("c")), Cache.open(Path("d"))])
    samples, _ = dataset.split(None)
    batches = PlannedBatches(dataset, samples, seed=1, batch_tokens=100, epochs=2, weights=(0.2, 0.8))
    assert found is not None
    assert found.num_steps == 3 * batches.num_steps
    assert found.num_tokens == pytest.approx(3 * batches.num_tokens(0, batches.num_steps), rel=0.1)
