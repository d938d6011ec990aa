"""What ranks run in tests of train.fsdp; a module of its own because ranks import it by name."""

import signal
from collections.abc import Mapping
from dataclasses import replace

import torch
from tests.stages.ranks import Recorder
from torch._dynamo.utils import counters
from torch.distributed.tensor import DTensor

from kdpipe.manifests.errors import TemporaryError
from kdpipe.manifests.specs import FsdpSpec
from kdpipe.stages.ranks import joined
from kdpipe.stages.train.run import Run
from kdpipe.stages.train.training import Training, find

CPU = torch.device("cpu")


def take(training: Training, way: FsdpSpec, **changes: object) -> Training:
    """The training with its student lying on its ranks in another way."""
    train = training.spec.train.model_copy(update={"fsdp": way, **changes})
    return replace(training, spec=training.spec.model_copy(update={"train": train}))


def train_in_every_way(
    trainings: Mapping[str, Training], switched: Training, ways: list[FsdpSpec]
) -> dict[str, list[float]]:
    """Loss and gradient norm of every step of each training, from start to export.

    Beside it the number of graphs that torch.compile made, and the mesh of ranks. And of `switched`, which takes a step
    in each of the ways but the last, is asked to stop after it, and goes on from its checkpoint in the next one.
    """
    torch.set_num_threads(1)
    with joined(CPU) as ranks:
        found = {}
        for name, training in trainings.items():
            counters.clear()
            run = Run(training, find(training), ranks)
            found[name] = _trained(run)
            found[f"graphs of {name}"] = [counters["stats"]["unique_graphs"]]
            (first, *_) = run.student.parameters()
            assert isinstance(first, DTensor)
            found[f"mesh of {name}"] = list(first.device_mesh.shape)
        found["switched"] = []
        for number, way in enumerate(ways, start=1):
            training = take(switched, way)
            stop = (signal.SIGTERM,) if number < len(ways) else ()
            found["switched"] += _trained(Run(training, find(training), ranks), stop)
        return found


def _trained(run: Run, asked: tuple[signal.Signals, ...] = ()) -> list[float]:
    recorder = Recorder()
    run.loop.resume("auto", recorder)
    try:
        run.steps(recorder, asked)
    except TemporaryError:
        assert asked
    else:
        run.save(recorder)
    pairs = zip(recorder.values("step", "loss/mean"), recorder.values("step", "grad_norm"), strict=True)
    return [value for pair in pairs for value in pair]
