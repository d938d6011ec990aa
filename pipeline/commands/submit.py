"""kdpipe submit: a run file's work as jobs of a Slurm cluster."""

import os
import sys
from pathlib import Path

import click

from kdpipe.manifests.specs import RunFile
from kdpipe.manifests.submission import Job
from kdpipe.pipeline.cluster import Cluster
from kdpipe.pipeline.options import RunCommand, json_option, run_file_argument, typed
from kdpipe.pipeline.output import show
from kdpipe.pipeline.preflight import preflight
from kdpipe.pipeline.slurm import Batch
from kdpipe.pipeline.steps import disk_of
from kdpipe.pipeline.submit import Wanted, is_all_active, submit

NONE_LEFT = "none: all that is left waits or runs already"


@click.command("submit", cls=RunCommand)
@run_file_argument
@click.option("--dry-run", is_flag=True, help="Print the scripts in their order; ask Slurm nothing and write nothing.")
@json_option
def command(run: RunFile, dry_run: bool, as_json: bool) -> None:
    """Send what is left to do of a run file to Slurm: extraction, students, report, each after what it needs.

    Jobs that are preempted, reach their time limit or fail for a passing reason save and are queued again. Submit it
    again at any time: what is finished, waits or runs is left alone. [slurm] of the run file says what the jobs ask
    for: docs/slurm.md. The scripts and what they print are in OUTPUT/submit/.

    \b
    kdpipe submit run.toml --dry-run
    kdpipe submit run.toml
    """
    said = typed()
    if said.config is None:
        raise click.UsageError("no run file is named")
    wanted = Wanted(config=said.config, run=run, sets=said.sets, folder=Path(os.getcwd()))
    disk = disk_of(run)
    steps = wanted.steps(disk)
    if dry_run:
        click.echo("\n".join(_shown(wanted, batch) for batch in wanted.batches(steps)), nl=False)
        return
    if not steps:
        show({"jobs": [] if as_json else "none: every student is finished"}, as_json=as_json)
        return
    cluster = Cluster(seconds=run.slurm.answer_seconds)
    if is_all_active(wanted, disk, cluster):
        show({"jobs": [] if as_json else NONE_LEFT}, as_json=as_json)
        return
    for warning in preflight(wanted, steps, cluster):
        print(f"warning: {warning}", file=sys.stderr)
    sent = submit(wanted, disk, cluster)
    if sent.copies:
        ended = ", ".join(f"{piece.task_id} {piece.job.name}" for piece in sent.copies)
        print(f"warning: Slurm had them twice, the copies are ended: {ended}", file=sys.stderr)
    jobs = [_as_record(job) if as_json else _in_words(job) for job in sent.jobs]
    show(
        {
            "jobs": jobs or ([] if as_json else NONE_LEFT),
            "active_before": sent.active_before,
            "folder": wanted.submission,
        },
        as_json=as_json,
    )


def _shown(wanted: Wanted, batch: Batch) -> str:
    return f"# ---- {wanted.submission / batch.name}.sbatch\n{wanted.script(batch)}"


def _in_words(job: Job) -> str:
    """ "12  sweep-train, 3 tasks, after seal" """
    tasks = f", {len(job.tasks)} tasks" if job.tasks[0].index is not None else ""
    after = f", after {', '.join(job.needs[:3])}{' ...' if len(job.needs) > 3 else ''}" if job.needs else ""
    return f"{job.id}  {job.name}{tasks}{after}"


def _as_record(job: Job) -> dict[str, object]:
    return {"id": job.id, "name": job.name, "script": job.script, "tasks": len(job.tasks), "needs": list(job.needs)}
