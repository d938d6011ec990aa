"""How the bytes of a finished file are reached: mapped, or read anew each time where a mapping is no good.

A mapping costs nothing and is shared by every process of a node. On a network file system each fault of a page is a
round trip and a file that shrinks under its reader is a bus error; there `pread` reads whole ranges, and what is not
there is an error like any other.
Invariant: nothing but a regular file of exactly the expected size is opened.
"""

import mmap
import os
from pathlib import Path
from typing import Protocol

import numpy as np

from kdpipe.manifests.durable import disk_error, open_regular
from kdpipe.manifests.errors import CorruptError, LayoutError
from kdpipe.manifests.specs import Io


class FileBytes(Protocol):
    """The bytes of one file, by offset from its start."""

    def read(self, begin: int, end: int) -> np.ndarray:
        """uint8 [end - begin]. Raises CorruptError where the file ends before."""

    def prefetch(self, begin: int, end: int) -> None:
        """Ask the kernel to read them ahead."""


class MappedFile:
    """A file mapped for as long as the object or an array of it lives; reading copies nothing."""

    def __init__(self, path: Path, num_bytes: int) -> None:
        descriptor = _open(path, num_bytes)
        try:
            # A private mapping: nothing can write through it, and torch takes its arrays without complaint.
            self._map = mmap.mmap(descriptor, num_bytes, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ)
        finally:
            os.close(descriptor)
        self._bytes = np.frombuffer(self._map, np.uint8)

    def read(self, begin: int, end: int) -> np.ndarray:
        return self._bytes[begin:end]

    def prefetch(self, begin: int, end: int) -> None:
        begin = begin // mmap.PAGESIZE * mmap.PAGESIZE
        if end > begin:
            self._map.madvise(mmap.MADV_WILLNEED, begin, end - begin)


class ReadFile:
    """A file read with pread, opened anew each time: nothing is held open, and a changed size is seen."""

    def __init__(self, path: Path, num_bytes: int) -> None:
        os.close(_open(path, num_bytes))
        self._path, self._num_bytes = path, num_bytes

    def read(self, begin: int, end: int) -> np.ndarray:
        data, at = np.empty(end - begin, np.uint8), 0
        descriptor = _open(self._path, self._num_bytes)
        try:
            while at < len(data):
                came = os.preadv(descriptor, [data[at:].data], begin + at)
                if not came:
                    raise CorruptError(f"it ends at byte {begin + at} while it is read", where=self._path)
                at += came
        except OSError as err:
            raise disk_error(err, self._path) from err
        finally:
            os.close(descriptor)
        return data

    def prefetch(self, begin: int, end: int) -> None:
        descriptor = _open(self._path, self._num_bytes)
        try:
            if end > begin:
                os.posix_fadvise(descriptor, begin, end - begin, os.POSIX_FADV_WILLNEED)
        finally:
            os.close(descriptor)


def open_bytes(path: Path, num_bytes: int, io: Io) -> FileBytes:
    """The bytes of a file of this size. Raises CorruptError where it is gone, LayoutError for another size."""
    return MappedFile(path, num_bytes) if io == "mmap" else ReadFile(path, num_bytes)


def _open(path: Path, num_bytes: int) -> int:
    try:
        descriptor = open_regular(path)
    except FileNotFoundError:
        raise CorruptError("committed, but the file is gone; look with kdpipe cache verify", where=path) from None
    size = os.fstat(descriptor).st_size
    if size != num_bytes:
        os.close(descriptor)
        raise LayoutError(f"{size} bytes, the plan says {num_bytes}", where=path)
    return descriptor
