"""Converting: a raw cache once more, its rows coded; no teacher runs.

    source, verified shard by shard -> codec fitted to some of its rows -> the same samples in OUT, shard by shard

What it makes is the cache that extracting with the codec makes, where the teacher gives the same rows again. Run again
after an interruption, or when the source has grown, it goes on: plans, codec and finished shards are kept.
Invariant: OUT appears with its plans, samples, codec and teacher's files in it, or not at all; each shard's source is
verified, every byte, before it is coded. Cost: the source is read once, and some of its rows for the fit.
"""

import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from kdpipe.manifests.cache import Cache, lost_teacher_files, restore_teacher_files, teacher_files
from kdpipe.manifests.durable import (
    as_disk_error,
    fsync_tree,
    make_folder,
    scratch_folder,
    scratch_of,
    sweep,
)
from kdpipe.manifests.errors import CacheError, ConfigError, CorruptError
from kdpipe.manifests.failpoints import failpoint
from kdpipe.manifests.fitted import CODEC_FILE, Choice, fitted_bytes, open_fitted
from kdpipe.manifests.parts import shards_to_make
from kdpipe.manifests.places import nearest_folder, require_outside
from kdpipe.manifests.plan import FOLDERS, PLAN_FILE, SAMPLES_FILE, Plan, plan_folder, read_plan
from kdpipe.manifests.progress import Progress
from kdpipe.manifests.samples import Samples
from kdpipe.manifests.shard import ShardWriter
from kdpipe.manifests.shard_table import SHARDS_FILE
from kdpipe.manifests.tensorfile import DTYPES, TAGS
from kdpipe.stages.codec.fit import require_fittable, wanted_rows
from kdpipe.stages.extract.calibrate import chosen, fit_to
from kdpipe.stages.extract.planning import require_room
from kdpipe.stages.models.head import loaded_head
from kdpipe.stages.rows import not_finite

LESS = "a coarser codec: int8, or a larger --codec-kl"
"""What a converted cache takes less room with."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Converted:
    """What a conversion comes to: bytes of both caches, what its codec loses as measured, and its shards."""

    codec: str
    num_bytes: int
    source_bytes: int
    kl_mean: float
    kl_p99: float
    same_top: float
    shards: int


def convert(source: Cache, out: Path, choice: Choice, progress: Progress) -> Converted:
    """Code the rows of a complete raw cache into OUT, or go on with that.

    Raises ConfigError for a source or a codec that is not for this, CacheError where OUT is something else, SpaceError,
    and what reading the source raises.
    """
    _require_raw(source, choice)
    if not (out / PLAN_FILE).exists():
        if os.path.lexists(out):
            raise CacheError("it exists and is not a cache; choose another name or remove it", where=out)
        require_outside(out, option="OUT")
        _begin(source, out, choice, progress)
    with as_disk_error(out):
        cache = _grown(source, Cache.open(out), choice, progress)
        _fill(source, cache, choice, progress)
    record = open_fitted(out, cache.plan).record
    return Converted(
        codec=record.codec,
        num_bytes=cache.num_bytes(),
        source_bytes=source.num_bytes(),
        kl_mean=record.kl_mean,
        kl_p99=record.kl_p99,
        same_top=record.same_top,
        shards=len(cache.plan.shards),
    )


def _fill(source: Cache, cache: Cache, choice: Choice, progress: Progress) -> None:
    """Make what OUT has not, or has lost."""
    out, plan = cache.path, cache.plan
    for name in FOLDERS:
        (out / name).mkdir(exist_ok=True)  # a copy may lack what was empty
    _restore(source, cache, choice, progress)
    progress.event("plan", digest=plan.digest, num_shards=len(plan.shards))
    sweep((out / "tmp").glob("*"))
    todo = shards_to_make(plan, out, None, progress)
    require_room(plan, out, out, or_else=LESS)
    progress.begin("convert", total=sum(plan.shards[number].num_rows for number in todo), unit="rows")
    for number in todo:
        _code(source, cache, number)
        progress.advance(plan.shards[number].num_rows, f"shard {number + 1}/{len(plan.shards)}")
    progress.end()


def _require_raw(source: Cache, choice: Choice) -> None:
    if not choice.is_fitted:
        raise ConfigError(f"'{choice}' is not a codec that rows are converted to; give int8 or fisher", where="--codec")
    if (sidecar := source.plan.head.sidecar) is not None:
        raise ConfigError(f"it has {sidecar.has}, and no rows to code", where=source.path)
    if source.plan.settings.codec != "raw":
        raise ConfigError(
            f"its rows are coded already ('{source.plan.settings.codec}'), what that lost does not come back; convert "
            "the raw cache it was made of",
            where=source.path,
        )
    first = read_plan(source.path, 0)
    require_fittable(first.num_rows, first.head.hidden_size, DTYPES[TAGS[first.settings.dtype]])
    source.require_complete()
    source.samples.verify()


def _begin(source: Cache, out: Path, choice: Choice, progress: Progress) -> None:
    """Fit the codec, and put plans, tables and the teacher's files in place at once."""
    parent = out.absolute().parent
    near = nearest_folder(parent)
    first = read_plan(source.path, 0)
    newest = source.plan.changed(settings=source.plan.settings.model_copy(update={"codec": str(choice)}))
    require_room(newest, near, out, or_else=LESS)  # by what a codec usually takes, before the fit
    staged = f".{out.name}.plan"
    sweep(scratch_of(near, staged))
    with as_disk_error(out), scratch_folder(near, staged) as scratch:
        for name in FOLDERS:
            if name != "teacher":
                (scratch / name).mkdir(parents=True)
        shutil.copytree(source.teacher_folder, scratch / "teacher")
        (scratch / "teacher" / CODEC_FILE).write_bytes(_fitted(source, choice, progress))
        files = teacher_files(scratch / "teacher")
        files = {name: digest for name, digest in files.items() if name in {*first.teacher_files, CODEC_FILE}}
        for plan in _plans(source, str(choice), files[CODEC_FILE]):
            _write_plan(source, plan, plan_folder(scratch, plan.generation))
        require_room(plan, scratch, scratch, where=out, or_else=LESS)
        fsync_tree(scratch)
        make_folder(parent)
        _put_in_place(scratch, out)
        failpoint("convert:planned")


