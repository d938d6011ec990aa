"""kdpipe cache pack|unpack|convert|derive|export|import: caches made of others; packing needs no torch, none a teacher.

pack, unpack: a whole cache as one file for cold storage, and back.
convert: its rows coded, at a half to a fifth of the bytes.
derive: a small cache of drawn tokens, likeliest tokens or the text's own.
export, import: the likeliest tokens of its rows, in formats of other projects.
"""

import dataclasses
from pathlib import Path
from typing import Literal

import click

from kdpipe.manifests.cache import Cache
from kdpipe.manifests.errors import ConfigError
from kdpipe.manifests.fitted import choose
from kdpipe.manifests.pack import pack
from kdpipe.manifests.sidecar import Kind, Sidecar
from kdpipe.manifests.specs import DeviceChoice
from kdpipe.manifests.teacher import require_derivable
from kdpipe.manifests.unpack import unpack
from kdpipe.pipeline.making import kept_in, log_in
from kdpipe.pipeline.options import PATH, Command, Finite, cache_argument, json_option, this_command
from kdpipe.pipeline.output import results_only, show
from kdpipe.pipeline.progress import EventLog, watch
from kdpipe.pipeline.room import room_at

Files = Literal["parquet", "dataset"]
device_option = click.option(
    "--device",
    type=click.Choice(["auto", "cpu", "cuda"]),
    default="auto",
    show_default=True,
    help="Where the logits are computed; auto takes a GPU where there is one.",
)


@click.command("pack", cls=Command)
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


@click.command("unpack", cls=Command)
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


@click.command("convert", cls=Command)
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

    CACHE is verified on the way and left as it is. Run again after an interruption, or when CACHE has grown, it goes
    on. OUT is a cache like any other: it says what its codec loses (kdpipe cache info), and grows with kdpipe extract.

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


@click.command("export", cls=Command)
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


@click.command("derive", cls=Command)
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
    opened, entries = Cache.open(cache), {"sampled": samples or 12, "topk": top_k or 64, "logprob": 1}[kind]
    sidecar = Sidecar(kind=kind, entries=entries)
    require_derivable(opened.plan.head, sidecar, where=cache)
    from kdpipe.stages.exchange import Asked, derive  # torch takes seconds: not for --help, nor for what is refused
    from kdpipe.stages.models.device import pick_device

    asked = Asked(sidecar=sidecar, seed=seed or 0)
    words = this_command(source=cache, cache=out).model_dump()
    log = watch("cache derive", log_in(out), where=out, kept=lambda: kept_in(out), made_with=words)
    with results_only(), log as progress:
        found = derive(opened, out, asked, pick_device(device), progress)
    show(dataclasses.asdict(found), as_json=as_json)


@click.command("import", cls=Command)
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
