"""A power cut while a student trains: no checkpoint that was saved is lost, nor the student once the run has ended.

Every flush is needed: without any one of them a cut would lose something, and this test would fail.
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.conftest import Bench
from tests.faults.powercut import LostError, Place, PowerCut
from tests.stages.ranks import Recorder
from tests.stages.train.test_train import training_for

from kdpipe.manifests.errors import KdpipeError
from kdpipe.manifests.run import CheckpointRecord, read_run
from kdpipe.stages.train import checkpoint, train
from kdpipe.stages.train.checkpoint import CHECKPOINTS, Checkpoints
from kdpipe.stages.train.training import Training, check_training

FLUSHES: list[list[Place]] = [
    [("make_folder", "live")],
    [("make_folder", "new")],
    # torch's own, and ours that does not rely on it
    [("_write_files_from_queue", "number"), ("Checkpoints.save", "number")],
    [("Checkpoints._publish", "number")],
    [("Checkpoints._publish", "checkpoints")],
    [("Checkpoints._publish", "out")],
    [("fsync_tree", "files")],
    [("write_once", ".unfinished")],
    [("Output._move_in", "out")],
]
"""Every flush of a run into an output whose parent folder is new as well; those together that stand for each other."""

EARLY = [("fsync_tree", "folders"), ("publish", ".unfinished")]
"""Flushes of the folder a student is exported to, before its files move: against a disk that writes names of its own
accord, in any order, which this one does not."""


pytestmark = pytest.mark.usefixtures("one_thread")


def training_in(bench: Bench, folder: Path) -> Training:
    (folder).mkdir()
    return training_for(bench, folder / "new" / "out", max_steps=4, batch_tokens=900, save_every=1, keep=2)


@contextmanager
def kept() -> Iterator[None]:
    """Looking at what a cut leaves: whatever is found wrong there is a loss, and what goes wrong elsewhere is none."""
    try:
        yield
    except (AssertionError, KdpipeError, OSError, ValueError) as err:
        raise LostError(f"{err}") from err


class Promises:
    """What training has said is safe: a checkpoint whose save() returned."""

    def __init__(self, patch: pytest.MonkeyPatch, disk: PowerCut, scratch: Path) -> None:
        self.disk, self.scratch, self.steps = disk, scratch, []
        own = Checkpoints.save

        def save(checkpoints: Checkpoints, state: checkpoint.State, record: CheckpointRecord) -> None:
            own(checkpoints, state, record)
            self.steps.append(record.step)
            left = self.output()
            with kept():
                assert newest(left) == record.step

        patch.setattr(Checkpoints, "save", save)

    def output(self) -> Path:
        """What a cut right now leaves."""
        shutil.rmtree(self.scratch, ignore_errors=True)
        self.disk.restore(self.scratch)
        return self.scratch / "new" / "out"


def newest(output: Path) -> int:
    """The checkpoint that a run after a cut would take."""
    found = Checkpoints(output, 2, torch.device("cpu")).newest(Recorder())
    return found.step if found else 0


def train_and_check(training: Training, disk: PowerCut, scratch: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        promises = Promises(patch, disk, scratch)
        train(training, Recorder())
        assert promises.steps == [1, 2, 3]
    left = promises.output()
    with kept():
        record = read_run(left)
        assert record is not None
        assert record.num_steps == 4
        for path in training.output.iterdir():
            if path.name != "events.jsonl":
                assert (left / path.name).read_bytes() == path.read_bytes(), path.name
        load_file(left / "model.safetensors")


def test_no_cut_loses_a_checkpoint_or_the_student(bench: Bench, tmp_path: Path) -> None:
    training = training_in(bench, tmp_path / "live")
    with PowerCut(tmp_path / "live") as disk:
        train_and_check(training, disk, tmp_path / "now")
    assert sorted(disk.places) == sorted(place for places in (*FLUSHES, EARLY) for place in places)


@pytest.mark.parametrize("stride", [3, pytest.param(1, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])])
def test_a_run_goes_on_after_a_cut_at_any_flush(stride: int, bench: Bench, tmp_path: Path) -> None:
    cuts: list[Path] = []

    def cut(disk: PowerCut) -> None:
        cuts.append(tmp_path / f"cut{len(cuts)}")
        disk.restore(cuts[-1])

    training = training_in(bench, tmp_path / "live")
    with PowerCut(tmp_path / "live", after_flush=cut):
        train(training, Recorder())
    weights = (training.output / "model.safetensors").read_bytes()
    assert len(cuts) > 12
    for left in cuts[::stride]:
        output = left / "new" / "out"
        again = training_for(bench, output, max_steps=4, batch_tokens=900, save_every=1, keep=2)
        check_training(again, 1)  # as the command does first: it tidies up after a run that was finished
        train(again, Recorder())
        assert (output / "model.safetensors").read_bytes() == weights, left.name
        assert not (output / CHECKPOINTS).exists()


@pytest.mark.parametrize("places", FLUSHES, ids=lambda places: "+".join(map("-".join, places)))
def test_every_flush_is_needed(places: list[Place], bench: Bench, tmp_path: Path) -> None:
    training = training_in(bench, tmp_path / "live")

    def cut() -> None:
        with PowerCut(tmp_path / "live", skip=places) as disk:
            train_and_check(training, disk, tmp_path / "now")

    with pytest.raises(LostError):
        cut()
