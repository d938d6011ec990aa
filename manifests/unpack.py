"""Unpacking: the cache that a packed file holds, in a folder again; and whether a packed file is what was written.

    OUT -> .CACHE.unpack-DIGEST/ -> checked as `kdpipe cache verify` does -> CACHE

Invariant: CACHE appears when all of it is there and has the digests that the cache itself records. A kill loses the
file in flight; the same command goes on. Cost: the packed file is read once, the cache written once and read once.
"""

import os
import shutil
from collections import deque
from contextlib import ExitStack
from itertools import groupby
from pathlib import Path

from kdpipe.manifests.cache import Cache
from kdpipe.manifests.durable import as_disk_error, fsync_folder, fsync_tree, hold_alone, make_folder
from kdpipe.manifests.errors import CacheError, CheckFailed, ConfigError, CorruptError, IncompleteError, KdpipeError
from kdpipe.manifests.failpoints import failpoint
from kdpipe.manifests.pack import require_room
from kdpipe.manifests.packed import DAMAGED, PackedFile, in_order, is_packed
from kdpipe.manifests.places import require_outside
from kdpipe.manifests.plan import FOLDERS
from kdpipe.manifests.progress import Progress
from kdpipe.manifests.verify import examine


def unpack(packed: Path, out: Path, progress: Progress, *, most_bytes: int) -> Cache:
    """The cache that a packed file holds, in a folder that is not there, unless it is there already; open.

    most_bytes: that its disk takes
    Raises ConfigError, CorruptError where the file is damaged, SpaceError, BusyError.
    """
    require_outside(out, option="CACHE")
    with ExitStack() as stack:
        if os.path.lexists(out):
            return _there_already(packed, out, progress)
        file = stack.enter_context(open_packed(packed))
        stack.enter_context(as_disk_error(out))
        scratch = out.absolute().with_name(f".{out.name}.unpack-{file.digest}")
        left = sum(size for name, size in file.files if not _is_there(scratch, name, size))
        require_room(out, left, most_bytes)
        make_folder(scratch.parent)
        scratch.mkdir(exist_ok=True)
        held = os.open(scratch, os.O_RDONLY | os.O_DIRECTORY)
        stack.callback(os.close, held)
        hold_alone(held, out)
        for name in FOLDERS:
            (scratch / name).mkdir(exist_ok=True)
        progress.begin("cache unpack", total=sum(size for _, size in file.files), unit="bytes")
        _write_files(file, scratch, progress)
        progress.end()
        _require_good(scratch, out, progress)
        fsync_tree(scratch)
        os.rename(scratch, out.absolute())
        fsync_folder(out.absolute().parent)
    return Cache.open(out)


def _there_already(packed: Path, out: Path, progress: Progress) -> Cache:
    """The cache in OUT, looked at as one that was unpacked is. Raises ConfigError where it is another."""
    try:
        cache = Cache.open(out)
        cache.require_complete()
        with open_packed(packed) as file:
            same = cache.digest() == file.cache and all(_is_there(out, name, size) for name, size in file.files)
    except (CacheError, CheckFailed, IncompleteError):
        same = False
    if not same:
        raise ConfigError("it is there already; name another folder", where=out)
    progress.note(f"{out} is there already")
    _require_whole(cache, progress)
    return cache


def open_packed(path: Path) -> PackedFile:
    """A packed file, open. Raises ConfigError for another one, CorruptError for one that is not whole."""
    if not is_packed(path):
        raise ConfigError("not a packed cache: no file that kdpipe cache pack has written", where=path)
    return PackedFile(path)


def _write_files(packed: PackedFile, folder: Path, progress: Progress) -> None:
    """All files that are not there yet; each has its name when it is whole and on the disk."""
    for name, size in packed.files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if not size:
            (folder / name).touch()
    for number, blocks in groupby(packed.blocks(), lambda block: block.cut.file):
        name, size = packed.files[number]
        if _is_there(folder, name, size):
            deque(blocks, maxlen=0)
            progress.advance(size, "unpacked before")
            continue
        part = folder / f"{name}.unpacking"
        with open(part, "wb") as file:
            for cut, data in in_order(packed.cut_of, blocks):
                file.seek(cut.begin)
                file.write(data)
                failpoint("unpack:block")
                progress.advance(cut.size)
            file.flush()
            os.fsync(file.fileno())
        os.rename(part, folder / name)
    if lost := [name for name, size in packed.files if not _is_there(folder, name, size)]:
        raise CorruptError(f"its blocks do not make up {lost[0]}", where=packed.path, hint=DAMAGED)


def _is_there(folder: Path, name: str, size: int) -> bool:
    return (folder / name).is_file() and (folder / name).stat().st_size == size


def _require_good(scratch: Path, out: Path, progress: Progress) -> None:
    """What was written is what the cache records. Raises CorruptError; all of it is removed then."""
    try:
        cache = Cache.open(scratch)
        cache.require_complete()
        _require_whole(cache, progress)
    except (CheckFailed, IncompleteError) as err:
        shutil.rmtree(scratch, ignore_errors=True)
        raise CorruptError(
            f"what was unpacked is not what the cache records: {err.without_hint()}", where=out
        ) from None


def _require_whole(cache: Cache, progress: Progress) -> None:
    """Every byte is what the cache records. Raises the first error found."""
    progress.begin("verify", total=len(cache.plan.shards), unit="shards")
    for finding in examine(cache, "full"):
        if finding.error is not None:
            raise finding.error
        progress.advance(int(isinstance(finding.part, int)))
    progress.end()


def check_packed(path: Path, progress: Progress) -> list[KdpipeError]:
    """Everything that is damaged in a packed file. Raises as `open_packed`."""
    problems: list[KdpipeError] = []
    with open_packed(path) as packed:
        progress.begin("verify", total=packed.num_bytes, unit="bytes")
        try:
            for block in packed.blocks():
                try:
                    packed.read(block)
                except CorruptError as err:
                    problems.append(err)
                progress.advance(block.num_bytes)
        except CorruptError as err:
            problems.append(err)
        progress.end()
    return problems
