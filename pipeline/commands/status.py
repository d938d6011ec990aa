"""kdpipe status: how the steps of a run, a sweep or a submission stand."""

import sys
from dataclasses import asdict
from pathlib import Path

import click

from kdpipe.pipeline.options import PATH, Command, json_option
from kdpipe.pipeline.output import show


@click.command("status", cls=Command)
@click.argument("places", nargs=-1, type=PATH, metavar="[RUN.TOML|OUT]...")
@json_option
@click.pass_context
def command(ctx: click.Context, places: tuple[Path, ...], as_json: bool) -> None:
    """Show how each step stands: that of a run file, of a sweep's folder, or of students' outputs; here without one.

    One line a step: state, steps done, held-out KL, job, node, how often Slurm has queued it again, and why it waits
    or how it ended. Where `kdpipe submit` has sent jobs, Slurm is asked once for all of them; it works without
    accounting, without Slurm, and when Slurm has forgotten: what the runs themselves have written decides then.

    \b
    finished     it is there                       waiting   Slurm has it in its queue
    running      it is at work                     cancelled, interrupted: the same command, or kdpipe submit, goes on
    failed       it said why; nothing goes on      blocked   a step before it failed
    absent       it has not begun                  lost      Slurm has forgotten its job, and it has left nothing

    Exit codes: 0 all is finished or under way, 1 something failed for good, 2 something else is not under way.

    \b
    kdpipe status run.toml
    kdpipe status runs/sweep --json
    """
    from kdpipe.pipeline.entries import entries_of
    from kdpipe.pipeline.queue import ask_slurm
    from kdpipe.pipeline.standing import exit_code_of, rows_of, summary, table

    entries = [entry for place in places or (Path(),) for entry in entries_of(place)]
    queue = ask_slurm(entry.number for entry in entries if entry.number is not None and not entry.is_finished)
    rows = rows_of(entries, queue)
    if queue.silence:
        print(
            f"Slurm was asked and does not say: {queue.silence}; shown is what the runs themselves say", file=sys.stderr
        )
    if as_json:
        show(
            {"steps": [asdict(row) for row in rows], "summary": summary(rows), "slurm": queue.silence or None},
            as_json=True,
        )
    else:
        click.echo(table(rows))
        click.echo(summary(rows))
    ctx.exit(exit_code_of(rows))
