"""A cache read with pread is the one that is mapped; a file that shrinks under its reader is named, not a crash."""

import gc
import os
import shutil
import signal
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.caches import make_cache, verified

from kdpipe.manifests.access import MappedFile, ReadFile
from kdpipe.manifests.cache import Cache
from kdpipe.manifests.errors import CheckFailed, CorruptError
from kdpipe.manifests.shard import BLOCK, shard_path
from kdpipe.manifests.specs import Io


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with shards of several blocks: 900 bytes a row."""
    path = tmp_path_factory.mktemp("cache") / "c"
    make_cache(path, num_samples=400, hidden_size=450, shard_tokens=5000)
    return path


@pytest.mark.parametrize("rows", ["supervised", "all"])
def test_pread_gives_what_the_mapping_gives(rows: str, tmp_path: Path) -> None:
    make_cache(tmp_path / "c", rows=rows, has_bias=True)  # type: ignore[arg-type]
    mapped, read = Cache.open(tmp_path / "c"), Cache.open(tmp_path / "c", io="pread")
    for _ in range(2):  # blocks are checked in the first round only
        for one, other in zip(mapped, read, strict=True):
            assert one.rows.tobytes() == other.rows.tobytes()
            assert one.rows.dtype == other.rows.dtype
            assert np.array_equal(one.token_ids, other.token_ids)
            assert np.array_equal(one.supervised, other.supervised)
    assert mapped.head().weight.tobytes() == read.head().weight.tobytes()
    assert np.array_equal(mapped.heldout(), read.heldout())
    verified(tmp_path / "c", "deep", io="pread")


def test_pread_keeps_nothing_open_and_nothing_mapped(folder: Path) -> None:
    cache = Cache.open(folder, io="pread")
    rows = [view.rows for view in cache]
    opened = [os.path.realpath(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd")]
    assert len(rows) == 400
    assert str(folder / "shards") not in Path("/proc/self/maps").read_text()
    assert not any(str(folder / "shards") in path for path in opened)


@pytest.mark.parametrize("io", ["mmap", "pread"])
def test_all_that_reading_a_sample_reads_was_asked_for(io: Io, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of rows that are read first whole blocks are verified: asked for rows alone, the rest would be waited for."""
    kind, asked, read = {"mmap": MappedFile, "pread": ReadFile}[io], [], []
    for name, kept in (("prefetch", asked), ("read", read)):
        real = getattr(kind, name)

        def noted(self: object, begin: int, end: int, real: Any = real, kept: Any = kept) -> Any:
            kept.append((begin, end))
            return real(self, begin, end)

        monkeypatch.setattr(kind, name, noted)
    cache = Cache.open(folder, io=io)
    for number in range(len(cache.plan.shards)):
        cache.shard(number)
    for size in (BLOCK, 1):  # blocks are checked in the first round only
        for index in np.random.default_rng(0).permutation(len(cache)).tolist():
            asked.clear(), read.clear()
            cache.prefetch(index)
            rows = cache.stored_rows(index)
            ((begin, end),) = asked
            assert all(begin <= first and after <= end for first, after in read if after > first)
            assert end - begin <= rows.nbytes + 2 * (size - 1)


def mapped_shards(folder: Path) -> int:
    """How many mappings of this process are of a shard in the folder."""
    return Path("/proc/self/maps").read_text().count(f"{folder}/shards/")


def test_a_bounded_number_of_shards_stays_mapped_and_a_view_keeps_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kdpipe.manifests.cache.most_mappings", lambda: 6, raising=False)
    cache = make_cache(tmp_path / "one", num_samples=60)
    assert len(cache.plan.shards) > 9
    written = [view.rows.tobytes() for view in cache]
    assert mapped_shards(cache.path) <= 6
    held = [cache[index].rows for index in range(60)]
    assert mapped_shards(cache.path) == len(cache.plan.shards)
    assert [rows.tobytes() for rows in held] == written
    del held
    gc.collect()
    other = make_cache(tmp_path / "other", num_samples=60, seed=1)
    for index in (*range(60), *range(60)):
        assert cache[index].rows.tobytes() == written[index]
        other[index]
    assert mapped_shards(tmp_path) == 0
    assert mapped_shards(cache.path) + mapped_shards(other.path) <= 6


def test_a_shard_that_was_let_go_is_not_checked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kdpipe.manifests.cache.most_mappings", lambda: 2, raising=False)
    cache = make_cache(tmp_path, num_samples=60)
    assert sum(len(view.rows) for view in cache)
    monkeypatch.setattr("crc32c.crc32c", lambda _: pytest.fail("a block was checked twice"))
    assert sum(len(view.rows) for view in cache)


