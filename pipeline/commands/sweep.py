"""kdpipe sweep: the students of one run file."""

import shlex

import click

from kdpipe.manifests.specs import RunFile
from kdpipe.pipeline.options import RunCommand, json_option, run_file_argument, typed
from kdpipe.pipeline.output import to_json
from kdpipe.pipeline.steps import disk_of, steps_of


@click.command("sweep", cls=RunCommand)
@run_file_argument
@json_option
def command(run: RunFile, as_json: bool) -> None:
    """Print what is left to do of a run file with [sweep], a command a line: extract, then each student.

    Every combination of the values in sweep.grid is a run, named after what varies; sweep.runs lists runs one by one.
    Each command can be run as it stands, on any machine that sees the same folders.

    \b
    kdpipe sweep run.toml

    \b
    [sweep.grid]
    train.lr = [1e-4, 3e-4]
    loss.temperature = [1, 2]
    """
    said = typed()
    if said.config is None and not said.sets:
        raise click.UsageError("no run file is named")
    steps = steps_of(said.config, run, disk_of(run), said.sets)
    if as_json:
        click.echo(to_json({"steps": [{"name": step.name, "argv": step.argv} for step in steps]}))
    else:
        for step in steps:
            click.echo(shlex.join(("kdpipe", *step.argv)))
