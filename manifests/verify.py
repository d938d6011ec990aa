"""Verify and repair: every part of a cache against what was written, all damage reported, what is broken put aside.

    for finding in examine(cache, "full"): finding.part, finding.error

Levels, each holding the one before: quick (counts, sizes, headers, tables, the first rows of every shard), full
(every byte), deep (rows are finite, ids and masks agree with them). Repair moves what is broken to quarantine/, a
shard's commit record first, so that the next `kdpipe extract` makes it again and nothing else.
Invariant: a moment after any step of a repair, what has a commit record has a file.
"""

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import ValidationError

from kdpipe.manifests.cache import HEAD_FILE, Cache
from kdpipe.manifests.durable import QUARANTINE, disk_error, open_regular, put_aside, read_small, sweep
from kdpipe.manifests.errors import CheckFailed, CorruptError, IncompleteError, KdpipeError, LayoutError
from kdpipe.manifests.fitted import codec_of
from kdpipe.manifests.made_with import extract_again
from kdpipe.manifests.plan import PLAN_FILE, plan_folder
from kdpipe.manifests.sample import row_positions
from kdpipe.manifests.shard import (
    MAX_COMMIT_BYTES,
    Commit,
    Shard,
    blocks,
    check_without_codec,
    commit_path,
    shard_path,
)

Level = Literal["quick", "full", "deep"]
FINITE_ROWS = 1024
"""Rows looked at a time."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Finding:
    """One part of a cache that was looked at, error None where good.

    part: "plan", "samples", "head", "tokenizer" (all that lies beside the head) or a shard's number
    """

    part: str | int
    error: KdpipeError | None

    @property
    def damaged(self) -> bool:
        return isinstance(self.error, CheckFailed)


def examine(cache: Cache, level: Level = "full") -> Iterator[Finding]:
    """Look at samples.arrow, the head, the tokenizer and every shard; a finding for each, whatever the others are.

    The plan is named where it is what changed: then all that follows may be said to be damaged and is not. Without its
    codec, which is with the tokenizer, the bytes of a shard are looked at, and not what they say.
    """
    if (changed := _error(lambda: _check_plan(cache))) is not None:
        yield Finding(part="plan", error=changed)
    look = cache.samples.check_counts if level == "quick" else cache.samples.verify
    samples = Finding(part="samples", error=_error(look))
    yield samples
    yield Finding(part="head", error=_error(cache.head))
    yield Finding(part="tokenizer", error=_error(cache.check_teacher_files))
    for number in range(len(cache.plan.shards)):
        yield check(cache, number, level, against_samples=samples.error is None)


def check(cache: Cache, number: int, level: Level, *, against_samples: bool = True) -> Finding:
    """Look at one shard; against_samples: samples.arrow is good, so that a shard's tables can be compared with it."""
    return Finding(part=number, error=_error(lambda: _check_shard(cache, number, level, against_samples)))


def _error(look: Callable[[], object]) -> KdpipeError | None:
    try:
        look()
    except KdpipeError as err:
        return err
    return None


def _check_plan(cache: Cache) -> None:
    """Where the records and headers of a generation's shards all name one other plan, PLAN.json is what changed."""
    for numbers in cache.plan.brought():
        named = {name for number in numbers if (name := _plan_named(cache, number))}
        if len(named) == 1 and "unknown" not in named and named != {cache.plan.digest_in(numbers[0])}:
            raise CorruptError(
                f"its digest is {cache.plan.digest_in(numbers[0])[:12]}, every shard says {named.pop()[:12]}: it was "
                "changed after they were made; put it back from a copy, or extract into another folder",
                where=plan_folder(cache.path, cache.plan.generation) / PLAN_FILE,
            )


