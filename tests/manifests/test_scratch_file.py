"""Scratch files: of their full size from the start, held while they are written, gone when they are let go."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from kdpipe.manifests import durable, scratch_file
from kdpipe.manifests.durable import sweep
from kdpipe.manifests.errors import InputError, SpaceError
from kdpipe.manifests.scratch_file import ScratchFile


@pytest.mark.parametrize("num_bytes", [0, 1, 12_345])
def test_all_of_it_is_there_from_the_start_and_goes_with_it(num_bytes: int, tmp_path: Path) -> None:
    descriptors = len(os.listdir("/proc/self/fd"))
    file = ScratchFile(tmp_path, "7.rows", num_bytes, final=tmp_path / "7")
    assert file.path.name.startswith("7.rows.")
    assert file.path.stat().st_size == max(num_bytes, 1)
    assert file.path.stat().st_blocks > 0, "allocated, not a hole"
    file.bytes[:] = np.arange(num_bytes) % 251
    file.make_ready(0, num_bytes)
    file.flush()
    assert file.path.read_bytes()[:num_bytes] == bytes(n % 251 for n in range(num_bytes))
    file.close()
    assert list(tmp_path.iterdir()) == []
    del file  # the mapping has a descriptor of its own
    assert len(os.listdir("/proc/self/fd")) == descriptors


def test_it_is_swept_once_nobody_holds_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(durable, "MOMENT_S", 0.0)
    file = ScratchFile(tmp_path, "a", 10, final=tmp_path / "final")
    sweep(tmp_path.iterdir())
    assert file.path.exists()
    os.link(file.path, tmp_path / "left")
    file.close()
    del file
    sweep(tmp_path.iterdir())
    assert list(tmp_path.iterdir()) == []


def test_without_room_nothing_is_left_and_the_file_it_was_for_is_named(tmpfs: Callable[[str], Path]) -> None:
    disk = tmpfs("256k")
    descriptors = len(os.listdir("/proc/self/fd"))
    with pytest.raises(SpaceError, match="no space left on device") as caught:
        ScratchFile(disk, "a", 1 << 20, final=disk / "shards" / "a")
    assert caught.value.where == str(disk / "shards" / "a")
    assert list(disk.iterdir()) == []
    assert len(os.listdir("/proc/self/fd")) == descriptors


def test_a_file_grows_with_what_is_in_it_and_is_not_torn_where_there_is_no_room(tmpfs: Callable[[str], Path]) -> None:
    disk = tmpfs("256k")
    file = ScratchFile(disk, "a", 5000, final=disk / "final")
    file.bytes[:] = 7
    file.resize(9000)
    assert (file.bytes[:5000] == 7).all()
    assert file.path.stat().st_size == len(file.bytes) == len(file.map) == 9000
    file.bytes[5000:] = 9
    with pytest.raises(SpaceError, match="no space left on device"):
        file.resize(1 << 20)
    assert file.path.read_bytes()[:9000] == bytes([7] * 5000 + [9] * 4000)
    file.close()


def test_a_folder_that_is_missing_is_an_error_of_ours(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError):
        ScratchFile(tmp_path / "file", "a", 10, final=tmp_path / "a")


@pytest.mark.parametrize(("holes", "asked"), [({"ext4", "xfs"}, [(5, 20, os.POSIX_FADV_WILLNEED)]), (set(), [])])
def test_pages_are_made_where_that_is_cheap(
    holes: set[str], asked: list[tuple[int, int, int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    monkeypatch.setattr(scratch_file, "CHEAP_HOLES", holes)
    monkeypatch.setattr(scratch_file, "file_system", lambda _: "ext4")
    monkeypatch.setattr(os, "posix_fadvise", lambda _, *arguments: seen.append(arguments))
    file = ScratchFile(tmp_path, "a", 100, final=tmp_path / "a")
    file.make_ready(5, 20)
    file.make_ready(5, 0)
    assert seen == asked
    file.close()
