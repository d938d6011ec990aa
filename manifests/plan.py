"""The plan: what will be in a cache, decided before the teacher starts: PLAN.json, and the shards' bounds beside it.

A cache that grew has one for every time it did, in grown/; the newest plan tells all that is in the cache.
Invariant: a plan is written once and never changed; shard bounds are a pure function of the samples and the settings
in it. PLAN.json holds no time, host, pid or path. Cost: that of the shard table. Format: FORMAT.md section 1.
"""

import contextlib
import hashlib
import os
from functools import cached_property
from pathlib import Path
from shlex import quote
from typing import ClassVar, Final, Literal

from pydantic import ValidationError

from kdpipe.manifests.durable import QUARANTINE, read_small
from kdpipe.manifests.errors import CacheError, LayoutError
from kdpipe.manifests.made_with import last_extraction
from kdpipe.manifests.packed import is_packed
from kdpipe.manifests.prepared import Ancestor, Count, Prepared, SamplesFingerprint, SamplesSettings
from kdpipe.manifests.record import Record, first_problem
from kdpipe.manifests.shard_table import SHARDS_FILE, ShardTable, read_shards
from kdpipe.manifests.specs import Dtype, RowsChoice
from kdpipe.manifests.teacher import HeadRecord

FORMAT_VERSION: Final = 2

PLAN_FILE = "PLAN.json"
MAX_PLAN_BYTES = 32 << 20
"""Longest PLAN.json that is read: one of format version 1 listed its shards, and is recognised whatever its size."""
SAMPLES_FILE = "samples.arrow"
GROWN = "grown"
FOLDERS = ("shards", "commits", "claims", "tmp", "runs", "teacher")


class Fingerprint(SamplesFingerprint):
    """What a cache was made of, each part a digest or a short setting; equal fingerprints mean equal rows."""

    teacher: str
    """sha256 of the teacher's config and its weight files' names, sizes and xxh3-128, and of its own code if it ran."""


class EngineRecord(Record):
    """How the teacher was run."""

    name: str
    version: str
    determinism: Literal["bitwise", "tolerance"]
    device: str
    batch_tokens: Count
    """Tokens of a padded teacher batch; 0 runs every sample alone, or as the engine batches by itself."""
    arguments: dict[str, str]
    """What else was asked of the engine that decides what the rows are: quantization, arguments by its own names."""


class Settings(SamplesSettings):
    """The choices that decide which rows exist."""

    rows: RowsChoice
    codec: str
    """A name in kdpipe.manifests.codec.CODECS."""
    dtype: Dtype
    seed: int
    """Fixes which rows the gate probes."""


