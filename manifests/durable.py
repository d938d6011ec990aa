"""Files that are either whole or absent: written beside their place, flushed, linked in without replacing anything.

Invariant: a file under its final name is complete and on the disk, and is never replaced or changed afterwards.
Cost: one fsync for the file and one for its folder. A crash can only leave nameless work in a `tmp` folder.
"""

import contextlib
import errno
import fcntl
import itertools
import json
import os
import re
import shutil
import stat
import time
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path

from kdpipe.manifests.errors import BusyError, InputError, KdpipeError, LayoutError, SpaceError
from kdpipe.manifests.failpoints import failpoint

MOMENT_S = 2.0
QUARANTINE = "quarantine"
NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
NO_RIGHT = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR}


def canonical(value: object) -> bytes:
    """JSON with sorted keys, two-space indent and a final newline: the same value always gives the same bytes."""
    return (json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n").encode()


def open_regular(path: Path) -> int:
    """A descriptor to read a regular file by. Raises LayoutError for a link, pipe or device: none is followed."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as err:
        if err.errno == errno.ELOOP:
            raise LayoutError("not a regular file but a link", where=path) from None
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise LayoutError("not a regular file", where=path)
    return descriptor


def read_small(path: Path, limit: int) -> bytes:
    """The contents of a regular file of at most `limit` bytes. Raises LayoutError for any other."""
    with open(open_regular(path), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise LayoutError(f"{size:,} bytes, at most {limit:,} are expected", where=path)
        return file.read(limit)


def make_folder(folder: Path, group: int | None = None) -> None:
    """Make a folder and its parents durably, where they are missing; a group may read it where one is given.

    Raises InputError where the user is not of that group, OSError where it cannot be made.
    """
    made = [above for above in (folder.absolute(), *folder.absolute().parents) if not above.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    if made:
        share(folder, group)
    for above in made:
        fsync_folder(above.parent)


def share(folder: Path, group: int | None) -> None:
    """Let a group read a new folder and, through it, all that will be made in it; None leaves it as the umask made it.

    Raises InputError where the user is not of that group.
    """
    if group is not None:
        try:
            os.chown(folder, -1, group)
            os.chmod(folder, 0o2750)
        except PermissionError:
            raise InputError("you are not of that group", where="--group") from None


def usual_modes(folder: Path) -> None:
    """Give the files in a folder the mode the umask asks for: what was written as a temporary file first has 0600."""
    umask = os.umask(0o077)
    os.umask(umask)
    for path in folder.iterdir():
        if path.is_file():
            path.chmod(0o666 & ~umask)


def fsync_folder(folder: Path) -> None:
    """Make the names in a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_tree(folder: Path) -> None:
    """Put every file below a folder on the disk, and every name."""
    for path in (folder, *folder.rglob("*")):
        if path.is_dir():
            fsync_folder(path)
        else:
            with open(path, "rb") as file:
                os.fsync(file.fileno())


def file_system(descriptor: int) -> str:
    """The type of file system a file lies on, "ext4" for example; "" where the table of mounts does not tell."""
    device = os.fstat(descriptor).st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    with open("/proc/self/mountinfo") as file:
        mounts = [line.split() for line in file]
    return next((mount[mount.index("-") + 1] for mount in mounts if mount[2] == number), "")


def scratch_name(folder: Path, name: str) -> Path:
    """A name nobody else uses, in `folder`, for work that will be published as `name`."""
    return folder / f"{name}.{os.getpid()}-{uuid.uuid4().hex[:12]}"


def scratch_of(folder: Path, name: str) -> list[Path]:
    """What `scratch_name` named so, by whatever process."""
    ours = re.compile(re.escape(name) + r"\.\d+-[0-9a-f]{12}")
    return [path for path in folder.glob("*") if ours.fullmatch(path.name)]


def hold(descriptor: int) -> None:
    """Mark work in progress as this process's own, for `sweep`: an flock, which ends with the process in any case."""
    with contextlib.suppress(OSError):  # a file system without locks: then nothing is ever swept
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def hold_alone(descriptor: int, where: object) -> None:
    """As `hold`, for work that a later process goes on with. Raises BusyError where another one is at it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise BusyError("another process is writing it; wait for it", where=where) from None
    except OSError:  # a file system without locks
        return


@contextlib.contextmanager
def scratch_folder(folder: Path, name: str) -> Iterator[Path]:
    """A new folder for work that will be published as `name`, held, and gone when the block ends. Raises OSError."""
    scratch = scratch_name(folder, name)
    scratch.mkdir()
    held = os.open(scratch, os.O_RDONLY | os.O_DIRECTORY)
    hold(held)
    try:
        yield scratch
    finally:
        os.close(held)
        shutil.rmtree(scratch, ignore_errors=True)


def sweep(scratch: Iterable[Path]) -> None:
    """Remove work in progress, files or folders, that no living process holds: what kills left behind.

    What is younger than a moment is left: its maker may not have come to hold it yet.
    """
    for path in scratch:
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError:
            continue  # gone, a link, or not ours to touch
        try:
            if time.time() - os.fstat(descriptor).st_ctime < MOMENT_S:
                continue
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
        except OSError:
            continue  # held, gone by another's sweep, or on a file system without locks
        finally:
            os.close(descriptor)


def publish(scratch: Path, final: Path) -> bool:
    """Give a finished, flushed file its final name; False if that name is taken: then both files are left alone.

    Either way the name is on the disk afterwards. Failpoints: FOLDER:linked, FOLDER:unlinked, FOLDER:published.
    """
    try:
        os.link(scratch, final)
        fresh = True
    except FileExistsError:
        fresh = False
    failpoint(f"{final.parent.name}:linked")
    if fresh:
        scratch.unlink()
    failpoint(f"{final.parent.name}:unlinked")
    fsync_folder(final.parent)
    failpoint(f"{final.parent.name}:published")
    return fresh


def write_once(final: Path, data: bytes, *, scratch_folder: Path) -> bool:
    """Write a small file durably under a name that must not exist yet; False if it does, with the file left alone."""
    scratch = scratch_name(scratch_folder, final.name)
    try:
        with open(scratch, "xb") as file:
            hold(file.fileno())
            file.write(data)
            file.flush()
            failpoint(f"{final.parent.name}:written")
            os.fsync(file.fileno())
            failpoint(f"{final.parent.name}:flushed")
            fresh = publish(scratch, final)
        scratch.unlink(missing_ok=True)
        return fresh
    except OSError as err:
        scratch.unlink(missing_ok=True)
        raise disk_error(err, final) from err


def put_aside(folder: Path, *paths: Path) -> list[Path]:
    """Move files to folder/quarantine in this order, each under a name that is free there; where they are now."""
    aside = []
    try:
        (folder / QUARANTINE).mkdir(exist_ok=True)
        for path in paths:
            names = (folder / QUARANTINE / f"{path.name}{f'.{count}' if count else ''}" for count in itertools.count())
            name = next(name for name in names if not name.exists())
            with contextlib.suppress(FileNotFoundError):
                path.rename(name)
                aside.append(name)
            fsync_folder(path.parent)
        fsync_folder(folder / QUARANTINE)
        fsync_folder(folder)
    except OSError as err:
        raise disk_error(err, folder / QUARANTINE) from err
    return aside


@contextlib.contextmanager
def as_disk_error(where: Path) -> Iterator[None]:
    """A failed system call of the block is an error of ours."""
    try:
        yield
    except OSError as err:
        raise disk_error(err, where) from err


def disk_error(err: OSError, where: Path) -> KdpipeError:
    """The error to raise for a failed system call on a file of ours."""
    if err.errno in NO_ROOM:
        return SpaceError(
            f"{os.strerror(err.errno or 0).lower()}; free some room and run the same command again", where=where
        )
    if err.errno in NO_RIGHT:
        return InputError(f"{os.strerror(err.errno or 0).lower()}; choose another place", where=where)
    failed = KdpipeError(
        f"{os.strerror(err.errno or 0).lower()} ({errno.errorcode.get(err.errno or 0, err.errno)})", where=where
    )
    failed.code = "E-IO"
    return failed
