"""A conversion killed or cut from power: its next run ends with the bytes of one that was never interrupted."""

import errno
import itertools
import multiprocessing
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
from tests.conftest import Apart
from tests.faults.powercut import FLUSHES_OF_A_COPY, LostError, Place, PowerCut, left_after_a_rename
from tests.stages.extracting import (
    coded_spec,
    committed_are_whole,
    convert_small,
    extract_small,
    files,
    require_exceptions,
    small_spec,
)

from kdpipe.manifests.cache import Cache
from kdpipe.manifests.durable import QUARANTINE
from kdpipe.manifests.errors import KdpipeError
from kdpipe.manifests.fitted import CODEC_FILE
from kdpipe.manifests.plan import PLAN_FILE
from kdpipe.manifests.shard import commit_path, shard_path

OFTEN = ["convert:planned", "shard:digested#2", "shards:linked#3", "commits:flushed"]
FAILPOINTS = [
    *(f"shard:{name}{nth}" for name in ("allocated", "digested", "flushed") for nth in ("", "#3")),
    *(f"shards:{name}{nth}" for name in ("linked", "unlinked", "published") for nth in ("", "#3")),
    *(
        f"commits:{name}{nth}"
        for name in ("written", "flushed", "linked", "unlinked", "published")
        for nth in ("", "#3")
    ),
]