def _plan_named(cache: Cache, number: int) -> str:
    """Digest of the plan that a shard's commit record and header both name; "" where there is none, or "unknown"."""
    try:
        named = Commit.model_validate_json(read_small(commit_path(cache.path, number), MAX_COMMIT_BYTES)).plan
        with open(open_regular(shard_path(cache.path, number)), "rb") as file:
            return named if f'"plan":"{named}"'.encode() in file.read(MAX_COMMIT_BYTES) else "unknown"
    except FileNotFoundError:
        return ""
    except (OSError, ValidationError, LayoutError):
        return "unknown"


def _check_shard(cache: Cache, number: int, level: Level, against_samples: bool) -> None:
    if not commit_path(cache.path, number).exists():
        # linked, not committed: a writer is at work or was killed; extract settles it
        raise IncompleteError("not extracted yet", where=shard_path(cache.path, number), hint=extract_again(cache.path))
    if (codec := _error(lambda: codec_of(cache.path, cache.plan))) is not None:
        # The codec is what is damaged: what it stored is put aside for damage of its own alone.
        check_without_codec(cache.path, cache.plan, number, cache.io, whole=level != "quick")
        if level == "deep":
            raise IncompleteError(
                f"its numbers were not looked at, for want of the codec: {codec.fact}",
                where=shard_path(cache.path, number),
            )
        return
    shard = Shard(cache.path, cache.plan, number, cache.io)  # size, header, tables
    if level == "quick":
        begin, end = next(blocks(shard.layout))
        shard.check(begin, end)
        return
    shard.verify(cache.samples.shard(number) if against_samples else None)
    if level == "deep":
        _check_rows(shard, every=cache.plan.settings.rows == "all")


def _check_rows(shard: Shard, *, every: bool) -> None:
    """Every sample has the rows its mask asks for, and all are finite."""
    for index in range(len(shard.row_offsets) - 1):
        view = shard.sample(index)
        wanted = len(row_positions(view.supervised, every=every))
        if len(view.rows) != wanted:
            raise shard.corrupt(f"sample {index} of it has {len(view.rows)} rows, its mask {wanted}")
    for first in range(0, shard.num_rows, FINITE_ROWS):
        rows = shard.rows(first, min(first + FINITE_ROWS, shard.num_rows))
        bad = np.flatnonzero(~np.isfinite(rows.astype(np.float32)).all(1))
        if len(bad):
            raise shard.corrupt(f"row {first + int(bad[0])} is not finite")


def repair(cache: Cache, level: Level = "full") -> list[Finding]:
    """Put every damaged shard, head or tokenizer aside; what was found damaged. Raises what cannot be repaired.

    Nothing is deleted: quarantine/ keeps it until `collect_garbage`.
    """
    damaged = [finding for finding in examine(cache, level) if finding.damaged]
    for finding in damaged:
        if finding.part in ("plan", "samples") and finding.error is not None:
            raise finding.error
    for finding in damaged:
        if isinstance(finding.part, int):
            put_aside(cache.path, commit_path(cache.path, finding.part), shard_path(cache.path, finding.part))
        elif finding.part == "head":
            put_aside(cache.path, cache.teacher_folder / HEAD_FILE)
        else:
            while isinstance(error := _error(cache.check_teacher_files), CheckFailed):  # it tells one file at a time
                put_aside(cache.path, Path(str(error.where)))
    return damaged


def collect_garbage(folder: Path) -> int:
    """Remove quarantine/ and what killed writers left in tmp/; bytes freed. What a living writer holds is left."""

    def size(path: Path) -> int:
        if path.is_dir():
            return sum(size(each) for each in path.iterdir())
        return path.stat().st_size if path.exists() else 0

    scratch = list((folder / "tmp").glob("*"))
    before = {path: size(path) for path in (*scratch, folder / QUARANTINE)}
    sweep(scratch)
    try:
        if (folder / QUARANTINE).is_dir():
            shutil.rmtree(folder / QUARANTINE)
    except OSError as err:
        raise disk_error(err, folder / QUARANTINE) from err
    return sum(taken for path, taken in before.items() if not os.path.lexists(path))
