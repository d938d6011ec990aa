"""kdpipe extract: one teacher pass into a cache."""

import click

from kdpipe.manifests.specs import RunFile
from kdpipe.pipeline.making import kept_in, log_in
from kdpipe.pipeline.options import Part, RunCommand, group_for, json_option, only, this_command
from kdpipe.pipeline.output import results_only, show
from kdpipe.pipeline.progress import watch


@click.command("extract", cls=RunCommand)
@click.option(
    "--part", type=Part(), help="This writer's share of the shards: 1/4 to 4/4 for four writers of one cache."
)
@click.option(
    "--grow",
    is_flag=True,
    help="Add the data to what is in the cache already. Not needed where the data named holds all of that too.",
)
@click.option(
    "--check-inputs",
    is_flag=True,
    help="Read teacher and data in full, also where no file has changed since the cache was planned from them.",
)
@json_option
def command(run: RunFile, part: tuple[int, int] | None, grow: bool, check_inputs: bool, as_json: bool) -> None:
    """Run the teacher once over the data and keep the input of its lm_head for every supervised token.

    Run it again after an interruption: finished shards are kept. With more data it grows: the teacher runs on the new
    samples only, and nothing that was there is written again. Events go to CACHE/runs/.

    \b
    kdpipe extract --teacher models/large --data chat.jsonl --cache /scratch/cache
    """
    cache = only(run.cache.path)
    from kdpipe.stages.extract import ExtractSpec, extract  # torch takes seconds: not for --help or a misspelt option

    group = group_for(run.cache.group, cache)
    spec = ExtractSpec.of(run, group=group, grow=grow, check_inputs=check_inputs)
    typed = this_command(teacher=run.teacher.path, data=run.data.paths, cache=cache).model_dump()
    run_log = watch("extract", log_in(cache), where=cache, kept=lambda: kept_in(cache), part=part, made_with=typed)
    with results_only(), run_log as progress:
        made = extract(spec, cache, progress, part=part)
    show(made.info(), as_json=as_json)
