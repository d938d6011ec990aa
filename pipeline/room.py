"""Room: bytes and files that a disk still takes, by its own word and by the quota of whoever asks."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from kdpipe.manifests.places import nearest_folder

QUOTA = ("quota", "--user", "--group", "--no-wrap", "--raw-grace", "--verbose")
ASKED_S = 20.0
BLOCK = 1024
"""Bytes of a block as `quota` counts."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Room:
    """What is free where a folder is, or will be.

    free_files: files that can still be made there; None where the file system makes room for them as it goes
    quota_bytes, quota_files: left of the tightest quota that `quota` knows of there; None without one
    """

    free_bytes: int
    free_files: int | None
    quota_bytes: int | None = None
    quota_files: int | None = None

    @property
    def most_bytes(self) -> int:
        return self.free_bytes if self.quota_bytes is None else min(self.free_bytes, self.quota_bytes)

    @property
    def most_files(self) -> int | None:
        known = [count for count in (self.free_files, self.quota_files) if count is not None]
        return min(known) if known else None


def room_at(folder: Path) -> Room:
    """The file system's word counts root's reserve as taken; project quotas of XFS and Lustre are in it."""
    there = nearest_folder(folder)
    disk = os.statvfs(there)
    left = list(_left(_quota(there)))
    quota_bytes = [blocks * BLOCK for blocks, _ in left if blocks is not None]
    quota_files = [files for _, files in left if files is not None]
    return Room(
        free_bytes=disk.f_bavail * disk.f_frsize,
        free_files=disk.f_favail if disk.f_files else None,
        quota_bytes=min(quota_bytes, default=None),
        quota_files=min(quota_files, default=None),
    )


def _quota(there: Path) -> str:
    """What `quota` says of the file system of a folder; "" where it is not installed or knows of none."""
    if shutil.which(QUOTA[0]) is None:
        return ""
    command = [*QUOTA, f"--filesystem={_mount_of(there)}"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=ASKED_S, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""


def _mount_of(there: Path) -> Path:
    there = there.resolve()
    return next(above for above in (there, *there.parents) if above.is_mount() or above == above.parent)


def _left(text: str) -> Iterator[tuple[int | None, int | None]]:
    """Blocks and files left, of each line: disk, used, quota, limit, grace, used, quota, limit, grace.

    /dev/sda1 1500* 1000 2000 1700000000 12 0 100 0     an asterisk where the quota is exceeded, 0 for no limit
    """
    for line in text.splitlines():
        fields = [part.rstrip("*") for part in line.split()]
        if len(fields) == 9 and all(part.isdecimal() for part in fields[1:]):
            _, blocks, soft, hard, _, files, soft_files, hard_files, _ = (
                int(part) if at else 0 for at, part in enumerate(fields)
            )
            yield _rest(hard or soft, blocks), _rest(hard_files or soft_files, files)


def _rest(limit: int, used: int) -> int | None:
    return max(limit - used, 0) if limit else None