@pytest.fixture(scope="module")
def raw(apart: Apart, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("raw")
    assert apart(extract_small, small_spec(folder), folder / "cache") == 0
    return folder / "cache"


@pytest.fixture(scope="module")
def whole(raw: Path, apart: Apart, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of the cache that extracting with the codec makes."""
    cache = tmp_path_factory.mktemp("whole") / "cache"
    assert apart(extract_small, coded_spec(small_spec(raw.parent)), cache) == 0
    require_exceptions(cache)
    return files(cache)


def assert_goes_on(raw: Path, cache: Path, apart: Apart, whole: dict[str, bytes]) -> None:
    """What is committed is whole, and the next run finishes it and leaves nothing else."""
    for name, data in (files(cache) if cache.exists() else {}).items():
        if not name.startswith("tmp/"):
            assert whole[name] == data, f"{name} is torn"
    if (cache / PLAN_FILE).exists():
        committed_are_whole(cache)
    assert apart(convert_small, raw, cache) == 0
    assert files(cache) == whole
    assert [path.name for path in cache.parent.iterdir()] == [cache.name], "something is left beside the cache"


@pytest.mark.parametrize(
    "place", [*OFTEN, *(pytest.param(each, marks=pytest.mark.slow) for each in FAILPOINTS if each not in OFTEN)]
)
def test_killed_at_every_failpoint(
    place: str, raw: Path, apart: Apart, whole: dict[str, bytes], tmp_path: Path
) -> None:
    cache = tmp_path / "a" / "cache"
    assert apart(convert_small, raw, cache, place) == -signal.SIGKILL
    assert_goes_on(raw, cache, apart, whole)


@pytest.mark.parametrize("count", [3, pytest.param(150, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])])
def test_killed_at_random_moments(count: int, raw: Path, apart: Apart, whole: dict[str, bytes], tmp_path: Path) -> None:
    started = time.monotonic()
    assert apart(convert_small, raw, tmp_path / "timed" / "cache") == 0
    seconds = time.monotonic() - started
    draw, killed = random.Random(count), 0
    for number in itertools.count():
        cache = tmp_path / str(number) / "a" / "cache"
        cache.parent.parent.mkdir()
        for _ in range(draw.randrange(1, 4)):
            if apart(convert_small, raw, cache, kill_after=draw.uniform(0.02, seconds)) == 0:
                break
            killed += 1
        if cache.parent.exists():
            assert_goes_on(raw, cache, apart, whole)
        if killed >= count:
            break


def test_two_at_once_make_one_cache(raw: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    both = [context.Process(target=convert_small, args=(raw, tmp_path / "a" / "cache")) for _ in range(2)]
    for each in both:
        each.start()
    for each in both:
        each.join(60)
        assert each.exitcode == 0
    assert files(tmp_path / "a" / "cache") == whole
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["cache"]


@pytest.mark.parametrize("how", ["cut", "flipped", "empty"])
def test_a_shard_without_commit_that_is_not_whole_is_put_aside_and_made_again(
    how: str, raw: Path, apart: Apart, whole: dict[str, bytes], tmp_path: Path
) -> None:
    """Defect: it was taken for another run's, and no command of ours got past it."""
    cache = tmp_path / "cache"
    assert apart(convert_small, raw, cache) == 0
    commit_path(cache, 1).unlink()
    shard = shard_path(cache, 1)
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes({"cut": data[: len(data) // 2], "empty": b""}.get(how, data))
    assert apart(convert_small, raw, cache) == 0
    assert files(cache, but=lambda path: path.parent.name == QUARANTINE) == whole
    assert [path.name for path in (cache / QUARANTINE).iterdir()] == [shard.name]


def test_a_copy_without_its_empty_folders_is_gone_on_with(
    raw: Path, apart: Apart, whole: dict[str, bytes], tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    assert apart(convert_small, raw, cache, "commits:published#2") == -signal.SIGKILL
    for folder in ("tmp", "claims", "runs"):
        shutil.rmtree(cache / folder)
    (cache / "teacher" / CODEC_FILE).unlink()
    assert apart(convert_small, raw, cache) == 0
    assert files(cache) == whole


def test_a_disk_that_fails_at_the_last_moment_is_one_line(
    raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Defect: where a scratch file could not be removed it was a traceback."""
    own = Path.unlink

    def unlink(path: Path, missing_ok: bool = False) -> None:
        if path.name.startswith("000002.safetensors"):
            raise OSError(errno.EIO, "made up", str(path))
        own(path, missing_ok=missing_ok)

    monkeypatch.setattr(Path, "unlink", unlink)
    with pytest.raises(KdpipeError, match=r"E-IO .*cache: input/output error"):
        convert_small(raw, tmp_path / "cache")


@pytest.mark.slow
def test_no_cut_loses_a_committed_shard_or_the_way_on(raw: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    (tmp_path / "live").mkdir()
    cuts: list[tuple[Path, int]] = []

    def cut(disk: PowerCut) -> None:
        committed = len([*(tmp_path / "live" / "new" / "cache" / "commits").glob("*.json")])
        cuts.append((tmp_path / f"cut{len(cuts)}", committed))
        disk.restore(cuts[-1][0])

    with PowerCut(tmp_path / "live", after_flush=cut):
        convert_small(raw, tmp_path / "live" / "new" / "cache")
    assert len(cuts) > 30
    for left, committed in cuts:
        cache = left / "new" / "cache"
        there = committed_are_whole(cache) if (cache / PLAN_FILE).exists() else 0
        assert there >= committed - 1, f"{left.name}: the last record's name may be what was flushed next"
        convert_small(raw, cache)
        assert files(cache) == whole, left.name
        shutil.rmtree(left)


@pytest.mark.parametrize("place", [None, *FLUSHES_OF_A_COPY], ids=str)
def test_every_flush_is_needed(place: Place | None, raw: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    (tmp_path / "live").mkdir()

    def convert_and_check() -> None:
        with PowerCut(tmp_path / "live", skip=[] if place is None else [place]) as disk:
            convert_small(raw, tmp_path / "live" / "new" / "cache")
            disk.restore(tmp_path / "left")
        assert set(disk.places) == set(FLUSHES_OF_A_COPY)
        if not (cache := tmp_path / "left" / "new" / "cache").exists():
            raise LostError("the cache")
        Cache.open(cache).check_teacher_files()
        if files(cache) != whole:
            raise LostError("some of its files")

    if place is None:
        convert_and_check()
    else:
        with pytest.raises((LostError, KdpipeError)):
            convert_and_check()


def test_what_a_killed_conversion_put_in_place_survives_a_cut_after_the_next(
    raw: Path, whole: dict[str, bytes], apart: Apart, tmp_path: Path
) -> None:
    """The kill came after the cache had its name and before that was on the disk."""
    cache = tmp_path / "live" / "cache"
    cache.parent.mkdir()
    assert apart(convert_small, raw, cache, "convert:planned") == -signal.SIGKILL
    assert files(left_after_a_rename(cache, tmp_path, lambda named: convert_small(raw, named))) == whole
