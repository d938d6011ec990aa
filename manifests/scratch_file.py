"""Scratch files: work in progress in a tmp folder, of its full size and mapped from the start.

Invariant: the file is allocated before it is mapped, because a store into a mapped file on a full disk kills the
process; while it exists under its scratch name its process holds it, so that `sweep` leaves it alone.
Cost: the pages are made when a place is handed out, in large ones, where the file system reads cheaply what was never
written: 64 MiB then take 25 ms to write instead of 50 to 150.
"""

import mmap
import os
from pathlib import Path

import numpy as np

from kdpipe.manifests.durable import disk_error, file_system, hold, scratch_name

CHEAP_HOLES = {"ext4", "xfs"}
"""File systems that read what was allocated and never written without asking a disk or a server."""


class ScratchFile:
    """A new file of `num_bytes` in `folder`, that is on its way to `final`, or needed on the way.

    Raises SpaceError where there is no room for it, and the other errors of disks, naming `final`.
    """

    def __init__(self, folder: Path, name: str, num_bytes: int, *, final: Path) -> None:
        self.path, self._final = scratch_name(folder, name), final
        try:
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
            hold(self._file)
        except OSError as err:
            raise disk_error(err, final) from err
        try:
            os.posix_fallocate(self._file, 0, max(num_bytes, 1))
            self.map = mmap.mmap(self._file, max(num_bytes, 1))
        except OSError as err:
            self.close()
            raise disk_error(err, final) from err
        self._has_cheap_holes = file_system(self._file) in CHEAP_HOLES
        self.bytes = np.frombuffer(self.map, np.uint8)[:num_bytes]

    def make_ready(self, begin: int, num_bytes: int) -> None:
        """Make the pages of a place that will be written."""
        if num_bytes and self._has_cheap_holes:  # a length of 0 would mean the rest of the file
            os.posix_fadvise(self._file, begin, num_bytes, os.POSIX_FADV_WILLNEED)

    def resize(self, num_bytes: int) -> None:
        """Make it longer; its content stays, `map` and `bytes` are others. Raises SpaceError, as when it was made."""
        try:
            os.posix_fallocate(self._file, 0, num_bytes)
            self.map = mmap.mmap(self._file, num_bytes)
        except OSError as err:
            raise disk_error(err, self._final) from err
        self.bytes = np.frombuffer(self.map, np.uint8)

    def flush(self) -> None:
        """Put its content on the disk. Raises OSError."""
        self.map.flush()
        os.fsync(self._file)

    def close(self) -> None:
        """Let it go, and remove it where it still has its scratch name."""
        self.path.unlink(missing_ok=True)
        os.close(self._file)
