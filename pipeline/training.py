"""Training as a process or as several: one rank's work with its progress and events, and the launch of all of them."""

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from kdpipe.manifests.errors import BusyError, ConfigError, KdpipeError
from kdpipe.manifests.node_copy import node_copy
from kdpipe.manifests.progress import Progress, Silent
from kdpipe.manifests.run import EVENTS, RUN_FILE, read_run
from kdpipe.manifests.specs import RunFile
from kdpipe.pipeline.exporters import Exporters
from kdpipe.pipeline.progress import EventLog, watch
from kdpipe.pipeline.streams import lasting_streams

if TYPE_CHECKING:
    from kdpipe.stages.train import Found, Training


def train_rank(training: "Training", found: "Found | None" = None, *, command: str = "train") -> dict[str, object]:
    """One rank's work: rank 0 shows the progress and writes the events, the others are silent."""
    from kdpipe.stages.train import train

    if os.environ.get("RANK", "0") != "0":
        return train(training, Silent(), found)
    num_ranks = int(os.environ.get("WORLD_SIZE", "1"))
    made = None if training.made_with is None else training.made_with.model_dump()
    log = events(training, once="accepted", exporters=Exporters(training.loggers, training.output))
    run = watch(
        command, log, where=training.output, kept=partial(kept, training.output), num_ranks=num_ranks, made_with=made
    )
    with lasting_streams(), run as progress:
        return train(training, progress, found)


def find_data(training: "Training") -> "Found":
    """A training without a teacher with its data prepared; rank 0 shows the progress."""
    from kdpipe.stages.train import find

    if os.environ.get("RANK", "0") != "0":
        return find(training)
    with watch("train", EventLog(None), where=training.output, kept=lambda: "nothing was trained") as progress:
        return find(training, progress)


@contextmanager
def node_copies(run: RunFile, output: Path) -> Iterator[tuple[Path, ...]]:
    """Copies of the caches on this node's disk, held as long as the block lasts; () where they are read in place.

    Here and not in a command of its own, as the copy must be held for exactly as long as the training reads it.
    """
    folder, finished = run.cache.stage_dir, read_run(output)
    if folder is None or not run.cache.path or (finished is not None and finished.metrics is not None):
        yield ()
        return
    folder = Path(os.path.expandvars(folder)).expanduser()
    with ExitStack() as stack:
        progress: Progress = Silent()
        with ExitStack() as said:
            if os.environ.get("LOCAL_RANK", "0") == "0":
                progress = said.enter_context(
                    watch("train", EventLog(None), where=output, kept=lambda: "nothing was trained")
                )
            found = [
                stack.enter_context(node_copy(path, folder, progress, max_bytes=run.cache.stage_max_bytes))
                for path in run.cache.path
            ]
        yield tuple(path if copy is None else copy for path, copy in zip(run.cache.path, found, strict=True))


def kept(output: Path) -> str:
    """What of a training is there that a second signal, or one that came before it could save, has ended."""
    from kdpipe.stages.train.checkpoint import newest_record  # loads torch

    if (output / RUN_FILE).exists():
        return "the student is written"
    record = newest_record(output)
    return "no checkpoint was saved" if record is None else f"its checkpoint of step {record.step} is kept"


def launch_training(
    training: "Training", nproc: int, *args: object, rank: Callable[..., dict[str, object]] = train_rank
) -> dict[str, object]:
    """The metrics of rank 0 of `nproc`; what ended them early is an event too, as rank 0 may not live to write it.

    rank: what each runs, with the training and `args`
    """
    from kdpipe.pipeline.launch import launch  # loads torch

    try:
        return launch(rank, training, *args, nproc=nproc, where=training.output, kept=partial(kept, training.output))
    except BusyError:
        raise  # the events in this output are another run's
    except KdpipeError as err:
        log = events(training)
        log.write("launch_failed", {"error": str(err), "exit_code": err.exit_code})
        log.close()
        raise


def events(training: "Training", *, once: str | None = None, exporters: Exporters | None = None) -> EventLog:
    """once: kind of the event before which nothing is written, as the folder may be another run's"""
    return EventLog(training.output / EVENTS, after=training.output, once=once, exporters=exporters)


def choose_nproc(asked: int | None, device: str, gpus: int) -> int:
    """How many ranks there are: as torchrun has decided, or as asked, or one a GPU. Raises ConfigError."""
    if "RANK" in os.environ:
        if asked is not None and asked != int(os.environ.get("LOCAL_WORLD_SIZE", "1")):
            raise ConfigError("torchrun has already decided it; leave the option out", where="--nproc")
        return int(os.environ.get("WORLD_SIZE", "1"))
    if asked is not None and device == "cuda" and asked > gpus:
        raise ConfigError(f"{asked} processes, one a GPU, but there are {gpus} GPUs", where="--nproc")
    return asked or max(gpus, 1)


def choose_device(device: str) -> tuple[str, int]:
    """The device meant by `auto`, and how many GPUs there are for it."""
    import torch

    from kdpipe.stages.models.device import pick_device

    found = pick_device(device).type
    return found, torch.cuda.device_count() if found == "cuda" else 0
