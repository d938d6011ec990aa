"""A cache to pack, and what a kill or an interruption leaves of it."""

import multiprocessing
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

from tests.caches import fill_shard, grow_plan, make_cache, make_samples

from kdpipe.manifests import failpoints
from kdpipe.manifests.cache import Cache
from kdpipe.manifests.pack import NOT_PACKED
from kdpipe.manifests.plan import read_plan

PLENTY = 1 << 40


def make_grown(folder: Path, codec: str = "raw") -> Cache:
    """A cache that grew, with a log, a file of no bytes and what nobody needs."""
    make_cache(folder, num_samples=9, codec=codec)
    grow_plan(folder, make_samples(7, seed=5))
    for number in read_plan(folder).brought()[-1]:
        fill_shard(folder, number)
    (folder / "runs" / "20260101T000000Z-1.jsonl").write_text('{"kind": "run"}\n')
    (folder / "runs" / "empty.jsonl").touch()
    (folder / "claims" / "000000.json").write_text("{}")
    (folder / "tmp" / "000003.rows.1-abc").write_bytes(b"rubbish")
    (folder / "quarantine").mkdir()
    (folder / "quarantine" / "000001.safetensors").write_bytes(b"bad")
    return Cache.open(folder)


def tree(folder: Path) -> dict[str, bytes]:
    """Every file that is packed, by its name in the folder."""
    found = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return {name: data for name, data in found.items() if name.partition("/")[0] not in NOT_PACKED}


def killed_at(place: str, work: Callable[[], object]) -> bool:
    """Whether a process of its own that does this dies at a failpoint; it must not fail otherwise."""

    def run() -> None:
        failpoints.arm(place)
        work()

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    process.join(60)
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode != 0


def remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()
