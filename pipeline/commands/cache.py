"""kdpipe cache info|verify|repair|gc|compare: from the files alone, without torch; --recompute runs a teacher.

kdpipe cache pack|unpack: a whole cache as one file for cold storage, and back; without torch too.
kdpipe cache derive: a small cache of drawn tokens, likeliest tokens or the text's own; needs torch, no teacher.
kdpipe cache export|import: the likeliest tokens of its rows, in formats of other projects; needs torch, no teacher.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from kdpipe.manifests.cache import Cache
from kdpipe.manifests.compare import TOLERANCE, compare
from kdpipe.manifests.durable import QUARANTINE
from kdpipe.manifests.errors import CacheError, CheckFailed, ConfigError, DriftError, IncompleteError, KdpipeError
from kdpipe.manifests.fitted import Choice, choose
from kdpipe.manifests.made_with import extract_again
from kdpipe.manifests.made_with import repair as way_out
from kdpipe.manifests.pack import pack
from kdpipe.manifests.packed import is_packed
from kdpipe.manifests.sidecar import Kind, Sidecar
from kdpipe.manifests.specs import DeviceChoice, RunFile, flag_of
from kdpipe.manifests.unpack import check_packed, unpack
from kdpipe.manifests.verify import Finding, Level, collect_garbage, examine, repair
from kdpipe.pipeline.making import kept_in, log_in
from kdpipe.pipeline.options import PATH, Command, Finite, RunCommand, json_option, this_command, typed
from kdpipe.pipeline.output import results_only, show
from kdpipe.pipeline.progress import EventLog, watch
from kdpipe.pipeline.room import room_at

if TYPE_CHECKING:
    from kdpipe.stages.extract.recompute import Recomputed

BEYOND_REPAIR = ("plan", "samples")
"""Parts that say what all the others are: without them nothing can be made again in its place."""
Files = Literal["parquet", "dataset"]
cache_argument = click.argument("cache", type=PATH, metavar="CACHE")
device_option = click.option(
    "--device",
    type=click.Choice(["auto", "cpu", "cuda"]),
    default="auto",
    show_default=True,
    help="Where the logits are computed; auto takes a GPU where there is one.",
)


@click.group("cache", invoke_without_command=True)
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


command.command_class = Command


@command.command("info")
@cache_argument
@json_option
def info(cache: Path, as_json: bool) -> None:
    """Print what a cache holds, what made it, and whether it is complete.

    \b
    kdpipe cache info CACHE --json
    """
    show(Cache.open(cache).info(), as_json=as_json)


@command.command("verify", cls=RunCommand, within="cache")
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
    levels: dict[Level, bool] = {"quick": quick, "full": full, "deep": deep}
    asked = [level for level, is_asked in levels.items() if is_asked]
    if len(asked) > 1:
        raise ConfigError(f"how far to look is one choice, --{' or --'.join(asked)}", where=f"--{asked[0]}")
    level = asked[0] if asked else "full"
    if is_packed(cache):
        _verify_packed(cache, as_json=as_json)
        return
    opened = Cache.open(cache, io=run.cache.io)
    if recompute is not None and (sidecar := opened.plan.head.sidecar) is not None:
        raise ConfigError(f"it has {sidecar.has}: verify the cache that it was made of", where=cache)
    findings = _looked_at(opened, level)
    shards = [finding for finding in findings if isinstance(finding.part, int)]
    errors = [finding.error for finding in findings if finding.error is not None]
    errors.sort(key=lambda error: not isinstance(error, CheckFailed))
    damage = [error for error in errors if isinstance(error, CheckFailed)]
    result: dict[str, object] = {
        "ok": not errors,
        "level": level,
        "shards": len(shards),
        "shards_good": sum(finding.error is None for finding in shards),
        "shards_missing": sum(isinstance(finding.error, IncompleteError) for finding in shards),
        "determinism": opened.plan.engine.determinism,
    }
    if errors and as_json:
        result |= {"error": str(errors[0]), "problems": [str(error) for error in errors]}
    elif damage:
        result |= {"problems": [error.without_hint() for error in damage]}
    again = None
    if recompute is not None and teacher is not None and not errors:
        again = _recomputed(opened, teacher, run, recompute)
        recomputed = dataclasses.asdict(again)
        result |= {
            "ok": again.worst_distance <= again.bound,
            "recomputed": recomputed if as_json else in_words(recomputed),
        }
    show(result, as_json=as_json)
    if damage:
        raise _verdict(cache, damage, findings)
    if errors:  # something is missing: a file of the teacher's, or shards
        opened.head()
        opened.check_teacher_files()
        opened.require_complete()
    if again is not None and not again.worst_distance <= again.bound:
        raise DriftError(
            f"sample {again.worst_sample} is {again.worst_distance:.1e} from what the teacher gives now (allowed "
            f"{again.bound:g}); is the engine another, or were the rows wrong from the start?",
            where=cache,
        )


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
    """A comparison for a person: how many rows of how many are equal, and no place where nothing differs."""
    equal, total = round(found["rows_equal"] * found["num_rows"]), found["num_rows"]
    words: dict[str, object] = {"rows_equal": f"{equal:,} of {total:,} bit for bit"}
    return found | words


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


@command.command("repair")
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


@command.command("gc")
@cache_argument
@json_option
def gc(cache: Path, as_json: bool) -> None:
    """Remove what no reader needs: CACHE/quarantine, and what killed writers left in CACHE/tmp.

    \b
    kdpipe cache gc CACHE
    """
    Cache.open(cache)
    show({"bytes_freed": collect_garbage(cache)}, as_json=as_json)


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


@command.command("pack")
@cache_argument
@click.argument("out", type=PATH, metavar="FILE")
@json_option
def pack_cache(cache: Path, out: Path, as_json: bool) -> None:
    """Write a whole cache into one FILE for tape or object storage, about two thirds of the size; bit for bit.

    Every shard is checked first. Interrupted? The same command goes on. `kdpipe cache verify FILE` checks it as it
    lies; nothing trains from it before `kdpipe cache unpack`.

    \b
    kdpipe cache pack CACHE /archive/cache.kdpack
    """
    opened = Cache.open(cache)
    with watch("cache pack", EventLog(None), where=out, kept=lambda: "what is packed is kept") as progress:
        found = pack(opened, out, progress, most_bytes=room_at(out.parent).most_bytes)
    show(dataclasses.asdict(found), as_json=as_json)


@command.command("unpack")
@click.argument("packed", type=PATH, metavar="FILE")
@cache_argument
@json_option
def unpack_cache(packed: Path, cache: Path, as_json: bool) -> None:
    """Make a CACHE of what `kdpipe cache pack` has written, bit for bit, and check every byte of it.

    Interrupted? The same command goes on.

    \b
    kdpipe cache unpack /archive/cache.kdpack CACHE
    """
    with watch("cache unpack", EventLog(None), where=cache, kept=lambda: "whole files are kept") as progress:
        opened = unpack(packed, cache, progress, most_bytes=room_at(cache.parent).most_bytes)
    show(opened.info(), as_json=as_json)


@command.command("convert")
@cache_argument
@click.argument("out", type=PATH, metavar="OUT")
@click.option("--codec", required=True, metavar="int8|fisher", help="How rows are stored in OUT.")
@click.option(
    "--codec-kl",
    type=Finite(min=0, min_open=True, max=1),
    metavar="NATS",
    help="What fisher may lose: mean KL divergence of a stored row.  [default: 0.01]",
)
@click.option(
    "--codec-bytes",
    type=Finite(min=0, min_open=True, max=1, max_open=True),
    metavar="SHARE",
    help="What fisher may take, in place of --codec-kl: bytes of a row over those of a raw one.",
)
@json_option
def convert_cache(
    cache: Path, out: Path, codec: str, codec_kl: float | None, codec_bytes: float | None, as_json: bool
) -> None:
    """Code the rows of a raw CACHE into OUT, at a half to a fifth of the bytes; no teacher runs.

    CACHE is verified on the way and left as it is. Run again after an interruption it goes on. OUT is a cache like any
    other: it says what its codec loses (kdpipe cache info), and grows with kdpipe extract.

    \b
    kdpipe cache convert CACHE CACHE-fisher --codec fisher --codec-kl 0.01
    """
    choice, opened = choose(codec, codec_kl, codec_bytes), Cache.open(cache)
    from kdpipe.stages.extract.convert import convert  # torch takes seconds: not for --help

    words = this_command(source=cache, cache=out).model_dump()
    with (
        results_only(),
        watch("cache convert", log_in(out), where=out, kept=lambda: kept_in(out), made_with=words) as progress,
    ):
        found = convert(opened, out, choice, progress)
    show(dataclasses.asdict(found), as_json=as_json)


@command.command("export")
@cache_argument
@click.argument("out", type=PATH, metavar="OUT")
@click.option("--top-k", type=click.IntRange(min=1), default=64, show_default=True, help="Tokens kept of a row.")
@click.option(
    "--columns",
    type=click.Choice(["top-k", "distillkit", "axolotl"]),
    default="top-k",
    show_default=True,
    help="Whose columns: plain ones, DistillKit's, or those of axolotl's KD.",
)
@click.option(
    "--files",
    type=click.Choice(["parquet", "dataset"]),
    default="parquet",
    show_default=True,
    help="Parquet files, or a Hugging Face dataset for load_from_disk.",
)
@device_option
@json_option
def export(cache: Path, out: Path, top_k: int, columns: str, files: Files, device: DeviceChoice, as_json: bool) -> None:
    """Write the likeliest tokens of every row into OUT, as other projects read them; what is left out is said.

    A cache is exact, what is exported is not: the probability beyond the k tokens is gone. Held-out samples are the
    split "test".

    \b
    kdpipe cache export CACHE top64 --top-k 64
    kdpipe cache export CACHE offline --columns distillkit --files dataset
    """
    opened = Cache.open(cache)
    from kdpipe.stages.exchange import export_cache  # torch takes seconds: not for --help
    from kdpipe.stages.models.device import pick_device

    with results_only(), watch("cache export", EventLog(None)) as progress:
        found = export_cache(
            opened, out, columns=columns, files=files, top_k=top_k, device=pick_device(device), progress=progress
        )
    show(dataclasses.asdict(found), as_json=as_json)


@command.command("derive")
@cache_argument
@click.argument("out", type=PATH, metavar="OUT")
@click.option("--kind", type=click.Choice(["sampled", "logprob", "topk"]), required=True, help="What is kept of a row.")
@click.option("--samples", type=click.IntRange(1, 4096), help="sampled: tokens drawn of a row.  [default: 12]")
@click.option("--top-k", type=click.IntRange(1, 4096), help="topk: likeliest tokens kept of a row.  [default: 64]")
@click.option("--seed", type=click.IntRange(min=0), help="sampled: of the draws.  [default: 0]")
@device_option
@json_option
def derive_cache(
    cache: Path,
    out: Path,
    kind: Kind,
    samples: int | None,
    top_k: int | None,
    seed: int | None,
    device: DeviceChoice,
    as_json: bool,
) -> None:
    """Make a small cache OUT of a whole one: drawn tokens, likeliest tokens or the text's own, for who has less disk.

    Each says which losses it serves (`kdpipe cache info OUT`); train refuses the others. No teacher is needed, and no
    divergence from it can be measured on what was derived. Interrupted? The same command goes on.

    \b
    kdpipe cache derive CACHE OUT --kind sampled --samples 12
    kdpipe cache derive CACHE OUT --kind logprob
    """
    for flag, value, its in (
        ("--samples", samples, "sampled"),
        ("--top-k", top_k, "topk"),
        ("--seed", seed, "sampled"),
    ):
        if value is not None and kind != its:
            raise ConfigError(f"it is of use with --kind {its} alone", where=flag)
    opened = Cache.open(cache)
    from kdpipe.stages.exchange import Asked, derive  # torch takes seconds: not for --help
    from kdpipe.stages.models.device import pick_device

    entries = {"sampled": samples or 12, "topk": top_k or 64, "logprob": 1}[kind]
    asked = Asked(sidecar=Sidecar(kind=kind, entries=entries), seed=seed or 0)
    words = this_command(source=cache, cache=out).model_dump()
    log = watch("cache derive", log_in(out), where=out, kept=lambda: kept_in(out), made_with=words)
    with results_only(), log as progress:
        found = derive(opened, out, asked, pick_device(device), progress)
    show(dataclasses.asdict(found), as_json=as_json)


@command.command("import")
@cache_argument
@click.option(
    "--from",
    "sources",
    type=PATH,
    multiple=True,
    required=True,
    metavar="FILE...",
    help="Parquet files of top-k rows, or folders of them.",
)
@click.option(
    "--tokenizer", type=PATH, required=True, metavar="FOLDER", help="A model whose tokenizer made the token ids."
)
@click.option(
    "--heldout-fraction", type=Finite(0, 1), default=0.05, show_default=True, help="Share kept out of training."
)
@json_option
def import_cache(
    cache: Path, sources: tuple[Path, ...], tokenizer: Path, heldout_fraction: float, as_json: bool
) -> None:
    """Make a CACHE of top-k rows that another project has stored: what `export` writes, DistillKit's, axolotl's.

    Such a cache is biased: it has what the k tokens say and no more. A loss that needs more is refused, and no
    divergence from its teacher is measured.

    \b
    kdpipe cache import CACHE --from captured/*.parquet --tokenizer models/large
    """
    from kdpipe.stages.exchange import import_rows  # torch takes seconds: not for --help

    with results_only(), watch("cache import", EventLog(None)) as progress:
        found = import_rows(cache, sources, tokenizer, heldout_fraction=heldout_fraction, progress=progress)
    show(dataclasses.asdict(found), as_json=as_json)
