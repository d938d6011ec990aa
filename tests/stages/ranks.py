"""What a rank of a test does: functions of a module, so that spawned processes find them."""

import dataclasses
import os
import signal
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from kdpipe.manifests import failpoints
from kdpipe.manifests.progress import Silent
from kdpipe.manifests.run import CheckpointRecord, RunInputs
from kdpipe.manifests.specs import RunSpec
from kdpipe.stages.ranks import joined
from kdpipe.stages.train import train
from kdpipe.stages.train.checkpoint import Checkpoints, file_name
from kdpipe.stages.train.run import Run
from kdpipe.stages.train.training import Training, find


class Recorder(Silent):
    """Keeps events, notes and tasks."""

    def __init__(self) -> None:
        self.events: list[tuple[str, dict[str, object]]] = []
        self.notes: list[str] = []
        self.tasks: list[tuple[str, int | None, int]] = []
        """Each task's name, total and what was done of it."""

    def note(self, text: str) -> None:
        self.notes.append(text)

    def begin(self, task: str, *, total: int | None, unit: str) -> None:
        self.tasks.append((task, total, 0))

    def advance(self, amount: int, detail: str = "") -> None:
        task, total, done = self.tasks[-1]
        self.tasks[-1] = (task, total, done + amount)

    def event(self, kind: str, **fields: object) -> None:
        self.events.append((kind, fields))

    def values(self, kind: str, field: str) -> list[float]:
        return [float(str(fields[field])) for name, fields in self.events if name == kind]


class Seeds(Recorder):
    """Keeps after each step the seeds of all ranks' generators."""

    def __init__(self) -> None:
        super().__init__()
        self.seeds: list[list[int]] = []

    def event(self, kind: str, **fields: object) -> None:
        super().event(kind, **fields)
        if kind == "step":
            self.seeds.append([0] * dist.get_world_size())
            dist.all_gather_object(self.seeds[-1], torch.initial_seed())


def train_and_record(training: Training) -> dict[str, list[float]]:
    """Train as this rank; losses, gradient norms and tokens of every step, and how many seeds the ranks had in all."""
    torch.set_num_threads(1)
    recorder = Seeds()
    train(training, recorder)
    found = {field: recorder.values("step", field) for field in ("loss/mean", "grad_norm", "num_tokens")}
    return found | {"num_seeds": [len({seed for step in recorder.seeds for seed in step})]}


def first_gradients(trainings: Mapping[str, Training], folder: Path) -> None:
    """Gradients of each first step, gathered from all ranks, under the model's own names; its sums; its scores.

    Rank 0 saves them as folder/NAME; the scores are those of the evaluation before the first step.
    """
    torch.set_num_threads(1)
    with joined(torch.device("cpu")) as ranks:
        for name, training in trainings.items():
            run = Run(training, find(training), ranks)
            scores = run.evaluate_now(Silent())
            sums = run.trainer.backward(0, run.batches.num_supervised(0))
            whole = {
                name: parameter.grad.full_tensor() if isinstance(parameter.grad, DTensor) else parameter.grad
                for name, parameter in run.student.named_parameters()
            }
            if ranks.rank == 0:
                torch.save((whole, sums, scores), folder / name)


class Logged(Silent):
    """Writes the steps' losses and gradient norms, in hexadecimal, to a file that kills leave whole lines in."""

    def __init__(self, path: Path, kill: str) -> None:
        self._path, self._kill = path, kill

    def event(self, kind: str, **fields: object) -> None:
        if kind == "step":
            numbers = [float(str(fields[name])).hex() for name in ("loss/mean", "grad_norm", "lr")]
            with open(self._path, "a") as file:
                file.write(f"{fields['step']} {' '.join(numbers)}\n")
        if self._kill == f"{kind}:{fields.get('step')}":
            os.kill(os.getpid(), signal.SIGKILL)


def train_on_two_caches(training: Training, other: Path) -> None:
    """Train as this rank; the second one has another cache."""
    if os.environ["RANK"] == "1":
        training = dataclasses.replace(training, caches=(other,))
    train(training, Silent())


def train_until(training: Training, kill: str) -> None:
    """Train, logging steps to OUTPUT.log; die at the event "step:7", or at the failpoint "checkpoint:named#2"."""
    torch.set_num_threads(1)
    failpoints.arm(kill)
    train(training, Logged(training.output.with_suffix(".log"), kill))


def read_steps(output: Path) -> dict[int, str]:
    """What OUTPUT.log says of each step; that of a step that was taken twice must be the same both times."""
    steps: dict[int, str] = {}
    for line in output.with_suffix(".log").read_text().splitlines():
        number, _, told = line.partition(" ")
        assert steps.setdefault(int(number), told) == told, f"step {number} was another one the second time"
    return steps


def train_logged(training: Training) -> dict[int, float]:
    """Train as this rank; the loss of every step it took."""
    torch.set_num_threads(1)
    recorder = Recorder()
    train(training, recorder)
    steps = (int(step) for step in recorder.values("step", "step"))
    return dict(zip(steps, recorder.values("step", "loss/mean"), strict=True))


def train_and_keep_tasks(training: Training) -> list[tuple[str, int | None, int]]:
    """Train as this rank; every task's name, total and what was done of it."""
    torch.set_num_threads(1)
    recorder = Recorder()
    train(training, recorder)
    return recorder.tasks


def train_saying_when(training: Training, folder: Path) -> dict[str, object]:
    """Train as this rank; rank 0 makes the file folder/stepped at the second step."""

    class Sayer(Silent):
        def event(self, kind: str, **fields: object) -> None:
            if (kind, fields.get("step")) == ("step", 2):
                (folder / "stepped").touch()

    torch.set_num_threads(1)
    return train(training, Sayer() if os.environ["RANK"] == "0" else Silent())


def newest_of_two(output: Path) -> list[tuple[int, str]]:
    """Two checkpoints, rank 1's file of the newer one damaged: the step that each rank goes on from, and its note."""
    with joined(torch.device("cpu")) as ranks:
        checkpoints = Checkpoints(output, 2, torch.device("cpu"))
        inputs = RunInputs(student="", caches=(), heldout_fraction=0.0, spec=RunSpec())
        for step in (2, 4):
            state = {f"weight.{ranks.rank}": torch.arange(100.0) + step}
            record = CheckpointRecord(inputs=inputs, step=step, num_tokens=0, num_skipped=0, lr_factor=1.0, files=())
            checkpoints.save(state, record)
        if ranks.rank == 0:
            victim = checkpoints.path(4) / file_name(1)
            data = victim.read_bytes()
            victim.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        dist.barrier()
        recorder = Recorder()
        found = checkpoints.newest(recorder)
        told = [(0, "")] * ranks.world_size
        dist.all_gather_object(told, (found.step if found else 0, "\n".join(recorder.notes)))
        return told
