"""File: the records of answers as JSON Lines, appended a window at a time and flushed.

Invariant: at any moment the file is whole windows, and perhaps the beginning of one, which is cut off before anything
is added. So what a run adds depends on the number of windows alone, and a file that was interrupted ends with the bytes
of one that was not. One run writes at a time: it holds the file by an flock.
"""

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from kdpipe.manifests.durable import disk_error, fsync_folder
from kdpipe.manifests.errors import BusyError, DataError
from kdpipe.manifests.failpoints import failpoint


def whole_lines(path: Path) -> Iterator[bytes]:
    """The lines of a file that end with a newline; none where the file is missing."""
    with contextlib.suppress(FileNotFoundError), open(path, "rb") as file:
        yield from (line for line in file if line.endswith(b"\n"))


def count_lines(path: Path) -> int:
    """Lines of the file; -1 where its last one is torn."""
    count, is_torn = 0, False
    with contextlib.suppress(FileNotFoundError), open(path, "rb") as file:
        for line in file:
            count, is_torn = count + 1, not line.endswith(b"\n")
    return -1 if is_torn else count


class AnswersFile:
    """The file, held by this process for as long as the block lasts."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        except OSError as err:
            raise disk_error(err, path) from err
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._file)
            raise BusyError(
                "another run writes to it; wait for it, stop it, or choose another --out", where=path
            ) from None
        except OSError:  # a file system without locks
            pass

    def __enter__(self) -> "AnswersFile":
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._file)

    def keep(self, window: int, total: int, keys: Iterator[int]) -> int:
        """Cut off what is less than a window; how many records are left. keys: those of all records, in order.

        Raises DataError for a record that is another one than it should be.
        """
        lines = size = kept = 0
        for line in whole_lines(self.path):
            if _key(line) != next(keys, None):
                raise DataError(
                    "it is not the answer that belongs here: was the file edited? Choose another --out, or remove it",
                    where=f"{self.path}:{lines + 1}",
                )
            lines, size = lines + 1, size + len(line)
            if lines % window == 0 or lines == total:
                self._size, kept = size, lines
        if not kept:
            self._size = 0
        try:
            os.ftruncate(self._file, self._size)
            os.fsync(self._file)
            fsync_folder(self.path.absolute().parent)
        except OSError as err:
            raise disk_error(err, self.path) from err
        return kept

    def append(self, records: Sequence[dict[str, Any]]) -> None:
        """Add a window and flush it. Raises SpaceError; what was written of the window is cut off by the next run."""
        data = "".join(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n" for record in records).encode()
        try:
            failpoint("answers:begun")
            while data:
                written = os.pwrite(self._file, data, self._size)
                data, self._size = data[written:], self._size + written
            failpoint("answers:written")
            os.fsync(self._file)
            failpoint("answers:flushed")
        except OSError as err:
            raise disk_error(err, self.path) from err


def _key(line: bytes) -> int | None:
    with contextlib.suppress(ValueError, KeyError, TypeError):
        key = json.loads(line)["kdpipe"]["key"]
        return key if isinstance(key, int) else None
    return None
