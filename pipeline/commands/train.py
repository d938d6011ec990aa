"""kdpipe train: a student from caches, or from data alone, in this process or in one process a GPU."""

import os
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import click

from kdpipe.manifests.errors import ConfigError
from kdpipe.manifests.fitted import require_kl
from kdpipe.manifests.plan import read_plan
from kdpipe.manifests.specs import RunFile, flag_of
from kdpipe.pipeline.exporters import require_installed
from kdpipe.pipeline.options import (
    RunCommand,
    group_for,
    json_option,
    require_not_swapped,
    resume_option,
    this_command,
    typed,
)
from kdpipe.pipeline.output import results_only, show
from kdpipe.pipeline.reads import OF_CACHES, within
from kdpipe.pipeline.training import (
    choose_device,
    choose_nproc,
    find_data,
    launch_training,
    node_copies,
    train_rank,
)


@click.command("train", cls=RunCommand)
@resume_option
@json_option
def command(run: RunFile, resume: str, as_json: bool) -> None:
    """Train a student from one or more caches; the teacher is not needed.

    With --data in place of --cache there is no teacher at all: cross-entropy on the data (SFT), prepared with the
    student's own tokenizer and chat template; its answers may be a teacher's, by kdpipe generate. With both, a student
    with another tokenizer than the teacher's learns from the cache: --data is what the cache was made of.

    Prints the final metrics. Events go to OUTPUT/events.jsonl. Under torchrun it is one rank of that launch.
    Interrupted? The same command again goes on from its last checkpoint. Ctrl-C, SIGTERM, SIGUSR2 and SIGHUP finish the
    step, save and exit (130 for Ctrl-C, 75 for the others); a second one ends it at once.

    \b
    kdpipe train --student models/small --cache /scratch/cache --output runs/a --set train.lr=3e-4 loss.temperature=2
    kdpipe train --student models/small --data chat.jsonl --output runs/sft
    """
    student, output = run.student.path, run.train.output
    assert student is not None, "RunCommand has asked for it"
    assert output is not None, "RunCommand has asked for it"
    caches, data = _sources(run)
    used = data if not caches or "data.paths" in typed().keys else ()
    both = bool(caches) and "data.paths" in typed().keys
    require_not_swapped(student, caches)
    require_installed(run.train.loggers)
    if run.cache.max_codec_kl is not None:
        for path in caches:
            require_kl(path, read_plan(path), run.cache.max_codec_kl)  # before one is copied to this node
    spec = run.training() if caches else run.training().without_teacher()
    from kdpipe.stages.train import (  # torch takes seconds: not for --help or a misspelt option
        Training,
        check_training,
        samples_beside,
    )

    device, gpus = choose_device(run.train.device)
    nproc = choose_nproc(run.train.nproc, device, gpus)
    training = Training(
        student=student,
        caches=caches,
        weights=run.cache.weights,
        unmatched=run.cache.unmatched,
        max_codec_kl=run.cache.max_codec_kl,
        data=data,
        align=run.student.align,
        align_floor=run.student.align_floor,
        workers=run.data.workers,
        output=output,
        spec=spec,
        device=device,
        io=run.cache.io,
        trust=run.student.trust_remote_code,
        resume=resume,
        group=group_for(run.train.group, output),
        loggers=run.train.loggers,
        made_with=this_command(student=student, cache=caches or None, data=used or None, output=output),
    )
    is_first = os.environ.get("RANK", "0") == "0"
    beside = samples_beside(output) if data and not caches and is_first else nullcontext()
    with results_only(), beside, node_copies(run, output) as copies:
        training = replace(training, copies=copies)
        found = check_training(training, nproc, find_data(training) if data else None)
        if both and found.crossing is None:
            raise ConfigError(
                "the student has the teacher's tokenizer, so the cache has all that it learns from: its samples are "
                "those that the rows were made for; leave the option out",
                where="--data",
            )
        if nproc == 1 or "RANK" in os.environ:
            metrics = train_rank(training, found)
        else:
            metrics = launch_training(replace(training, inputs=found.inputs), nproc)
    if is_first:
        show(metrics, as_json=as_json)


def _sources(run: RunFile) -> tuple[tuple[Path, ...], tuple[Path, ...]]:
    """The caches to train on and the data that they were made of, where these are known; or data without caches.

    Raises ConfigError where the command line says what is of use with the other alone.
    """
    caches, data = run.cache.path, run.data.paths
    if not caches and not data:
        raise click.UsageError("option '--cache' (a teacher's rows) or '--data' (no teacher) is missing")
    if not caches and run.teacher.path is not None and "data.paths" not in typed().keys:
        raise ConfigError(
            f"the run file names a teacher ({run.teacher.path}) and no cache of its rows: make one with kdpipe "
            "extract, or train beside the teacher with kdpipe stream; --data trains on data alone",
            where="--cache",
        )
    if caches and "data.paths" in typed().keys:
        return caches, data
    table, other, but = ("data", "--data", OF_CACHES) if caches else ("cache", "--cache", ("cache.path",))
    for key in typed().keys:
        if within(key, table) and key not in but:
            raise ConfigError(f"it is of use with {other} alone; leave it out", where=flag_of(key).name)
    return caches, data
