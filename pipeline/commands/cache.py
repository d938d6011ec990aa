"""kdpipe cache info|verify: from the records alone, without torch."""

from pathlib import Path

import click

from kdpipe.manifests.cache import Cache
from kdpipe.manifests.errors import CheckFailed, IncompleteError
from kdpipe.pipeline.options import PATH, json_option
from kdpipe.pipeline.output import show
from kdpipe.pipeline.progress import EventLog, watch

cache_argument = click.argument("cache", type=PATH, metavar="CACHE")


@click.group("cache", invoke_without_command=True)
@click.pass_context
def command(ctx: click.Context) -> None:
    """Look at a cache or check every byte of it; needs no GPU and no torch.

    \b
    kdpipe cache info   CACHE
    kdpipe cache verify CACHE
    """
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


@command.command("info")
@cache_argument
@json_option
def info(cache: Path, as_json: bool) -> None:
    """Print what a cache holds, what made it, and whether it is complete.

    \b
    kdpipe cache info CACHE --json
    """
    show(Cache.open(cache).info(), as_json=as_json)


@command.command("verify")
@cache_argument
@json_option
def verify(cache: Path, as_json: bool) -> None:
    """Check every byte of a cache against its checksums, digests and plan.

    Exits 0 when all is good, 1 at the first damage, 2 when shards are still missing.

    \b
    kdpipe cache verify CACHE
    """
    opened = Cache.open(cache)
    shards, good = len(opened.plan.shards), 0
    with watch("cache verify", EventLog(None)) as progress:
        progress.begin("verify", total=shards, unit="shards")
        try:
            for _ in opened.verify():
                good += 1
                progress.advance(1)
        except (CheckFailed, IncompleteError) as err:
            show({"ok": False, "shards": shards, "shards_good": good, "error": str(err)}, as_json=as_json)
            raise
    determinism = opened.plan.engine.determinism
    show({"ok": True, "shards": shards, "shards_good": good, "determinism": determinism}, as_json=as_json)
