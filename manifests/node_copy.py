"""Node copies: a cache copied to a node's own disk, once for all jobs of the node that train from it.

    with node_copy(cache, FOLDER, max_bytes=...) as copy: ...       copy: a cache, or None where it has no room there

FOLDER/KEY is a whole copy, KEY a digest of the plan and of every commit record, so that a cache that grew or was made
anew is another one. FOLDER/KEY.lock is held shared by whoever trains from it, alone by whoever makes or removes it; the
kernel takes a lock back when its process ends. A copy that was interrupted, FOLDER/KEY.part, is gone on with.
Invariant: what appears under KEY was compared, byte by byte, with the digests that the cache itself records. A copy in
use is never removed; of the others those not used for the longest go first.
Cost: the cache is read once from where it is, and once from the copy; each later job reads the commit records alone.
"""

import contextlib
import fcntl
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from kdpipe.manifests.cache import Cache
from kdpipe.manifests.durable import NO_ROOM, disk_error, fsync_folder, fsync_tree
from kdpipe.manifests.errors import CorruptError, KdpipeError
from kdpipe.manifests.made_with import RUNS
from kdpipe.manifests.progress import Progress
from kdpipe.manifests.verify import examine

NOT_COPIED = {"claims", "quarantine", RUNS, "tmp"}
"""What of a cache's folder is no row and no plan."""
POLL_S = 0.5
CHUNK_BYTES = 16 << 20


@contextlib.contextmanager
def node_copy(source: Path, folder: Path, progress: Progress, *, max_bytes: int | None = None) -> Iterator[Path | None]:
    """A copy of a cache in a folder of this node, held for as long as the block lasts; None where it has no room.

    max_bytes: that the folder's copies may take together; its disk is the limit when not given
    Raises IncompleteError for a cache that lacks rows, CorruptError where the copy is not what the cache records,
    InputError for a folder that cannot be written.
    """
    cache = Cache.open(source)
    cache.require_complete()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        copy = folder / cache.digest()[:32]
        lock = os.open(folder / f"{copy.name}.lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    except OSError as err:
        raise disk_error(err, folder) from err
    try:
        yield copy if _made(cache, copy, lock, progress, max_bytes) else None
    finally:
        os.close(lock)


def _made(cache: Cache, copy: Path, lock: int, progress: Progress, max_bytes: int | None) -> bool:
    """Hold the copy shared, and make it first where it is not there; False where it has no room."""
    waits = False
    while True:
        if _take(lock, fcntl.LOCK_SH):
            if copy.exists():
                os.utime(lock)  # it was used just now
                return True
            fcntl.flock(lock, fcntl.LOCK_UN)  # two that keep their share and want all would wait for each other
            if _take(lock, fcntl.LOCK_EX):
                if not copy.exists() and not _make(cache, copy, progress, max_bytes):
                    return False
                continue
        if not waits:
            progress.note(f"waiting for another job of this node, which copies {cache.path} to {copy.parent}")
        waits = True
        time.sleep(POLL_S)


def _take(lock: int, kind: int) -> bool:
    try:
        fcntl.flock(lock, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _make(cache: Cache, copy: Path, progress: Progress, max_bytes: int | None) -> bool:
    files = [path for path in sorted(cache.path.rglob("*")) if path.is_file() and _is_copied(cache, path)]
    num_bytes = sum(path.stat().st_size for path in files)
    part = copy.with_name(f"{copy.name}.part")
    if not _make_room(copy, num_bytes, max_bytes):
        progress.note(f"no room in {copy.parent} for a copy of {num_bytes:,} bytes: {cache.path} is read where it is")
        return False
    progress.begin("copy", total=num_bytes, unit="bytes")
    try:
        for path in files:
            _copy(path, part / path.relative_to(cache.path), progress)
    except OSError as err:
        if err.errno not in NO_ROOM:
            raise disk_error(err, copy.parent) from err
        shutil.rmtree(part, ignore_errors=True)
        progress.note(f"{copy.parent} is full: {cache.path} is read where it is")
        return False
    progress.end()
    _verify(cache, part)
    fsync_tree(part)
    part.rename(copy)
    fsync_folder(copy.parent)
    progress.note(f"{cache.path} is read from its copy in {copy.parent}")
    return True


def _is_copied(cache: Cache, path: Path) -> bool:
    return path.relative_to(cache.path).parts[0] not in NOT_COPIED


def _copy(path: Path, to: Path, progress: Progress) -> None:
    """Copy a file, unless a copy that was interrupted has it by size: all are verified afterwards."""
    size = path.stat().st_size
    to.parent.mkdir(parents=True, exist_ok=True)
    if to.exists() and to.stat().st_size == size:
        progress.advance(size)
        return
    with open(path, "rb") as source, open(to, "wb") as file:
        while chunk := source.read(CHUNK_BYTES):
            file.write(chunk)
            progress.advance(len(chunk))


def _verify(cache: Cache, part: Path) -> None:
    """Every byte of the copy is what the cache records. Raises CorruptError; the damaged copy is removed."""
    if (problem := _problem(part)) is not None:
        shutil.rmtree(part, ignore_errors=True)
        raise CorruptError(
            f"the copy in {part.parent} is not what the cache records ({problem.without_hint()}); "
            f"kdpipe cache verify {cache.path} says whether the cache is damaged, or that disk",
            where=cache.path,
        )


def _problem(part: Path) -> KdpipeError | None:
    try:
        findings = examine(Cache.open(part), "full")
    except KdpipeError as err:
        return err
    return next((finding.error for finding in findings if finding.error is not None), None)


def _make_room(copy: Path, num_bytes: int, max_bytes: int | None) -> bool:
    """Remove copies that nobody uses, those not used for the longest first, until another has room; False: it has not.

    A copy that was interrupted counts as one, its own as the room it will take.
    """
    folder = copy.parent
    others = sorted(
        (path for path in folder.glob("*.lock") if path.stem != copy.name), key=lambda path: path.stat().st_mtime
    )
    own = _num_bytes(copy.with_name(f"{copy.name}.part"))

    def lacks_room() -> bool:
        taken = sum(_taken(lock) for lock in others)
        over = max_bytes is not None and taken + num_bytes > max_bytes
        return over or num_bytes - own > shutil.disk_usage(folder).free

    if max_bytes is not None and num_bytes > max_bytes:
        return False
    for lock in others:
        if not lacks_room():
            break
        _remove(lock)
    return not lacks_room()


def _taken(lock: Path) -> int:
    return _num_bytes(lock.with_suffix("")) + _num_bytes(lock.with_suffix(".part"))


def _num_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _remove(lock: Path) -> None:
    """Remove a copy, unless somebody holds it."""
    with open(lock) as file:
        if not _take(file.fileno(), fcntl.LOCK_EX):
            return
        for copy in (lock.with_suffix(""), lock.with_suffix(".part")):
            shutil.rmtree(copy, ignore_errors=True)
