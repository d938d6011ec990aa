"""What a rank of a test does: functions of a module, so that spawned processes find them."""

import os
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor

from kdpipe.manifests.cache import Cache
from kdpipe.manifests.progress import Silent
from kdpipe.stages.feed import Rows
from kdpipe.stages.train import Run, TrainJob, process_group, train


class Recorder(Silent):
    """Keeps the events."""

    def __init__(self) -> None:
        self.events: list[tuple[str, dict[str, object]]] = []

    def event(self, kind: str, **fields: object) -> None:
        self.events.append((kind, fields))

    def values(self, kind: str, field: str) -> list[float]:
        return [float(str(fields[field])) for name, fields in self.events if name == kind]


def train_and_record(job: TrainJob) -> dict[str, list[float]]:
    """Train as this rank; losses, gradient norms and tokens of every step."""
    torch.set_num_threads(1)
    recorder = Recorder()
    train(job, recorder)
    return {field: recorder.values("step", field) for field in ("loss/mean", "grad_norm", "num_tokens")}


def first_gradients(job: TrainJob, out: Path) -> None:
    """Gradients of the first step, gathered from all ranks, saved by rank 0 under the model's own names, and sums."""
    torch.set_num_threads(1)
    rows = Rows([Cache.open(path) for path in job.caches])
    with process_group(torch.device("cpu")) as (rank, world_size):
        run = Run(job, rows, torch.device("cpu"), rank=rank, world_size=world_size)
        sums = run._backward(0, run.feed.num_supervised(0))
        whole = {
            name: parameter.grad.full_tensor() if isinstance(parameter.grad, DTensor) else parameter.grad
            for name, parameter in run.student.named_parameters()
        }
        if int(os.environ.get("RANK", "0")) == 0:
            torch.save((whole, sums), out)