class Plan(Prepared):
    """PLAN.json, and the shards' bounds, which lie beside it."""

    FILE: ClassVar[str] = PLAN_FILE

    format_version: Literal[2] = FORMAT_VERSION
    fingerprint: Fingerprint
    settings: Settings
    engine: EngineRecord
    head: HeadRecord
    teacher_files: dict[str, str]
    """xxh3-128 of every file in teacher/, by its name there."""

    @cached_property
    def digest(self) -> str:
        """sha256 of PLAN.json; every shard and commit record that it brought carries it."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    def as_ancestor(self) -> Ancestor:
        """What a plan that follows this one says of it."""
        return Ancestor(
            plan=self.digest,
            samples_digest=self.samples_digest,
            shards_digest=self.shards_digest,
            num_shards=self.num_shards,
        )

    def digest_in(self, shard: int) -> str:
        """Digest of the plan that brought a shard."""
        return next((before.plan for before in self.grown_from if shard < before.num_shards), self.digest)


def plan_folder(cache: Path, generation: int) -> Path:
    """Where PLAN.json, samples.arrow and shards.arrow of a generation lie."""
    return cache / GROWN / f"{generation:06d}" if generation else cache


def check_folders(cache: Path) -> None:
    """No folder of a cache may be a link, nor a file: what is swept or removed behind a link is somebody else's.

    Raises LayoutError.
    """
    for folder in (*(cache / name for name in (*FOLDERS, GROWN, QUARANTINE)), *(cache / GROWN).glob("*")):
        if folder.is_symlink():
            raise LayoutError("it is a link; move the folder it leads to here, or mount that here", where=folder)
        if folder.exists() and not folder.is_dir():
            raise LayoutError("it is not a folder; put the cache's own back from a copy, or remove it", where=folder)


def newest_generation(cache: Path) -> int:
    """How often the cache grew. Raises PermissionError where that cannot be seen."""
    generation = 0
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        while os.lstat(plan_folder(cache, generation + 1)):
            generation += 1
    return generation


def read_plan(cache: Path, generation: int | None = None) -> Plan:
    """A plan of a cache folder, the newest unless a generation is given.

    Raises CacheError if there is none, LayoutError if it is not one we can read, CorruptError if its table of shards
    is not the one it was written with.
    """
    check_folders(cache)
    generation = newest_generation(cache) if generation is None else generation
    path = plan_folder(cache, generation) / PLAN_FILE
    try:
        data = read_small(path, MAX_PLAN_BYTES)
    except (FileNotFoundError, NotADirectoryError):
        if generation or os.path.lexists(cache / GROWN) or os.path.lexists(cache / SAMPLES_FILE):
            raise LayoutError("PLAN.json is missing; put it back from a copy", where=path.parent) from None
        raise CacheError(_no_cache(path.parent), where=path.parent) from None
    try:
        plan = Plan.model_validate_json(data)
    except ValidationError as err:
        raise _not_ours(err, path, cache) from None
    if plan.to_bytes() != data:
        raise LayoutError("PLAN.json was edited after it was written", where=path)
    if plan.generation != generation or sorted(plan.brought(), key=lambda each: each.start) != plan.brought():
        raise LayoutError(f"'grown_from': {plan.generation} earlier plans, expected {generation}", where=path)
    return plan.changed(shards=_read_table(cache, plan, path))


def _read_table(cache: Path, plan: Plan, where: Path) -> ShardTable:
    """The shards of all generations. where: the plan's file"""
    digests = [*(before.shards_digest for before in plan.grown_from), plan.shards_digest]
    tables = [
        read_shards(
            plan_folder(cache, generation) / SHARDS_FILE,
            digest=digest,
            num_shards=len(numbers),
            plan=where.relative_to(cache),
        )
        for generation, (numbers, digest) in enumerate(zip(plan.brought(), digests, strict=True))
    ]
    table = ShardTable.joined(tables)
    for name in ("num_samples", "num_tokens", "num_rows"):
        found, said = int(table.columns[name].sum()), getattr(plan, name)
        if found != said:
            raise LayoutError(f"'{name}' is {said:,}, its shards have {found:,} together", where=where)
    return table


def _not_ours(err: ValidationError, path: Path, cache: Path) -> LayoutError:
    """What is said of a PLAN.json that does not hold what it must: of which version it is, or which field is wrong."""
    wrong = [each["input"] for each in err.errors() if each["loc"] == ("format_version",)]
    if not wrong or not isinstance(wrong[0], int):
        return LayoutError(f"{first_problem(err)}; made by another version of kdpipe?", where=path)
    made = last_extraction(cache)
    again = "" if made is None else f": {made.command(cache=cache.with_name(f'{cache.name}-{FORMAT_VERSION}'))}"
    return LayoutError(
        f"a cache of format version {wrong[0]}, this kdpipe reads version {FORMAT_VERSION}; extract again into another "
        f"folder{again}",
        where=path,
    )


def _no_cache(folder: Path) -> str:
    """What is said of a folder that is no cache: what it is, where that shows."""
    if (folder / "config.json").exists():
        return "this is a model, not a cache: PLAN.json is missing; name a folder that kdpipe extract made"
    if is_packed(folder):
        target = folder.with_suffix("") if folder.suffix else folder.with_name(f"{folder.name}-unpacked")
        return f"this is a packed cache; unpack it first: kdpipe cache unpack {quote(str(folder))} {quote(str(target))}"
    if folder.is_file():
        return "this is a file, a cache is a folder; make one of data with kdpipe extract, or train on them with --data"
    if not folder.exists():
        return "no cache here: there is no such folder, so PLAN.json is missing; make one with: kdpipe extract"
    return "no cache here: PLAN.json is missing; make one with: kdpipe extract"
