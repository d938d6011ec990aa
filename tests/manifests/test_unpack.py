"""Unpacking: a cache that is whole and checked, or none; a kill loses the file in flight."""

import fcntl
import os
import shutil
from pathlib import Path

import pytest
from tests.caches import make_cache
from tests.faults.powercut import Place, PowerCut
from tests.manifests.packing import PLENTY, killed_at, make_grown, tree

from kdpipe.manifests import packed as module
from kdpipe.manifests.cache import Cache
from kdpipe.manifests.errors import BusyError, ConfigError, CorruptError, SpaceError
from kdpipe.manifests.pack import pack
from kdpipe.manifests.progress import Silent
from kdpipe.manifests.shard import shard_path
from kdpipe.manifests.unpack import unpack


@pytest.fixture(params=["raw", "fisher kl=0.01"])
def cache(request: pytest.FixtureRequest, tmp_path: Path) -> Cache:
    return make_grown(tmp_path / "cache", request.param)


FLUSHES: list[Place] = [
    ("make_folder", "live"),
    ("fsync_tree", "folders"),
    ("unpack", "new"),
]
"""Of an unpacking into a folder that is new as well, less those that stand for each other: of the files' bytes."""


@pytest.fixture
def packed(cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(module, "BLOCK_BYTES", 2000)
    pack(cache, tmp_path / "out", Silent(), most_bytes=PLENTY)
    return tmp_path / "out"


def test_an_unpacking_that_was_killed_anywhere_goes_on(cache: Cache, packed: Path, tmp_path: Path) -> None:
    back = tmp_path / "back"
    written: dict[str, int] = {}
    for count in (2, 9, 25):
        assert killed_at(f"unpack:block#{count}", lambda: unpack(packed, back, Silent(), most_bytes=PLENTY))
        (scratch,) = tmp_path.glob(".back.unpack-*")
        there = {str(path): path.stat().st_ino for path in scratch.rglob("*.*") if path.is_file()}
        assert {name: inode for name, inode in there.items() if name in written} == written  # none is written again
        written = {name: inode for name, inode in there.items() if not name.endswith(".unpacking")}
    assert len(written) > 5
    unpack(packed, back, Silent(), most_bytes=PLENTY)
    assert tree(back) == tree(cache.path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "cache", "out"]


@pytest.mark.parametrize("skipped", [None, *FLUSHES], ids=str)
def test_a_cut_leaves_none_or_all_of_it(
    skipped: Place | None, cache: Cache, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After every flush, and at the end; without any one flush a cache that was unpacked is not all there then."""
    back, cuts = tmp_path / "live" / "new" / "back", []
    back.parent.parent.mkdir()

    def cut(disk: PowerCut) -> None:
        cuts.append(tmp_path / f"cut{len(cuts)}")
        disk.restore(cuts[-1])

    with PowerCut(tmp_path / "live", skip=[] if skipped is None else [skipped], after_flush=cut) as disk:
        unpack(packed, back, Silent(), most_bytes=PLENTY)
        disk.restore(tmp_path / "left")
    there = tmp_path / "left" / "new" / "back"
    assert (there.exists() and tree(there) == tree(cache.path)) == (skipped is None)
    assert len(cuts) > 8
    for left in cuts[::3] if skipped is None else ():
        if not (left / "new" / "back").exists():
            unpack(packed, left / "new" / "back", Silent(), most_bytes=PLENTY)
        assert tree(left / "new" / "back") == tree(cache.path)
        assert [path.name for path in (left / "new").iterdir()] == ["back"]
        shutil.rmtree(left)


def test_a_flipped_bit_is_named_and_no_cache_has_the_name(packed: Path, tmp_path: Path) -> None:
    with module.PackedFile(packed) as file:
        block = list(file.blocks())[-2]
    data = bytearray(packed.read_bytes())
    data[block.at + block.num_bytes // 2] ^= 1
    packed.write_bytes(data)
    with pytest.raises(
        CorruptError, match=r"out: bytes \d+-\d+ do not match .* of shards/\d+.safetensors; unpack anot"
    ):
        unpack(packed, tmp_path / "back", Silent(), most_bytes=PLENTY)
    assert not (tmp_path / "back").exists()


def test_what_was_written_wrong_is_found_and_removed(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that lies: every block is right, what lies in a file is not."""
    right = module.PackedFile.cut_of

    def lying(self: module.PackedFile, block: module.Block) -> tuple[module.Cut, bytes]:
        cut, data = right(self, block)
        wrong = self.files[cut.file][0] == "shards/000001.safetensors" and cut.begin > 4096
        return cut, bytes(len(data)) if wrong else data

    with monkeypatch.context() as patch:
        patch.setattr(module.PackedFile, "cut_of", lying)
        with pytest.raises(CorruptError, match=r"back: what was unpacked is not what the cache records.*000001"):
            unpack(packed, tmp_path / "back", Silent(), most_bytes=PLENTY)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "out"]
    unpack(packed, tmp_path / "back", Silent(), most_bytes=PLENTY)


def test_what_is_unpacked_already_is_looked_at_and_left_as_it_is(packed: Path, tmp_path: Path) -> None:
    """As after a kill between its name and the end of the command."""
    back = unpack(packed, tmp_path / "back", Silent(), most_bytes=PLENTY)
    assert unpack(packed, tmp_path / "back", Silent(), most_bytes=0).digest() == back.digest()
    shard = shard_path(back.path, 1)
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    with pytest.raises(CorruptError) as caught:
        unpack(packed, tmp_path / "back", Silent(), most_bytes=PLENTY)
    assert caught.value.where == str(shard)
    shard.unlink()
    with pytest.raises(ConfigError, match="it is there already; name another folder"):
        unpack(packed, tmp_path / "back", Silent(), most_bytes=PLENTY)


def test_a_place_that_is_taken_or_full_and_no_packed_file_are_refused(packed: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    other = make_cache(tmp_path / "other", num_samples=5)
    for taken in (tmp_path / "empty", tmp_path / "file", other.path):
        with pytest.raises(ConfigError, match="it is there already; name another folder"):
            unpack(packed, taken, Silent(), most_bytes=PLENTY)
    with pytest.raises(ConfigError, match="not a packed cache: no file that kdpipe cache pack has written"):
        unpack(tmp_path / "cache", tmp_path / "back", Silent(), most_bytes=PLENTY)
    with pytest.raises(ConfigError, match="lies in the cache"):
        unpack(packed, tmp_path / "cache" / "back", Silent(), most_bytes=PLENTY)
    with pytest.raises(SpaceError, match="5,000 are free"):
        unpack(packed, tmp_path / "back", Silent(), most_bytes=5000)
    assert not (tmp_path / "back").exists()


def test_two_at_once_are_one_too_many(packed: Path, tmp_path: Path) -> None:
    with module.PackedFile(packed) as file:
        scratch = tmp_path / f".back.unpack-{file.digest}"
    scratch.mkdir()
    held = os.open(scratch, os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    with pytest.raises(BusyError, match="another process is writing it"):
        unpack(packed, tmp_path / "back", Silent(), most_bytes=PLENTY)
    os.close(held)
