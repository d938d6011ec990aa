"""Bytes and files that a disk still takes: by its own word, and by quota."""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from kdpipe.pipeline.room import Room, room_at

QUOTA = """Disk quotas for user ann (uid 1000):
     Filesystem  blocks   quota   limit   grace   files   quota   limit   grace
/dev/sdb1  1500*  1000  2000  1700000000  12  0  100  0
filer:/home  4096  0  0  0  5  40  0  0
Disk quotas for group lab (gid 100):
     Filesystem  blocks   quota   limit   grace   files   quota   limit   grace
/dev/sdb1  100  0  5000  0  90  0  95  0
"""


def test_free_room_is_that_of_the_disk_a_new_folder_would_lie_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Disks by their mount points, as two of them are not to be had everywhere."""
    disks = {tmp_path: (5, 3), tmp_path / "large": (70, 0)}
    (tmp_path / "large" / "deep").mkdir(parents=True)

    def statvfs(path: Path) -> SimpleNamespace:
        assert path.exists()
        free, files = disks[next(above for above in (path, *path.parents) if above in disks)]
        return SimpleNamespace(f_bavail=free, f_frsize=10, f_files=files, f_favail=files)

    monkeypatch.setattr(os, "statvfs", statvfs)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert room_at(tmp_path / "not" / "yet") == room_at(tmp_path) == Room(free_bytes=50, free_files=3)
    deep = room_at(tmp_path / "large" / "deep" / "not" / "yet")
    assert deep == Room(free_bytes=700, free_files=None), "a file system without a count of files has no end of them"
    monkeypatch.undo()
    assert room_at(tmp_path / "not" / "yet").free_bytes > 0
    monkeypatch.chdir(tmp_path / "large")
    assert room_at(Path("not") / "yet").free_bytes > 0


def test_the_tightest_quota_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = tmp_path / "answer"
    answer.write_text(QUOTA)
    (tmp_path / "quota").write_text(f'#!/bin/sh\necho "$*" > {tmp_path}/asked\n/bin/cat {answer}\nexit 1\n')
    (tmp_path / "quota").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    room = room_at(tmp_path / "cache")
    assert (room.quota_bytes, room.quota_files) == ((2000 - 1500) * 1024, 95 - 90), "the hard limits, over a soft one"
    assert (room.most_bytes, room.most_files) == (room.quota_bytes, 5)
    assert "--filesystem=/" in (tmp_path / "asked").read_text()
    answer.write_text("")
    assert room_at(tmp_path).quota_bytes is None


def test_what_is_free_counts_where_the_quota_is_wider() -> None:
    assert Room(free_bytes=7, free_files=None, quota_bytes=9).most_bytes == 7
    assert Room(free_bytes=7, free_files=None).most_files is None
    assert Room(free_bytes=7, free_files=8, quota_files=9).most_files == 8
