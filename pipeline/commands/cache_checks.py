"""kdpipe cache verify|repair|gc|compare: from the files alone, without torch; --recompute runs a teacher."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kdpipe.manifests.cache import Cache
from kdpipe.manifests.compare import TOLERANCE, compare
from kdpipe.manifests.durable import QUARANTINE
from kdpipe.manifests.errors import CacheError, CheckFailed, ConfigError, DriftError, IncompleteError, KdpipeError
from kdpipe.manifests.fitted import Choice
from kdpipe.manifests.made_with import extract_again
from kdpipe.manifests.made_with import repair as way_out
from kdpipe.manifests.packed import is_packed
from kdpipe.manifests.specs import RunFile, flag_of
from kdpipe.manifests.unpack import check_packed
from kdpipe.manifests.verify import Finding, Level, collect_garbage, examine, repair
from kdpipe.pipeline.options import PATH, Command, Finite, RunCommand, cache_argument, json_option, typed
from kdpipe.pipeline.output import results_only, show
from kdpipe.pipeline.progress import EventLog, watch

if TYPE_CHECKING:
    from kdpipe.stages.extract.recompute import Recomputed

BEYOND_REPAIR = ("plan", "samples")
"""Parts that say what all the others are: without them nothing can be made again in its place."""


@click.command("verify", cls=RunCommand, within="cache")
@cache_argument
@click.option("--quick", is_flag=True, help="Sizes, headers, tables and the first rows of every shard: seconds.")
@click.option("--full", is_flag=True, help="Every byte against its checksums: as without any of the three.")
@click.option("--deep", is_flag=True, help="Also that rows are finite and masks, ids and rows agree.")
@click.option(
    "--recompute",
    type=click.IntRange(min=1),
    metavar="N",
    help="Also run the teacher again on N samples and compare; needs --teacher, torch and the engine it was made with.",
)
@json_option
def verify(
    cache: Path,
    quick: bool,
    full: bool,
    deep: bool,
    recompute: int | None,
    run: RunFile,
    as_json: bool,
) -> None:
    """Check a cache against its checksums, digests and plan; by default every byte. Tells all damage, not the first.

    A packed cache is checked as it lies, every byte.

    Exits 0 when all is good, 1 where there is damage (`kdpipe cache repair` puts it aside), 2 when only shards are
    missing, 3 where the teacher now gives other rows than are stored.

    \b
    kdpipe cache verify CACHE
    kdpipe cache verify CACHE --recompute 20 --teacher models/large
    """
    teacher = run.teacher.path
    if recompute is not None and teacher is None:
        raise ConfigError("--recompute and --teacher go together", where="--recompute")
    if recompute is None and (useless := sorted(set(typed().keys) - {"cache.io"})):
        raise ConfigError("it is of use with --recompute N alone", where=flag_of(useless[0]).name)
    level = _level({"quick": quick, "full": full, "deep": deep})
    if is_packed(cache):
        _verify_packed(cache, as_json=as_json)
        return
    opened = Cache.open(cache, io=run.cache.io)
    if recompute is not None and (sidecar := opened.plan.head.sidecar) is not None:
        raise ConfigError(f"it has {sidecar.has}: verify the cache that it was made of", where=cache)
    findings = _looked_at(opened, level)
    errors = [finding.error for finding in findings if finding.error is not None]
    errors.sort(key=lambda error: not isinstance(error, CheckFailed))
    damage = [error for error in errors if isinstance(error, CheckFailed)]
    result = _summed_up(findings, level) | {"determinism": opened.plan.engine.determinism}
    if errors and as_json:
        result |= {"error": str(errors[0]), "problems": [str(error) for error in errors]}
    elif damage:
        result |= {"problems": [error.without_hint() for error in damage]}
    again = None
    if recompute is not None and teacher is not None and not errors:
        again = _recomputed(opened, teacher, run, recompute)
        recomputed = dataclasses.asdict(again)
        result |= {
            "ok": again.is_near,
            "recomputed": recomputed if as_json else in_words(recomputed),
        }
    show(result, as_json=as_json)
    if damage:
        raise _verdict(cache, damage, findings)
    if errors:  # something is missing: a file of the teacher's, or shards
        opened.head()
        opened.check_teacher_files()
        opened.require_complete()
    if again is not None and not again.is_near:
        raise DriftError(f"{_drift(again)}; is the engine another, or were the rows wrong from the start?", where=cache)


def _drift(again: "Recomputed") -> str:
    """What is further away than it may be."""
    if again.worst_distance <= again.bound:
        return (
            f"rows are a mean KL of {again.shift:.1e} nats from what the teacher gives now under the same codec "
            f"(allowed {again.shift_bound:.1e})"
        )
    return (
        f"sample {again.worst_sample} is {again.worst_distance:.1e} from what the teacher gives now (allowed "
        f"{again.bound:g})"
    )


def _level(asked: dict[Level, bool]) -> Level:
    """The one that is asked for, full where none is. Raises ConfigError for more than one."""
    chosen = [level for level, is_asked in asked.items() if is_asked]
    if len(chosen) > 1:
        raise ConfigError(f"how far to look is one choice, --{' or --'.join(chosen)}", where=f"--{chosen[0]}")
    return chosen[0] if chosen else "full"


def _summed_up(findings: Sequence[Finding], level: Level) -> dict[str, object]:
    """How many shards were looked at, and how many of them are good or missing."""
    shards = [finding for finding in findings if isinstance(finding.part, int)]
    return {
        "ok": all(finding.error is None for finding in findings),
        "level": level,
        "shards": len(shards),
        "shards_good": sum(finding.error is None for finding in shards),
        "shards_missing": sum(isinstance(finding.error, IncompleteError) for finding in shards),
    }


def _verify_packed(packed: Path, *, as_json: bool) -> None:
    """Every byte of a packed cache against its digests."""
    with watch("cache verify", EventLog(None)) as progress:
        problems = check_packed(packed, progress)
    result: dict[str, object] = {"ok": not problems, "packed_bytes": packed.stat().st_size}
    if problems or as_json:
        result |= {"problems": [error.without_hint() for error in problems]}
    show(result, as_json=as_json)
    if problems:
        raise problems[0]


def _verdict(cache: Path, damage: Sequence[KdpipeError], findings: Sequence[Finding]) -> KdpipeError:
    """The error that ends `verify` where there is damage: its problems were printed, so this is the way out of them."""
    beyond = next((finding.error for finding in findings if finding.damaged and finding.part in BEYOND_REPAIR), None)
    if beyond is not None:
        return beyond
    names = sorted({Path(str(error.where)).name for error in damage})
    shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return type(damage[0])(f"damaged: {shown}", where=cache, hint=way_out(cache))


def in_words(found: dict[str, Any]) -> dict[str, object]:
    """A comparison for a person: how many rows of how many are equal, of coded ones what is compared."""
    equal, total = round(found["rows_equal"] * found["num_rows"]), found["num_rows"]
    words: dict[str, object] = {"rows_equal": f"{equal:,} of {total:,} bit for bit"}
    if found.get("shift") is not None:
        words["rows_equal"] = f"{words['rows_equal']}, once the codec has stored them"
        whose = "mean KL in nats of a sample's rows, as they are stored, from the teacher's own"
        words["worst_distance"] = f"{found['worst_distance']:.2g}: {whose}"
        words |= {name: f"{found[name]:.2g}" for name in ("bound", "shift", "shift_bound")}
    return {name: value for name, value in found.items() if value is not None or "shift" not in name} | words


def _recomputed(opened: Cache, teacher: Path, run: RunFile, count: int) -> "Recomputed":
    from kdpipe.manifests.engine import EngineOptions
    from kdpipe.stages.extract.recompute import recompute  # torch takes seconds: only where it is asked for

    with results_only(), watch("cache verify", EventLog(None)) as progress:
        return recompute(opened, teacher, count, progress, options=EngineOptions.of(run))


def _looked_at(opened: Cache, level: Level) -> list[Finding]:
    """Every finding, with progress."""
    found = []
    with watch("cache verify", EventLog(None)) as progress:
        progress.begin("verify", total=len(opened.plan.shards), unit="shards")
        for finding in examine(opened, level):
            found.append(finding)
            if isinstance(finding.part, int):
                progress.advance(1)
    return found


@click.command("repair", cls=Command)
@cache_argument
@click.option("--deep", "level", flag_value="deep", default="full", help="Look as `verify --deep` does.")
@json_option
def repair_cache(cache: Path, level: Level, as_json: bool) -> None:
    """Check every byte and put what is damaged into CACHE/quarantine; the same `kdpipe extract` then makes it again.

    Only damaged shards and files of the teacher's are moved, nothing is deleted. Exits 0 when nothing is damaged, 2
    when the cache now lacks what was put aside.

    \b
    kdpipe cache repair CACHE
    """
    opened = Cache.open(cache)
    with watch("cache repair", EventLog(None)):
        damaged = repair(opened, level)
    problems = [finding.error.without_hint() for finding in damaged if finding.error is not None]
    show({"put_aside": len(damaged)} | ({"problems": problems} if problems or as_json else {}), as_json=as_json)
    if damaged:
        what = "1 damaged part is" if len(damaged) == 1 else f"{len(damaged)} damaged parts are"
        raise IncompleteError(f"{what} in {QUARANTINE}/ now", where=cache, hint=extract_again(cache))


@click.command("gc", cls=Command)
@cache_argument
@json_option
def gc(cache: Path, as_json: bool) -> None:
    """Remove what no reader needs: CACHE/quarantine, and what killed writers left in CACHE/tmp.

    \b
    kdpipe cache gc CACHE
    """
    Cache.open(cache)
    show({"bytes_freed": collect_garbage(cache)}, as_json=as_json)


@click.command("compare", cls=Command)
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
    for path, sidecar in ((cache, first.plan.head.sidecar), (other, second.plan.head.sidecar)):
        if sidecar is not None:
            raise ConfigError(f"it has {sidecar.has}: these have no distance", where=path)
    bound = tolerance
    if bound is None:
        _require_exact(first, second)
        bound = max(TOLERANCE[each.plan.settings.dtype] for each in (first, second))
    with watch("cache compare", EventLog(None)) as progress:
        progress.begin("compare", total=first.plan.num_rows, unit="rows")
        found = compare(first, second, progress.advance)
        progress.end()
    result = dataclasses.asdict(found)
    show((result if as_json else in_words(result)) | {"tolerance": bound}, as_json=as_json)
    if not found.worst_distance <= bound:
        raise DriftError(
            f"row {found.worst_row} of sample {found.worst_sample} is {found.worst_distance:.1e} from that of {cache} "
            f"(allowed {bound:g}); were the teachers the same?",
            where=other,
        )


def _require_exact(*caches: Cache) -> None:
    """What engines and machines change is known of raw rows alone. Raises CacheError for coded ones."""
    for cache in caches:
        if Choice.read(codec := cache.plan.settings.codec, cache.path).is_fitted:
            raise CacheError(
                f"its rows are coded ('{codec}'), how far apart they may be is not known: compare raw caches, or give "
                "--tolerance. What the codec loses is in kdpipe cache info",
                where=cache.path,
            )
