"""kdpipe cancel: ends the jobs of one submission."""

from pathlib import Path

import click

from kdpipe.manifests.specs import load, sweep_output
from kdpipe.pipeline.cluster import Cluster
from kdpipe.pipeline.options import PATH, SETS, Command, json_option
from kdpipe.pipeline.output import show
from kdpipe.pipeline.submit import cancel


@click.command("cancel", cls=Command, params=[SETS])
@click.argument("what", type=PATH, metavar="RUN.toml|OUTPUT")
@json_option
def command(what: Path, sets: tuple[str, ...], as_json: bool) -> None:
    """Cancel the jobs that kdpipe submit has sent for a run file, or for the output it names, and no others.

    Finished shards, checkpoints and students stay; kdpipe submit goes on from there.

    \b
    kdpipe cancel run.toml
    """
    seconds = Cluster().seconds
    if what.is_dir():
        output = what
    else:
        run = load(what, sets)
        output, seconds = sweep_output(run), run.slurm.answer_seconds
    cluster = Cluster(seconds=seconds)
    cluster.require()
    ended = cancel(output, cluster)
    record: dict[str, object] = {
        "cancelled": [f"{piece.task_id}  {piece.job.name}  {piece.task.step}" for piece in ended]
    }
    if as_json:
        record = {
            "cancelled": [{"id": piece.task_id, "step": piece.task.step, "state": piece.state} for piece in ended]
        }
    elif not ended:
        record = {"cancelled": "nothing: no job of it waits or runs"}
    else:
        record["kept"] = "shards, checkpoints and students that are finished; kdpipe submit goes on from there"
    show(record, as_json=as_json)
