"""Plans, commit records and headers made of rubbish: refused in a moment, never believed."""

import os
import random
import shutil
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.caches import grow_plan, make_cache, make_samples, verified

from kdpipe.manifests.cache import HEAD_FILE, Cache
from kdpipe.manifests.durable import QUARANTINE
from kdpipe.manifests.errors import KdpipeError, LayoutError
from kdpipe.manifests.fitted import CODEC_FILE
from kdpipe.manifests.plan import FOLDERS, GROWN, PLAN_FILE
from kdpipe.manifests.shard import commit_path, shard_path

LONGEST_S = 1.0
MOST_BYTES = 64 << 20
WATCHED = 25
"""Every so many cases the memory is watched, which takes time."""

NUMBERS = [b"0", b"-1", b"1e999", b"NaN", b"18446744073709551616", b"9" * 4000, b"1.5", b'"3"', b"null", b"[]", b"{}"]
PIECES = [*NUMBERS, b"[" * 5000, b'{"a":' * 3000, b"\xff\xfe", b"\x00" * 64, b'"../../x"', b"\\ud800", b"," * 100]


def flip_bits(data: bytes, draw: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(draw.randrange(1, 9)):
        changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
    return bytes(changed)


def cut(data: bytes, draw: random.Random) -> bytes:
    first, after = sorted(draw.randrange(len(data) + 1) for _ in range(2))
    return data[:first] + data[after:]


def splice(data: bytes, draw: random.Random) -> bytes:
    at = draw.randrange(len(data))
    return data[:at] + draw.choice(PIECES) + data[at + draw.randrange(12) :]


def repeat(data: bytes, draw: random.Random) -> bytes:
    first, after = sorted(draw.randrange(len(data) + 1) for _ in range(2))
    return data[:after] + data[first:after] * draw.randrange(1, 40) + data[after:]


def renumber(data: bytes, draw: random.Random) -> bytes:
    """Another value in the place of one number."""
    places = [at for at in range(1, len(data)) if data[at : at + 1].isdigit() and not data[at - 1 : at].isdigit()]
    at = draw.choice(places)
    end = at
    while data[end : end + 1].isdigit():
        end += 1
    return data[:at] + draw.choice(NUMBERS) + data[end:]


def rubbish(data: bytes, draw: random.Random) -> bytes:
    return draw.randbytes(draw.choice([0, 1, 7, 8, 9, 100, 5000]))


CHANGES: list[Callable[[bytes, random.Random], bytes]] = [flip_bits, cut, splice, repeat, renumber, rubbish]


@pytest.mark.parametrize(
    "cases", [3_000, pytest.param(1_000_000, marks=[pytest.mark.slow, pytest.mark.timeout(36000)])]
)
def test_what_is_not_ours_is_refused_in_a_moment(cases: int, tmp_path: Path) -> None:
    make_cache(tmp_path / "c", samples=make_samples(9), has_bias=True)
    refuse_rubbish(cases, tmp_path / "c", HEAD_FILE)


@pytest.mark.parametrize("cases", [600, pytest.param(20_000, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])])
def test_of_a_coded_cache_too(cases: int, tmp_path: Path) -> None:
    """Where the size that a commit record gives says how many exceptions there are."""
    make_cache(tmp_path / "c", samples=make_samples(9), codec="fisher kl=0.01")
    refuse_rubbish(cases, tmp_path / "c", CODEC_FILE)


def refuse_rubbish(cases: int, folder: Path, of_teacher: str) -> None:
    victims = [folder / PLAN_FILE, commit_path(folder, 0), shard_path(folder, 0), folder / "teacher" / of_teacher]
    good, draw = {path: path.read_bytes() for path in victims}, random.Random(cases)
    for case in range(cases):
        victim, change = draw.choice(victims), draw.choice(CHANGES)
        header = good[victim][:4096]  # of the binary files: where the structure is
        changed = change(header, draw) + good[victim][4096:]
        if changed == good[victim]:
            continue
        victim.write_bytes(changed)
        watched = case % WATCHED == 0
        if watched:
            tracemalloc.start()
        started = time.monotonic()
        with pytest.raises(KdpipeError):
            verified(folder, "quick" if victim.suffix == ".json" else "full")
        assert time.monotonic() - started < LONGEST_S, (victim.name, change.__name__, case)
        if watched:
            assert tracemalloc.get_traced_memory()[1] < MOST_BYTES, (victim.name, change.__name__, case)
            tracemalloc.stop()
        victim.write_bytes(good[victim])


@pytest.mark.parametrize("name", [PLAN_FILE, "commits/000000.json"])
def test_a_huge_record_is_refused_unread(name: str, tmp_path: Path) -> None:
    make_cache(tmp_path / "c")
    (tmp_path / "c" / name).unlink()
    with open(tmp_path / "c" / name, "wb") as file:
        file.truncate(10 << 30)
    tracemalloc.start()
    with pytest.raises(KdpipeError, match="bytes"):
        Cache.open(tmp_path / "c").shard(0)
    assert tracemalloc.get_traced_memory()[1] < MOST_BYTES
    tracemalloc.stop()


@pytest.mark.parametrize("name", [*FOLDERS, GROWN, QUARANTINE, f"{GROWN}/000001"])
def test_a_folder_that_is_a_link_is_refused_and_nothing_behind_it_is_touched(name: str, tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "c").path
    grow_plan(cache, make_samples(5, seed=2))
    (cache / QUARANTINE).mkdir()
    shutil.move(cache / name, tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "precious").write_text("a note")
    os.utime(tmp_path / "elsewhere" / "precious", (0, 0))
    (cache / name).symlink_to(tmp_path / "elsewhere")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(LayoutError, match="is a link") as caught:
        Cache.open(cache)
    assert caught.value.where == str(cache / name)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name", [PLAN_FILE, "commits/000000.json", "shards/000000.safetensors"])
@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_links_and_pipes_are_not_followed(kind: str, name: str, tmp_path: Path) -> None:
    make_cache(tmp_path / "c")
    path = tmp_path / "c" / name
    shutil.move(path, tmp_path / "elsewhere")
    if kind == "link":
        path.symlink_to(tmp_path / "elsewhere")
    else:
        os.mkfifo(path)
    with pytest.raises(KdpipeError, match="not a regular file"):
        Cache.open(tmp_path / "c").shard(0)