def _fitted(source: Cache, choice: Choice, progress: Progress) -> bytes:
    """codec.safetensors, fitted to rows of the source's first plan. Raises what reading them raises."""
    started, first = time.perf_counter(), read_plan(source.path, 0)
    source.check_teacher_files()
    head = loaded_head(source.head(), first.head, torch.device("cpu"))
    samples = chosen(Samples(source.path, first), wanted_rows(first.head.hidden_size))
    none = source.stored_rows(0)[:0]
    rows = np.concatenate([none, *(source.stored_rows(sample) for sample in samples)])
    settings = first.settings.model_copy(update={"codec": str(choice)})
    return fitted_bytes(fit_to(first.changed(settings=settings), rows, head, progress, started))


def _restore(source: Cache, cache: Cache, choice: Choice, progress: Progress) -> None:
    """Make what OUT has lost of its teacher again, the codec too. Raises CorruptError where it comes out otherwise."""
    if not (lost := lost_teacher_files(cache.plan, cache.path)):
        return
    source.check_teacher_files()
    with as_disk_error(cache.path), scratch_folder(cache.path / "tmp", "teacher") as scratch:
        for name in lost:
            (scratch / name).parent.mkdir(parents=True, exist_ok=True)
            if name == CODEC_FILE:
                (scratch / name).write_bytes(_fitted(source, choice, progress))
            else:
                shutil.copyfile(source.teacher_folder / name, scratch / name)
        restore_teacher_files(cache.plan, scratch, cache.path)


def _plans(source: Cache, codec: str, digest: str) -> Iterator[Plan]:
    """The plans of a cache, each time it grew, as they are with another codec. digest: of the codec's file"""
    before: list[Plan] = []
    for generation in range(source.plan.generation + 1):
        plan = read_plan(source.path, generation)
        plan = plan.changed(
            settings=plan.settings.model_copy(update={"codec": codec}),
            teacher_files=plan.teacher_files | {CODEC_FILE: digest},
            grown_from=tuple(each.as_ancestor() for each in before),
        )
        before.append(plan)
        yield plan


def _write_plan(source: Cache, plan: Plan, place: Path) -> None:
    """A plan, and the tables that it has in the source."""
    place.mkdir(parents=True, exist_ok=True)
    (place / PLAN_FILE).write_bytes(plan.to_bytes())
    for name in (SAMPLES_FILE, SHARDS_FILE):
        shutil.copyfile(plan_folder(source.path, plan.generation) / name, place / name)


def _put_in_place(scratch: Path, place: Path) -> None:
    """Give a folder with a plan its name, unless another process was quicker."""
    try:
        os.rename(scratch, place)
    except OSError:
        if not (place / PLAN_FILE).exists():
            raise


def _grown(source: Cache, cache: Cache, choice: Choice, progress: Progress) -> Cache:
    """OUT with all plans that its source has by now. Raises CacheError where it is not of this source and codec."""
    there = cache.plan.settings.codec
    if there != str(choice):
        raise CacheError(
            f"its codec is '{there}', this command asks for '{choice}'; choose another OUT", where=cache.path
        )
    plans = [*_plans(source, there, cache.plan.teacher_files.get(CODEC_FILE, ""))]
    if (known := cache.plan.generation + 1) > len(plans) or plans[known - 1].to_bytes() != cache.plan.to_bytes():
        raise CacheError(f"it is not made of {source.path}; choose another OUT", where=cache.path)
    for plan in plans[known:]:
        (cache.path / "tmp").mkdir(exist_ok=True)
        place = plan_folder(cache.path, plan.generation)
        with scratch_folder(cache.path / "tmp", "plan") as scratch:
            _write_plan(source, plan, scratch)
            fsync_tree(scratch)
            place.parent.mkdir(exist_ok=True)
            _put_in_place(scratch, place)
        failpoint("convert:grown")
    if plans[known:]:
        progress.note(f"{source.path} has grown since: what is new is added, under the codec that is there")
    return Cache.open(cache.path)


def _code(source: Cache, cache: Cache, number: int) -> None:
    """One shard, from its verified source."""
    shard, samples = source.shard(number), source.samples.shard(number)
    shard.verify(samples)
    with ShardWriter(cache.path, cache.plan, number, samples) as writer:
        writer.hidden[:] = shard.rows(0, shard.num_rows)
        if len(bad := not_finite(writer.hidden)):
            raise CorruptError(f"row {bad[0]} is not finite, which no codec stores", where=shard.path)
        writer.commit()
