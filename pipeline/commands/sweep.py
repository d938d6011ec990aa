"""kdpipe sweep: the students of one run file, several at a time, from one cache."""

from collections.abc import Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import click

from kdpipe.manifests.cores import given_cores
from kdpipe.manifests.durable import disk_error, make_folder
from kdpipe.manifests.errors import (
    CheckFailed,
    ConfigError,
    DriftError,
    IncompleteError,
    InputError,
    InternalError,
    KdpipeError,
    TemporaryError,
    stopped,
)
from kdpipe.manifests.run import EVENTS
from kdpipe.manifests.running import alone_in, require_nobody_in
from kdpipe.manifests.specs import Member, RunFile, members_of, override, same_run, sweep_output
from kdpipe.pipeline.local import Outcome, run_steps, share_out
from kdpipe.pipeline.options import RunCommand, group_for, json_option, run_file_argument, this_command, typed
from kdpipe.pipeline.precheck import require_trainable
from kdpipe.pipeline.progress import EventLog, watch
from kdpipe.pipeline.prospect import Prospect, prospect_of
from kdpipe.pipeline.roles import Share, all_gpus
from kdpipe.pipeline.runs import state_of
from kdpipe.pipeline.steps import OF_SUBMIT, REPORT, REPORT_FILE, Step, disk_of, steps_of
from kdpipe.pipeline.sweep_view import Show, name_of, print_commands, print_students, said

WORST_FIRST = (InternalError, InputError, CheckFailed, DriftError, IncompleteError, TemporaryError)
"""A sweep ends with the exit code of the first of these that a run of it has."""
DRAWS = find_spec("vl_convert") is not None
"""Whether kdpipe report can draw here."""


@click.command("sweep", cls=RunCommand)
@run_file_argument
@click.option("--dry-run", is_flag=True, help="Say what it comes to, print the commands, and end.")
@json_option
def command(run: RunFile, dry_run: bool, as_json: bool) -> None:
    """Train all students of a run file: every combination of sweep.grid, and each of sweep.runs.

    The cache is extracted first where it lacks rows. Then --jobs runs at a time have a share of the cores, or of the
    GPUs, each. A run is named after what varies; its student goes to OUTPUT/NAME, what it says to OUTPUT/NAME/log.txt.
    One that fails stops no other and is named at the end. Interrupted, or one failed? The same command again: what is
    finished is kept, what was interrupted goes on. Ctrl-C and SIGTERM are passed on to the runs, which save and end.

    \b
    kdpipe sweep run.toml --jobs 2
    kdpipe sweep run.toml --dry-run

    \b
    [sweep.grid]
    train.lr = [1e-4, 3e-4]
    loss.temperature = [1, 2]
    """
    said = typed()
    if said.config is None and not said.sets:
        raise click.UsageError("no run file is named: kdpipe sweep RUN.toml")
    if not run.sweep.grid and not run.sweep.runs:
        raise ConfigError(
            "it varies nothing: give sweep.grid or sweep.runs, or train its one student with kdpipe train"
        )
    if same := same_run(members_of(run), but=OF_SUBMIT):
        raise ConfigError(
            f"runs {same[0].name} and {same[1].name} differ in [{OF_SUBMIT}] alone, which only kdpipe submit reads; "
            "keep one",
            where="sweep",
        )
    output = sweep_output(run)
    if not dry_run:
        require_nobody_in(output)
    steps = steps_of(said.config, run, disk_of(run), said.sets)
    if not DRAWS:
        steps = tuple(step for step in steps if step.name != REPORT)
    prospect = prospect_of(said.config, run, steps, said.sets)
    if dry_run:
        print_commands(prospect, steps, as_json=as_json)
        return
    if any(step.member is not None for step in steps):
        require_trainable(said.config, (*said.sets, override("sweep.output", str(output))), but_busy=True)
    outcomes = _worked_off(run, steps, prospect) if steps else []
    print_students(members_of(run), outcomes, output / REPORT_FILE, as_json=as_json)
    students = [outcome for outcome in outcomes if outcome.step.name != REPORT]  # without a page they are as good
    if not all(outcome.is_good for outcome in students):
        raise _verdict(students, output)


def _worked_off(run: RunFile, steps: Sequence[Step], prospect: Prospect) -> list[Outcome]:
    """How the steps ended. Raises BusyError where another sweep is at work, the error of a signal that ended it."""
    members, output = members_of(run), sweep_output(run)
    slots = _slots(run, members)
    try:
        make_folder(output, group_for(run.train.group, output))
    except OSError as err:
        raise disk_error(err, output) from err
    log = EventLog(output / EVENTS, after=output, once="accepted")
    made = this_command(output=output, cache=run.cache.path or None).model_dump()
    kept = partial(_kept, members)
    with watch("sweep", log, where=output, kept=kept, made_with=made) as progress, alone_in(output) as keep:
        progress.event("accepted")
        if run.sweep.report and not DRAWS:
            progress.note("no page at the end: kdpipe report draws with what pip install 'kdpipe[report]' brings")
        for line in prospect.lines() if prospect.num_left else ():
            progress.note(line)
        if prospect.num_finished:
            left = {step.member.name for step in steps if step.member is not None}
            kept_names = ", ".join(member.name for member in members if member.name not in left)
            progress.note(f"finished already, and kept: {kept_names}")
        outcomes, number = run_steps(steps, slots, Show(progress, steps, keep))
        if number is not None:
            raise stopped(number.name, where=output, kept=kept())
        progress.end()
        for outcome in outcomes:
            if not outcome.is_good:
                progress.note(said(outcome))
    return outcomes


def _slots(run: RunFile, members: Sequence[Member]) -> list[Share]:
    """What each of the runs at a time has of this machine. Raises ConfigError for more ranks than it has GPUs."""
    jobs = min(run.sweep.jobs, len(members))
    gpus = [] if run.train.device == "cpu" else all_gpus()
    slots = share_out(jobs, given_cores(), gpus)
    least = min(len(slot.gpus) for slot in slots)
    asked = max(member.run.train.nproc or 1 for member in members)
    if least and asked > least:
        raise ConfigError(
            f"{asked} processes a run (train.nproc), one a GPU, but each of {jobs} at a time has {least}; give fewer",
            where="--jobs",
        )
    return slots


def _kept(members: Sequence[Member]) -> str:
    """What of a sweep that a signal ended is there."""
    states = [state_of(member.output).status for member in members]
    return f"{states.count('finished')} of {len(states)} runs are finished, the others go on from what they saved"


def _verdict(outcomes: Sequence[Outcome], output: Path) -> KdpipeError:
    """The error of a sweep of which something failed, with the exit code of the worst."""
    failed = [outcome for outcome in outcomes if outcome.exit_code]
    vain = sum(outcome.exit_code is None for outcome in outcomes)
    kind = next((kind for kind in WORST_FIRST if any(each.exit_code == kind.exit_code for each in failed)), CheckFailed)
    names = ", ".join(name_of(outcome.step) for outcome in failed)
    return kind(
        f"{len(failed)} of {len(outcomes)} did not end well: {names}{f'; {vain} were not started' if vain else ''}; "
        "mend what their errors name, then the same command again does what is left",
        where=output,
    )
