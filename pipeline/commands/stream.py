"""kdpipe stream: teacher and student side by side, rows through shared memory."""

import os
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from kdpipe.manifests.cache import Cache
from kdpipe.manifests.errors import ConfigError
from kdpipe.manifests.ring import RingEnd, RingReader, make_ring
from kdpipe.manifests.shard import DTYPES, TAGS
from kdpipe.manifests.specs import RunFile
from kdpipe.pipeline.options import RunCommand, json_option, require_not_swapped, resume_option, this_command
from kdpipe.pipeline.output import results_only, show
from kdpipe.pipeline.progress import EventLog, watch
from kdpipe.pipeline.teacher_role import teacher_beside
from kdpipe.pipeline.training import choose_device, choose_nproc, launch_training, train_rank

if TYPE_CHECKING:
    from kdpipe.stages.train import Found, Training

MIB = 1 << 20


@click.command("stream", cls=RunCommand)
@resume_option
@json_option
def command(run: RunFile, resume: str, as_json: bool) -> None:
    """Train a student beside its teacher: nothing waits for a whole pass, and no row need be stored.

    The teacher runs in a process of its own and answers what the next steps ask for; its rows are checked as extract
    checks them and go through shared memory. The student is the one that extract and train would make, bit for bit on
    a CPU. On a CPU each side has its own cores. Interrupted? The same command again goes on from its last checkpoint.
    With --tee the rows are kept as well: the teacher sees each sample once, further students train from the cache.
    Prints the metrics of train, and share_waiting: how much of the time the student waited for its teacher.

    \b
    kdpipe stream --teacher models/large --student models/small --data chat.jsonl --output runs/a
    kdpipe stream --teacher models/large --student models/small --data chat.jsonl --output runs/a --tee cache
    """
    student, output = run.student.path, run.train.output
    assert student is not None, "RunCommand has asked for it"
    assert output is not None, "RunCommand has asked for it"
    require_not_swapped(student, ())
    if "RANK" in os.environ:
        raise ConfigError("it starts its ranks itself, with --nproc", where="kdpipe stream")
    from kdpipe.stages.live.beside import find_beside  # torch takes seconds: not for --help or a misspelt option
    from kdpipe.stages.train import Training, check_training
    from kdpipe.stages.train.output import Output

    device, gpus = choose_device(run.train.device)
    nproc = choose_nproc(run.train.nproc, device, gpus)
    folder = run.live.tee or output.absolute().parent / f".{output.name}.stream"
    with results_only():
        plan = _planned(run, folder)
        training = Training(
            student=student,
            caches=(folder,),
            output=output,
            spec=run.training(),
            device=device,
            trust=run.student.trust_remote_code,
            resume=resume,
            made_with=this_command(teacher=run.teacher.path, student=student, data=run.data.paths, output=output),
        )
        kept = run.live.tee is not None
        found = check_training(training, nproc, find_beside(training, kept=kept))
        training = replace(training, inputs=found.inputs)
        record = Output(output).finished(found.inputs)
        if record is not None and record.metrics is not None:
            metrics = train_rank(training, found, command="stream")
        elif plan.complete:  # its teacher is not needed
            metrics = train_rank(training, command="stream") if nproc == 1 else launch_training(training, nproc)
        else:
            metrics = _beside(run, training, found, plan, nproc)
        if not kept:
            shutil.rmtree(folder, ignore_errors=True)
        elif lacking := len(plan.plan.shards) - len(plan.committed()):
            click.echo(
                f"{lacking} of {len(plan.plan.shards)} shards of {folder} lack samples that were not asked for; "
                "finish it with kdpipe extract, of the same teacher and data",
                err=True,
            )
    show(metrics, as_json=as_json)


def _planned(run: RunFile, folder: Path) -> Cache:
    """The plan of the samples, in a folder beside the output that goes when the run is finished."""
    from kdpipe.stages.extract import ExtractSpec
    from kdpipe.stages.extract.staging import staged

    spec = replace(ExtractSpec.of(run), keep_rows=run.live.tee is not None)
    with watch("stream", EventLog(None)) as progress, staged(spec, folder, progress) as found:
        return found.publish()


def _beside(run: RunFile, training: "Training", found: "Found", plan: Cache, nproc: int) -> dict[str, object]:
    """Both roles at work; the student's metrics."""
    size = run.live.ring_mib * MIB
    width = plan.plan.head.hidden_size * DTYPES[TAGS[plan.plan.head.dtype]].itemsize
    longest = int(plan.samples.column("num_rows").max()) * width
    if longest > size:
        raise ConfigError(
            f"{run.live.ring_mib} MiB do not hold the rows of the longest sample; take {-(-longest // MIB)} or more",
            where="live.ring_mib",
        )
    theirs, ours = zip(*(make_ring(size) for _ in range(nproc)), strict=True)
    try:
        with teacher_beside(run, plan.path, theirs, cores=_teachers_cores(run, training.device)):
            try:
                kept = run.live.tee is not None
                if nproc == 1:
                    return stream_rank(training, ours, kept, found)
                return launch_training(training, nproc, ours, kept, rank=stream_rank)
            finally:
                for end in ours:
                    end.close()
    finally:
        for end in theirs:
            end.close()


def stream_rank(
    training: "Training", ends: Sequence[RingEnd], kept: bool, found: "Found | None" = None
) -> dict[str, object]:
    """One rank's work, with its own of the readers' ends; its metrics, with the share of time it waited for rows.

    kept: the rows are, too
    found: what this process has opened already
    """
    from kdpipe.stages.live.beside import fed_by, find_beside

    rank = int(os.environ.get("RANK", "0"))
    for number, end in enumerate(ends):
        if number != rank:
            end.close()
    with RingReader(ends[rank]) as ring:
        metrics = train_rank(training, fed_by(ring, found or find_beside(training, kept=kept)), command="stream")
        ring.finish()
        ring.take("the end")
        return metrics | {"share_waiting": round(ring.share_waiting(), 3)}


def _teachers_cores(run: RunFile, student_device: str) -> list[int]:
    """The cores that are the teacher's alone, where both roles compute on a CPU; this process keeps the others.

    Two runtimes that spin on the same cores are ten times slower than one.
    """
    import torch

    from kdpipe.stages.models.device import pick_device

    cores = sorted(os.sched_getaffinity(0))
    if "cuda" in (pick_device(run.engine.device).type, student_device) or len(cores) < 2:
        return []
    count = run.live.teacher_cores or len(cores) // 2
    if count >= len(cores):
        raise ConfigError(f"{count} of {len(cores)} cores leave the student none", where="live.teacher_cores")
    os.sched_setaffinity(0, cores[count:])
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(len(cores) - count)
    return cores[:count]
