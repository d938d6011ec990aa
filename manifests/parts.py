"""Parts: which shards of a plan each of several writers has, and which of them are not there yet."""

from pathlib import Path

from kdpipe.manifests.plan import PLAN_FILE, Plan, read_plan
from kdpipe.manifests.shard import commit_path


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


def parts_left(cache: Path, count: int) -> list[int]:
    """Of `count` writers' parts those that lack a shard, from 1; all of them where nothing is planned yet."""
    if not (cache / PLAN_FILE).exists():
        return list(range(1, count + 1))
    plan = read_plan(cache)
    return [index for index in range(1, count + 1) if missing_shards(plan, cache, (index, count))]
