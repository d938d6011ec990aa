"""Parts: which shards of a plan each of several writers has, and which of them are not there yet."""

from pathlib import Path

from kdpipe.manifests.durable import NO_RIGHT, QUARANTINE, disk_error, fsync_folder, put_aside
from kdpipe.manifests.errors import CheckFailed
from kdpipe.manifests.plan import PLAN_FILE, Plan, plan_folder, read_plan
from kdpipe.manifests.progress import Progress
from kdpipe.manifests.shard import adopt, commit_path, shard_path


def shards_of(plan: Plan, part: tuple[int, int] | None) -> list[int]:
    """Numbers of the shards of a part (i, n), i from 1: a range of each generation; all of them without one."""
    index, count = part or (1, 1)
    return [
        number
        for brought in plan.brought()
        for number in brought[len(brought) * (index - 1) // count : len(brought) * index // count]
    ]


def missing_shards(plan: Plan, cache: Path, part: tuple[int, int] | None) -> list[int]:
    """Numbers of the shards without a commit record, those of one part where one is asked for."""
    return [number for number in shards_of(plan, part) if not commit_path(cache, number).exists()]


def shards_to_make(plan: Plan, cache: Path, part: tuple[int, int] | None, progress: Progress) -> list[int]:
    """Those of `missing_shards` that are not there at all.

    One that was only in want of its commit record, as a kill leaves it, gets that; one that is not what its header says
    is put aside. Before that the plan's own name is flushed: the kill may have come between the two.
    """
    if missing := missing_shards(plan, cache, part):
        _flush_name(plan, cache)
    return [number for number in missing if not _adopted(plan, cache, number, progress)]


def _flush_name(plan: Plan, cache: Path) -> None:
    """Make the name of the plan's folder survive a power cut, where one may look at the folder above it."""
    place = plan_folder(cache, plan.generation)
    if not (place / PLAN_FILE).exists():
        return  # it is new and on its way
    try:
        for above in (place.parent, cache) if plan.generation else (cache.absolute().parent,):
            fsync_folder(above)
    except OSError as err:
        if err.errno not in NO_RIGHT:
            raise disk_error(err, place) from err


def _adopted(plan: Plan, cache: Path, number: int, progress: Progress) -> bool:
    try:
        return adopt(cache, plan, number)
    except CheckFailed as err:
        put_aside(cache, shard_path(cache, number))
        progress.note(f"{err}; it is in {QUARANTINE}/ now and is made again")
        return False


def parts_left(cache: Path, count: int) -> list[int]:
    """Of `count` writers' parts those that lack a shard, from 1; all of them where nothing is planned yet."""
    if not (cache / PLAN_FILE).exists():
        return list(range(1, count + 1))
    plan = read_plan(cache)
    return [index for index in range(1, count + 1) if missing_shards(plan, cache, (index, count))]
