"""kdpipe cache info|verify|compare: from the files alone, without torch."""

import dataclasses
from pathlib import Path

import click

from kdpipe.manifests.cache import Cache
from kdpipe.manifests.compare import TOLERANCE, compare
from kdpipe.manifests.errors import CheckFailed, DriftError, IncompleteError
from kdpipe.pipeline.options import PATH, Finite, json_option
from kdpipe.pipeline.output import show
from kdpipe.pipeline.progress import EventLog, watch

cache_argument = click.argument("cache", type=PATH, metavar="CACHE")


@click.group("cache", invoke_without_command=True)
@click.pass_context
def command(ctx: click.Context) -> None:
    """Look at a cache, check every byte of it, or compare two; needs no GPU and no torch.

    \b
    kdpipe cache info    CACHE
    kdpipe cache verify  CACHE
    kdpipe cache compare CACHE OTHER
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


@command.command("compare")
@cache_argument
@click.argument("other", type=PATH, metavar="OTHER")
@click.option(
    "--tolerance",
    type=Finite(min=0),
    help="Largest distance of a row, |a - b| / |a|.  [default: by the coarser dtype, "
    + ", ".join(f"{bound:g} {dtype}" for dtype, bound in TOLERANCE.items())
    + "]",
)
@json_option
def compare_caches(cache: Path, other: Path, tolerance: float | None, as_json: bool) -> None:
    """Measure how far the rows of two caches of the same samples are apart: another engine, another machine.

    Exits 0 when no row is further than the tolerance, 3 when one is, 4 when they are not of the same samples.

    \b
    kdpipe cache compare CACHE OTHER
    """
    first, second = Cache.open(cache), Cache.open(other)
    bound = tolerance
    if bound is None:
        bound = max(TOLERANCE[each.plan.settings.dtype] for each in (first, second))
    with watch("cache compare", EventLog(None)) as progress:
        progress.begin("compare", total=first.plan.num_rows, unit="rows")
        found = compare(first, second, progress.advance)
        progress.end()
    show(dataclasses.asdict(found) | {"tolerance": bound}, as_json=as_json)
    if not found.worst_distance <= bound:
        raise DriftError(
            f"row {found.worst_row} of sample {found.worst_sample} is {found.worst_distance:.1e} from that of {cache} "
            f"(allowed {bound:g}); were the teachers the same?",
            where=other,
        )
