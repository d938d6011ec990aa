"""How the bytes of a finished file are reached: mapped, or read anew each time where a mapping is no good.

A mapping costs nothing and is shared by every process of a node. On a network file system each fault of a page is a
round trip and a file that shrinks under its reader is a bus error; there `pread` reads whole ranges, and what is not
there is an error like any other.
Invariant: nothing but a regular file of exactly the expected size is opened, and no descriptor is kept.
"""

import ctypes
import errno
import mmap
import os
import weakref
from pathlib import Path
from typing import Protocol

import numpy as np

from kdpipe.manifests.durable import disk_error, open_regular
from kdpipe.manifests.errors import CorruptError, KdpipeError, LayoutError
from kdpipe.manifests.made_with import repair
from kdpipe.manifests.specs import Io


class FileBytes(Protocol):
    """The bytes of one file, by offset from its start."""

    def read(self, begin: int, end: int) -> np.ndarray:
        """uint8 [end - begin]. Raises CorruptError where the file ends before."""

    def prefetch(self, begin: int, end: int) -> None:
        """Ask the kernel to read them ahead."""


_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
MAP_FAILED = ctypes.c_void_p(-1).value


def most_mappings() -> int:
    """How many files a process may keep mapped: half of vm.max_map_count, as libraries, heaps and threads need some."""
    try:
        return int(Path("/proc/sys/vm/max_map_count").read_text()) // 2
    except (OSError, ValueError):
        return 65530 // 2  # the kernel's default


class MappedFile:
    """A file mapped for as long as the object or an array of it lives; reading copies nothing.

    mmap.mmap of Python keeps a descriptor with every mapping, and of those a process may have as few as 1024: hence
    the system call itself.
    """

    def __init__(self, path: Path, num_bytes: int) -> None:
        descriptor = _open(path, num_bytes)
        try:
            address = _libc.mmap(None, num_bytes, mmap.PROT_READ, mmap.MAP_PRIVATE, descriptor, 0)
        finally:
            os.close(descriptor)
        if address == MAP_FAILED:
            raise _not_mapped(ctypes.get_errno(), path)
        memory = (ctypes.c_uint8 * num_bytes).from_address(address)
        # Every array of the mapping holds `memory`; the last of them to go unmaps it, none at the end of the process.
        weakref.finalize(memory, _libc.munmap, address, num_bytes).atexit = False
        self._address, self._bytes = address, np.frombuffer(memoryview(memory).toreadonly(), np.uint8)

    def read(self, begin: int, end: int) -> np.ndarray:
        return self._bytes[begin:end]

    def prefetch(self, begin: int, end: int) -> None:
        begin = begin // mmap.PAGESIZE * mmap.PAGESIZE
        if end > begin:
            _libc.madvise(self._address + begin, end - begin, mmap.MADV_WILLNEED)


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
                    raise CorruptError(
                        f"it ends at byte {begin + at} while it is read", where=self._path, hint=_repair(self._path)
                    )
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


def _not_mapped(number: int, path: Path) -> KdpipeError:
    if number == errno.ENOMEM:
        return KdpipeError(
            "the kernel gives this process no more mappings or memory (vm.max_map_count, ulimit -v); read without "
            "mapping: --io pread",
            where=path,
        )
    return disk_error(OSError(number, os.strerror(number)), path)


def _open(path: Path, num_bytes: int) -> int:
    try:
        descriptor = open_regular(path)
    except FileNotFoundError:
        raise CorruptError("committed, but the file is gone", where=path, hint=_repair(path)) from None
    size = os.fstat(descriptor).st_size
    if size != num_bytes:
        os.close(descriptor)
        raise LayoutError(f"{size} bytes, the plan says {num_bytes}", where=path, hint=_repair(path))
    return descriptor


def _repair(path: Path) -> str:
    """A file lies in a folder of its cache."""
    return repair(path.parent.parent)
