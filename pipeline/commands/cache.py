"""kdpipe cache: what is done with a whole cache, one command each: looking at it here, the others in two modules.

cache_checks.py: verify, repair, gc, compare; cache_copies.py: pack, unpack, convert, derive, export, import.
"""

from pathlib import Path

import click

from kdpipe.manifests.cache import Cache
from kdpipe.pipeline.commands.cache_checks import compare_caches, gc, repair_cache, verify
from kdpipe.pipeline.commands.cache_copies import (
    convert_cache,
    derive_cache,
    export,
    import_cache,
    pack_cache,
    unpack_cache,
)
from kdpipe.pipeline.options import Command, cache_argument, json_option
from kdpipe.pipeline.output import show


class WholeLines(click.Group):
    """A group that says the whole first sentence of each command's help; the stock one cuts it off at a line."""

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, each.get_short_help_str(limit=1000)) for name, each in self.commands.items()])


@click.group("cache", cls=WholeLines, invoke_without_command=True)
@click.pass_context
def command(ctx: click.Context) -> None:
    """Look at a cache, check or repair it, compare two, pack, code, derive, export or import one.

    No GPU, and torch for the last four alone.

    \b
    kdpipe cache info    CACHE
    kdpipe cache verify  CACHE
    kdpipe cache repair  CACHE
    kdpipe cache gc      CACHE
    kdpipe cache compare CACHE OTHER
    kdpipe cache pack    CACHE FILE
    kdpipe cache unpack  FILE CACHE
    kdpipe cache convert CACHE OUT --codec fisher
    kdpipe cache derive  CACHE OUT --kind sampled|logprob|topk
    kdpipe cache export  CACHE OUT
    kdpipe cache import  CACHE --from FILES --tokenizer MODEL
    """
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


@click.command("info", cls=Command)
@cache_argument
@json_option
def info(cache: Path, as_json: bool) -> None:
    """Print what a cache holds, what made it, and whether it is complete.

    \b
    kdpipe cache info CACHE --json
    """
    show(Cache.open(cache).info(), as_json=as_json)


for each in (
    info,
    verify,
    repair_cache,
    gc,
    compare_caches,
    pack_cache,
    unpack_cache,
    convert_cache,
    derive_cache,
    export,
    import_cache,
):
    command.add_command(each)
