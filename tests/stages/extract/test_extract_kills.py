"""Extraction killed anywhere: no torn file counts, and the next run ends with the very bytes of one never killed."""

import os
import random
import signal
import time
from pathlib import Path

import pytest
from tests.conftest import Apart
from tests.stages.extracting import (
    coded_spec,
    committed_are_whole,
    extract_small,
    files,
    require_exceptions,
    small_spec,
)

from kdpipe.manifests.cache import HEAD_FILE
from kdpipe.manifests.fitted import CODEC_FILE
from kdpipe.manifests.plan import PLAN_FILE
from kdpipe.manifests.shard import commit_path, shard_path
from kdpipe.stages.extract import ExtractSpec

FAILPOINTS = [
    "teacher:written",
    "plan:written",
    "plan:flushed",
    "plan:renamed",
    "plan:published",
    *(f"shard:{name}{nth}" for name in ("allocated", "digested", "flushed") for nth in ("", "#3")),
    *(f"shards:{name}{nth}" for name in ("linked", "unlinked", "published") for nth in ("", "#3")),
    *(
        f"commits:{name}{nth}"
        for name in ("written", "flushed", "linked", "unlinked", "published")
        for nth in ("", "#3")
    ),
]


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> ExtractSpec:
    return small_spec(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def whole(spec: ExtractSpec, apart: Apart, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a cache whose extraction was never interrupted."""
    cache = tmp_path_factory.mktemp("whole") / "cache"
    assert apart(extract_small, spec, cache) == 0
    made = files(cache)
    assert sum(name.startswith("commits/") for name in made) > 4
    return made


def assert_goes_on(spec: ExtractSpec, cache: Path, apart: Apart, whole: dict[str, bytes]) -> None:
    """What is committed is whole, and the next run finishes it and leaves nothing else."""
    before = files(cache) if cache.exists() else {}
    if (cache / PLAN_FILE).exists():
        committed_are_whole(cache)
    for name, data in before.items():
        if not name.startswith(("tmp/", "claims/")):
            assert whole[name] == data, f"{name} is torn"
    assert apart(extract_small, spec, cache) == 0
    assert files(cache) == whole
    assert [path.name for path in cache.parent.iterdir()] == [cache.name], "something is left beside the cache"


CODED = ["codec:taught", "codec:flushed", "shard:digested#3"]


@pytest.fixture(scope="module")
def coded(
    spec: ExtractSpec, apart: Apart, tmp_path_factory: pytest.TempPathFactory
) -> tuple[ExtractSpec, dict[str, bytes]]:
    """The same with a codec, which is fitted before the first shard; and the files that it makes."""
    changed = coded_spec(spec)
    cache = tmp_path_factory.mktemp("coded") / "cache"
    assert apart(extract_small, changed, cache) == 0
    require_exceptions(cache)
    return changed, files(cache)


@pytest.mark.parametrize(
    "place", [*CODED, *(pytest.param(each, marks=pytest.mark.slow) for each in FAILPOINTS if each not in CODED)]
)
def test_a_coded_cache_killed_at_every_failpoint(
    place: str, coded: tuple[ExtractSpec, dict[str, bytes]], apart: Apart, tmp_path: Path
) -> None:
    cache = tmp_path / "a" / "cache"
    assert apart(extract_small, coded[0], cache, place) == -signal.SIGKILL
    assert len([*tmp_path.rglob("rows")]) == (place == "codec:taught"), "the rows that it is fitted to lie elsewhere"
    assert_goes_on(coded[0], cache, apart, coded[1])


@pytest.mark.parametrize("place", ["codec:taught", *(f"teacher:{name}" for name in ("written", "linked", "published"))])
def test_killed_while_a_lost_codec_is_fitted_again(
    place: str, coded: tuple[ExtractSpec, dict[str, bytes]], apart: Apart, tmp_path: Path
) -> None:
    cache = tmp_path / "a" / "cache"
    assert apart(extract_small, coded[0], cache) == 0
    (cache / "teacher" / CODEC_FILE).unlink()
    assert apart(extract_small, coded[0], cache, place) == -signal.SIGKILL
    assert apart(extract_small, coded[0], cache) == 0
    assert files(cache) == coded[1]


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_a_coded_cache_killed_at_random_moments(
    coded: tuple[ExtractSpec, dict[str, bytes]], apart: Apart, tmp_path: Path
) -> None:
    killed_at_random(200, coded[0], apart, coded[1], tmp_path)


@pytest.mark.parametrize("place", FAILPOINTS)
def test_killed_at_every_failpoint(
    place: str, spec: ExtractSpec, apart: Apart, whole: dict[str, bytes], tmp_path: Path
) -> None:
    cache = tmp_path / "a" / "cache"
    assert apart(extract_small, spec, cache, place) == -signal.SIGKILL
    assert_goes_on(spec, cache, apart, whole)


@pytest.mark.parametrize("place", [f"teacher:{name}" for name in ("written", "linked", "unlinked", "published#2")])
def test_killed_while_what_is_lost_of_the_teachers_is_made_again(
    place: str, spec: ExtractSpec, apart: Apart, whole: dict[str, bytes], tmp_path: Path
) -> None:
    cache = tmp_path / "a" / "cache"
    assert apart(extract_small, spec, cache) == 0
    for name in ("tokenizer.json", HEAD_FILE):
        (cache / "teacher" / name).unlink()
    assert apart(extract_small, spec, cache, place) == -signal.SIGKILL
    assert_goes_on(spec, cache, apart, whole)


@pytest.mark.parametrize(
    "count",
    [
        pytest.param(12, marks=pytest.mark.timeout(600)),
        pytest.param(500, marks=[pytest.mark.slow, pytest.mark.timeout(7200)]),
    ],
)
def test_killed_at_random_moments(
    count: int, spec: ExtractSpec, apart: Apart, whole: dict[str, bytes], tmp_path: Path
) -> None:
    killed_at_random(count, spec, apart, whole, tmp_path)


def killed_at_random(count: int, spec: ExtractSpec, apart: Apart, whole: dict[str, bytes], tmp_path: Path) -> None:
    """Up to three kills a cache, anywhere in its making; a run that is quicker than its kill starts another cache."""
    started = time.monotonic()
    assert apart(extract_small, spec, tmp_path / "timed" / "cache") == 0
    seconds = time.monotonic() - started
    draw, killed, number = random.Random(count), 0, 0
    while killed < count:
        cache = tmp_path / str(number) / "cache"
        number += 1
        for _ in range(draw.randrange(1, 4)):
            if apart(extract_small, spec, cache, kill_after=draw.uniform(0.02, seconds)) == 0:
                break
            killed += 1
        assert_goes_on(spec, cache, apart, whole)


def test_a_kill_loses_one_shard_at_most(
    spec: ExtractSpec, apart: Apart, whole: dict[str, bytes], tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    for done in range(1, 5):
        assert apart(extract_small, spec, cache, "commits:published") == -signal.SIGKILL
        assert committed_are_whole(cache) == done


@pytest.mark.parametrize(
    ("how", "codec"), [*((how, "raw") for how in ("cut", "flipped", "empty", "a pipe")), ("flipped", "fisher")]
)
def test_a_shard_without_commit_that_is_not_whole_is_put_aside_and_made_again(
    how: str,
    codec: str,
    spec: ExtractSpec,
    apart: Apart,
    whole: dict[str, bytes],
    coded: tuple[ExtractSpec, dict[str, bytes]],
    tmp_path: Path,
) -> None:
    cache = tmp_path / "cache"
    if codec != "raw":
        spec, whole = coded
    assert apart(extract_small, spec, cache) == 0
    commit_path(cache, 1).unlink()
    shard = shard_path(cache, 1)
    data = bytearray(shard.read_bytes())
    shard.unlink()
    if how == "a pipe":
        os.mkfifo(shard)
    else:
        data[len(data) // 2] ^= 1
        shard.write_bytes({"cut": data[: len(data) // 2], "empty": b""}.get(how, data))
    assert apart(extract_small, spec, cache) == 0
    assert files(cache, but=lambda path: path.parent.name == "quarantine") == whole
    assert [path.name for path in (cache / "quarantine").iterdir()] == [shard.name]
