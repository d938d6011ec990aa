"""kdpipe extract: one teacher pass into a cache."""

import os
import time
from pathlib import Path

import click

from kdpipe.manifests.cache import Cache
from kdpipe.manifests.plan import PLAN_FILE
from kdpipe.manifests.specs import Codec, DeviceChoice, DtypeChoice, RowsChoice
from kdpipe.pipeline.options import (
    PATH,
    Command,
    OneOf,
    Part,
    data_options,
    device_option,
    engine_options,
    group_option,
    json_option,
    kept_group,
    run_options,
    run_spec,
    this_command,
    trust_option,
)
from kdpipe.pipeline.output import results_only, show
from kdpipe.pipeline.progress import EventLog, watch
from kdpipe.stages.teacher.engine import EngineOptions


@click.command("extract", cls=Command)
@data_options
@click.option("--cache", type=PATH, required=True, metavar="FOLDER", help="The cache to make or to finish.")
@engine_options
@click.option("--codec", type=OneOf(["raw"]), default="raw", help="How rows are stored: raw is as they come.")
@device_option
@trust_option
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
@click.option("--seed", type=click.IntRange(min=0), default=0, help="Chooses the rows that are checked twice.")
@click.option(
    "--batch-tokens",
    type=click.IntRange(min=0),
    help="transformers: tokens of a teacher batch, padding included; 0 runs samples alone.  [default: 0 on cpu, 16384 "
    "on cuda]",
)
@group_option
@run_options
@json_option
def command(
    teacher: Path,
    data: tuple[Path, ...],
    max_length: int | None,
    overlong: str | None,
    supervise: str | None,
    heldout_fraction: float | None,
    bad_records: str | None,
    max_bad: float | None,
    strict: bool | None,
    rows: RowsChoice,
    dtype: DtypeChoice,
    cache: Path,
    engine: str,
    tp: int,
    dp: int,
    pp: int,
    ep: int,
    quantization: str | None,
    mem_fraction: float | None,
    deterministic: bool,
    engine_args: tuple[tuple[str, str], ...],
    engine_timeout: float,
    codec: Codec,
    device: DeviceChoice,
    trust: str | None,
    part: tuple[int, int] | None,
    grow: bool,
    check_inputs: bool,
    seed: int,
    batch_tokens: int | None,
    group: int | None,
    config: Path | None,
    sets: tuple[str, ...],
    as_json: bool,
) -> None:
    """Run the teacher once over the data and keep the input of its lm_head for every supervised token.

    Run it again after an interruption: finished shards are kept. With more data it grows: the teacher runs on the new
    samples only, and nothing that was there is written again. Events go to CACHE/runs/.

    \b
    kdpipe extract --teacher models/large --data chat.jsonl --cache /scratch/cache
    """
    run = run_spec(
        config,
        sets,
        max_length=max_length,
        overlong=overlong,
        supervise=supervise,
        heldout_fraction=heldout_fraction,
        bad_records=bad_records,
        max_bad=max_bad,
        strict=strict,
    )
    from kdpipe.stages.extract import ExtractSpec, extract  # torch takes seconds: not for --help or a misspelt option

    spec = ExtractSpec(
        teacher=teacher,
        data=data,
        data_spec=run.data,
        engine=engine,
        dtype=dtype,
        rows=rows,
        codec=codec,
        seed=seed,
        device=device,
        batch_tokens=batch_tokens,
        group=kept_group(group, cache),
        grow=grow,
        check_inputs=check_inputs,
        options=EngineOptions(
            tp=tp,
            dp=dp,
            pp=pp,
            ep=ep,
            quantization=quantization,
            mem_fraction=mem_fraction,
            deterministic=deterministic,
            timeout_s=engine_timeout,
            trust=trust,
            arguments=engine_args,
        ),
    )
    name = f"{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}-{os.getpid()}.jsonl"
    log = EventLog(cache / "runs" / name, after=cache / PLAN_FILE, once="plan")
    typed = this_command(teacher=teacher, data=data, cache=cache).model_dump()
    run_log = watch("extract", log, where=cache, kept=lambda: _kept(cache), part=part, made_with=typed)
    with results_only(), run_log as progress:
        made = extract(spec, cache, progress, part=part)
    show(made.info(), as_json=as_json)


def _kept(cache: Path) -> str:
    """What of an extraction that a signal ended is there."""
    if not (cache / PLAN_FILE).exists():
        return "nothing was written"
    opened = Cache.open(cache)
    return f"{len(opened.committed())} of {len(opened.plan.shards)} shards are finished and kept"