def test_a_mapping_keeps_no_descriptor(folder: Path) -> None:
    """A process may have as few as 1024."""
    cache = Cache.open(folder)
    rows = [view.rows for view in cache]
    opened = [os.path.realpath(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd")]
    assert mapped_shards(folder) == len(cache.plan.shards) > 1
    assert not any(path.startswith(f"{folder}/shards") for path in opened)
    assert len(rows) == 400


def test_a_shard_that_cannot_be_mapped_is_one_line_with_the_way_out(folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", NO_ROOM, folder], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stdout.startswith(f"E-KDPIPE {shard_path(folder, 0)}: "), done.stderr
    assert "--io pread" in done.stdout


NO_ROOM = """
import resource, sys
from kdpipe.manifests.cache import Cache
from kdpipe.manifests.errors import KdpipeError
cache = Cache.open(sys.argv[1])
cache.num_tokens()
now = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (now + (1 << 20), now + (1 << 20)))
try:
    cache[0]
except KdpipeError as err:
    print(err)
"""


def refusal(cache: Cache, index: int) -> str:
    """What reading a sample is refused with, "" where it is read."""
    try:
        cache[index]
    except CorruptError as err:
        return str(err)
    return ""


@pytest.mark.parametrize("io", ["mmap", "pread"])
def test_every_block_is_checked_when_it_is_touched_first(io: str, folder: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(folder, tmp_path / "c")
    with open(shard_path(broken, 0), "r+b") as file:
        file.seek(4096 + BLOCK + 77)
        byte = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte[0] ^ 4]))
    cache = Cache.open(broken, io=io)  # type: ignore[arg-type]
    errors = {index: refusal(cache, index) for index in range(cache.plan.shards[0].num_samples)}
    bad = [index for index, said in errors.items() if said]
    assert all(f"bytes {4096 + BLOCK}-{4096 + 2 * BLOCK - 1}" in errors[index] for index in bad)
    begins = cache.shard(0).row_offsets.astype(np.int64) * 900
    spans = enumerate(pairwise(begins.tolist()))
    assert bad == [index for index, (begin, end) in spans if begin < end and end > BLOCK and begin < 2 * BLOCK]
    assert bad


@pytest.mark.parametrize("io", ["mmap", "pread"])
def test_both_blocks_of_a_sample_are_checked_where_they_are_read_together(io: Io, folder: Path, tmp_path: Path) -> None:
    """Nothing of the shard was read before: the sample's rows begin in its first block and end in its second."""
    begins = Cache.open(folder).shard(0).row_offsets * 900
    index = next(at for at, (begin, end) in enumerate(pairwise(begins.tolist())) if begin < BLOCK < end)
    for number, place in enumerate((BLOCK - 1, BLOCK)):
        broken = shutil.copytree(folder, tmp_path / str(number))
        data = bytearray(shard_path(broken, 0).read_bytes())
        data[4096 + place] ^= 4
        shard_path(broken, 0).write_bytes(data)
        said = f"bytes {4096 + place // BLOCK * BLOCK}-{4096 + (place // BLOCK + 1) * BLOCK - 1} do not match"
        assert said in refusal(Cache.open(broken, io=io), index)


def test_a_file_that_shrinks_is_an_error_when_it_is_read(folder: Path, tmp_path: Path) -> None:
    cache = Cache.open(shutil.copytree(folder, tmp_path / "c"), io="pread")
    first = cache[0]
    path = shard_path(cache.path, 0)
    with open(path, "r+b") as file:
        file.truncate(2 * BLOCK)
    assert len(first.rows)
    with pytest.raises(CheckFailed, match="bytes, the plan says") as caught:
        cache[cache.plan.shards[0].num_samples - 1]
    assert caught.value.where == str(path)
    file = ReadFile(path, 2 * BLOCK)
    with pytest.raises(CorruptError, match=f"ends at byte {2 * BLOCK}"):
        file.read(2 * BLOCK - 10, 2 * BLOCK + 10)


SHRINK = """
import os, pathlib, sys
from kdpipe.manifests.bus_errors import explain_bus_errors
from kdpipe.manifests.cache import Cache
cache, how = Cache.open(sys.argv[1]), sys.argv[2]
if how != "unexplained":
    explain_bus_errors(lambda err: print(err, file=sys.stderr))
last = cache.plan.shards[0].num_samples - 1
cache[0]
path = pathlib.Path(sys.argv[1], "shards", "000000.safetensors")
if how == "elsewhere":
    os.kill(os.getpid(), 7)
os.truncate(path, 8192)
if how == "removed":
    path.unlink()
cache[last].rows.sum()
"""


@pytest.mark.parametrize(
    ("how", "code", "said"),
    [
        ("cut", 1, "cut to 8192 bytes"),
        ("removed", 1, "removed by somebody else"),
        ("unexplained", -signal.SIGBUS, ""),
        ("elsewhere", -signal.SIGBUS, ""),
    ],
)
def test_a_mapped_file_that_shrinks_is_told_by_name(
    how: str, code: int, said: str, folder: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(folder, tmp_path / "c")
    done = subprocess.run(
        [sys.executable, "-c", SHRINK, copy, how], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == code, done.stderr
    assert said in done.stderr
    if said:
        assert len(done.stderr.splitlines()) == 1
        assert done.stderr.startswith(f"E-CORRUPT {shard_path(copy, 0)}: ")
