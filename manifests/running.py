"""Running: at most one run works in an output folder at a time; a second one is refused at once and told by whom.

    with alone_in(output) as keep: ...; keep() now and then

OUTPUT/.running is held by an flock, which the kernel (or the server of a network file system) takes back when its
process ends, however it ends: a file that a kill left is held by nobody. On a file system without locks the file's
existence stands for the lock: it counts for as long as its process is seen to live, on another host for as long as
`keep` touches it.
Invariant: nothing is waited for, and what a dead run left is in nobody's way for longer than SILENT_S.
"""

import contextlib
import errno
import fcntl
import json
import os
import platform
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

from kdpipe.manifests.durable import disk_error, read_small
from kdpipe.manifests.errors import BusyError, LayoutError

RUNNING_FILE = ".running"
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}
SILENT_S = 600.0
"""Longest silence of a run on another host, where there are no locks."""
KEEP_S = 30.0
MAX_RECORD_BYTES = 1 << 12
LED = "KDPIPE_LED"
"""In the environment of a run that another process of kdpipe leads and passes signals on to: a scheduler may have sent
them to both."""


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[Callable[[], None]]:
    """Hold an output folder for as long as the block lasts; call what it gives now and then: it costs a clock reading.

    Raises BusyError where another run is at work there, SpaceError or InputError where nothing can be written.
    """
    path, kept = folder / RUNNING_FILE, time.monotonic()
    try:
        file = _take(path)
        holder = {"host": platform.node(), "pid": os.getpid(), "since": time.time()}
        os.ftruncate(file, 0)
        os.pwrite(file, json.dumps(holder).encode(), 0)
    except OSError as err:
        raise disk_error(err, path) from err

    def keep() -> None:
        nonlocal kept
        if time.monotonic() - kept > KEEP_S:
            kept = time.monotonic()
            with contextlib.suppress(OSError):
                os.utime(path)

    try:
        yield keep
    finally:
        with contextlib.suppress(OSError):
            path.unlink()  # before the lock goes: whoever opened it meanwhile finds that the name is gone
        os.close(file)


def require_nobody_in(folder: Path) -> None:
    """Raises BusyError where a run is at work in a folder, which may not be there yet; writes nothing."""
    path = folder / RUNNING_FILE
    try:
        file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return  # none, or nothing of ours: who takes the folder looks again
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        raise _busy(path) from None
    except OSError:
        if _lives(path):
            raise _busy(path) from None
    finally:
        os.close(file)


def _take(path: Path) -> int:
    """A descriptor of the file, which holds it. Raises BusyError where another process has it."""
    while True:
        there = path.exists()
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(file)
            raise _busy(path) from None
        except OSError as err:
            if err.errno not in NO_LOCKS or (there and _lives(path)):
                os.close(file)
                raise _busy(path) if err.errno in NO_LOCKS else err from None
            return file
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.stat(path), os.fstat(file)):
                return file
        os.close(file)  # its holder ended, and removed it, between the two calls


def _holder(path: Path) -> dict[str, object]:
    """Who wrote the file: host, pid, since; empty where it does not say."""
    with contextlib.suppress(OSError, ValueError, LayoutError):
        record = json.loads(read_small(path, MAX_RECORD_BYTES))
        return record if isinstance(record, dict) else {}
    return {}


def _lives(path: Path) -> bool:
    """Whether the run that wrote the file is at work, as far as can be seen without a lock."""
    holder = _holder(path)
    if holder.get("host") == platform.node():
        return Path(f"/proc/{holder.get('pid')}").exists()
    with contextlib.suppress(OSError):
        return abs(time.time() - path.stat().st_mtime) < SILENT_S
    return False


def _busy(path: Path) -> BusyError:
    holder = _holder(path)
    who, since = "another run is at work here", holder.get("since")
    if holder:
        who += f": pid {holder.get('pid')} on {holder.get('host')}"
    if isinstance(since, int | float):
        who += f", since {datetime.fromtimestamp(since, UTC):%Y-%m-%d %H:%M:%S} UTC"
    return BusyError(f"{who}; wait for it, stop it, or choose another --output", where=path.parent)
