"""kdpipe stream: teacher and student side by side, rows through shared memory."""

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import click

from kdpipe.manifests.ring import RingReader
from kdpipe.manifests.specs import RunFile
from kdpipe.pipeline.live_run import (
    choose_ranks,
    forget,
    gone_if_refused,
    plan_folder_of,
    planned,
    run_live,
    training_of,
)
from kdpipe.pipeline.options import RunCommand, json_option, require_not_swapped, resume_option, this_command
from kdpipe.pipeline.output import results_only, show
from kdpipe.pipeline.training import launch_training, train_rank

if TYPE_CHECKING:
    from kdpipe.stages.train import Found, Training


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
    device, nproc = choose_ranks(run, "stream")
    from kdpipe.stages.live.beside import find_beside  # torch takes seconds: not for --help or a misspelt option
    from kdpipe.stages.train import check_training
    from kdpipe.stages.train.output import Output

    folder, kept = run.live.tee or plan_folder_of(output, "stream"), run.live.tee is not None
    with results_only():
        made = this_command(teacher=run.teacher.path, student=student, data=run.data.paths, output=output)
        training = training_of(run, folder, device, resume=resume, made_with=made, data=run.data.paths)
        with gone_if_refused(folder):
            plan = planned(run, folder, "stream", keep_rows=kept)
            found = check_training(training, nproc, find_beside(training, kept=kept))
        training = replace(training, inputs=found.inputs)
        record = Output(output).finished(found.inputs)
        if record is not None and record.metrics is not None:
            metrics = train_rank(training, found, command="stream")
        elif plan.complete:  # its teacher is not needed
            metrics = train_rank(training, command="stream") if nproc == 1 else launch_training(training, nproc)
        else:
            most_rows = int(plan.samples.column("num_rows").max())
            fed = partial(_fed_by, kept=kept)
            metrics = run_live(run, training, found, plan, nproc, fed, command="stream", most_rows=most_rows)
        if not kept:
            forget(folder)
        elif lacking := len(plan.plan.shards) - len(plan.committed()):
            click.echo(
                f"{lacking} of {len(plan.plan.shards)} shards of {folder} lack samples that were not asked for; "
                "finish it with kdpipe extract, of the same teacher and data",
                err=True,
            )
    show(metrics, as_json=as_json)


def _fed_by(training: "Training", ring: RingReader, found: "Found | None", *, kept: bool) -> "Found":
    """What a rank trains on."""
    from kdpipe.stages.live.beside import fed_by, find_beside

    return fed_by(ring, found or find_beside(training, kept=kept))
