"""kdpipe train: a student from caches, in this process or in one process a GPU."""

import os
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from kdpipe.manifests.errors import BusyError, ConfigError, KdpipeError
from kdpipe.manifests.progress import Silent
from kdpipe.manifests.run import RUN_FILE
from kdpipe.manifests.specs import RunFile
from kdpipe.pipeline.options import RunCommand, group_for, json_option, require_not_swapped, this_command
from kdpipe.pipeline.output import results_only, show
from kdpipe.pipeline.progress import EventLog, watch
from kdpipe.pipeline.streams import lasting_streams

if TYPE_CHECKING:
    from kdpipe.stages.train import Found, TrainJob


@click.command("train", cls=RunCommand)
@click.option(
    "--resume",
    default="auto",
    metavar="auto|never|PATH",
    help="What an interrupted run does: go on from the newest good checkpoint in OUTPUT, start again, or go on from "
    "the checkpoint at PATH.",
)
@json_option
def command(run: RunFile, resume: str, as_json: bool) -> None:
    """Train a student from one or more caches; the teacher is not needed.

    Prints the final metrics. Events go to OUTPUT/events.jsonl. Under torchrun it is one rank of that launch.
    Interrupted? The same command again goes on from its last checkpoint. Ctrl-C, SIGTERM, SIGUSR2 and SIGHUP finish the
    step, save and exit (130 for Ctrl-C, 75 for the others); a second one ends it at once.

    \b
    kdpipe train --student models/small --cache /scratch/cache --output runs/a --set train.lr=3e-4 loss.temperature=2
    """
    student, caches, output = run.student.path, run.cache.path, run.train.output
    assert student is not None, "RunCommand has asked for it"
    assert output is not None, "RunCommand has asked for it"
    require_not_swapped(student, caches)
    from kdpipe.stages.train import TrainJob, check_job  # torch takes seconds: not for --help or a misspelt option

    device, gpus = _choose_device(run.train.device)
    nproc = _choose_nproc(run.train.nproc, device, gpus)
    job = TrainJob(
        student=student,
        caches=caches,
        output=output,
        spec=run.training(),
        device=device,
        io=run.cache.io,
        trust=run.student.trust_remote_code,
        resume=resume,
        group=group_for(run.train.group, output),
        made_with=this_command(student=student, cache=caches, output=output),
    )
    with results_only():
        found = check_job(job, nproc)
        if nproc == 1 or "RANK" in os.environ:
            metrics = train_rank(job, found)
        else:
            metrics = _launch(replace(job, inputs=found.inputs), nproc)
    if os.environ.get("RANK", "0") == "0":
        show(metrics, as_json=as_json)


def train_rank(job: "TrainJob", found: "Found | None" = None) -> dict[str, object]:
    """One rank's work: rank 0 shows the progress and writes the events, the others are silent."""
    from kdpipe.stages.train import train

    if os.environ.get("RANK", "0") != "0":
        return train(job, Silent(), found)
    num_ranks = int(os.environ.get("WORLD_SIZE", "1"))
    made = None if job.made_with is None else job.made_with.model_dump()
    log = _events(job, once="accepted")
    run = watch("train", log, where=job.output, kept=partial(_kept, job.output), num_ranks=num_ranks, made_with=made)
    with lasting_streams(), run as progress:
        return train(job, progress, found)


def _kept(output: Path) -> str:
    """What of a training is there that a second signal, or one that came before it could save, has ended."""
    from kdpipe.stages.train.checkpoint import newest_record  # loads torch

    if (output / RUN_FILE).exists():
        return "the student is written"
    record = newest_record(output)
    return "no checkpoint was saved" if record is None else f"its checkpoint of step {record.step} is kept"


def _launch(job: "TrainJob", nproc: int) -> dict[str, object]:
    """The metrics of rank 0 of `nproc`; what ended them early is an event too, as rank 0 may not live to write it."""
    from kdpipe.pipeline.launch import launch  # loads torch

    try:
        return launch(train_rank, job, nproc=nproc, where=job.output, kept=partial(_kept, job.output))
    except BusyError:
        raise  # the events in this output are another run's
    except KdpipeError as err:
        log = _events(job)
        log.write("launch_failed", {"error": str(err), "exit_code": err.exit_code})
        log.close()
        raise


def _events(job: "TrainJob", *, once: str | None = None) -> EventLog:
    """once: kind of the event before which nothing is written, as the folder may be another run's"""
    return EventLog(job.output / "events.jsonl", after=job.output, once=once)


def _choose_nproc(asked: int | None, device: str, gpus: int) -> int:
    """How many ranks there are: as torchrun has decided, or as asked, or one a GPU. Raises ConfigError."""
    if "RANK" in os.environ:
        if asked is not None:
            raise ConfigError("torchrun has already decided it; leave the option out", where="--nproc")
        return int(os.environ.get("WORLD_SIZE", "1"))
    if asked is not None and device == "cuda" and asked > gpus:
        raise ConfigError(f"{asked} processes, one a GPU, but there are {gpus} GPUs", where="--nproc")
    return asked or max(gpus, 1)


def _choose_device(device: str) -> tuple[str, int]:
    """The device meant by `auto`, and how many GPUs there are for it."""
    import torch

    gpus = torch.cuda.device_count() if device != "cpu" and torch.cuda.is_available() else 0
    if device == "cuda" and not gpus:
        raise ConfigError("no GPU here that torch can use; leave it out or say cpu", where="--device cuda")
    return ("cuda" if gpus else "cpu"), gpus
