"""Packing: a whole cache as one file for cold storage, bit for bit.

    cache, each shard checked -> blocks (packed.py) -> .OUT.pack -> OUT

One file, not a folder: tapes and object stores take one large object, and quotas count one inode.
Invariant: OUT appears when it is whole. A kill loses the blocks in flight; the same command goes on, and what comes
out is the same whether it was interrupted or not. A shard is checked against the cache's own digests before its first
block is written.
Cost: each shard is read twice, the second time from the page cache; a block of memory a thread.
"""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from kdpipe.manifests.cache import Cache
from kdpipe.manifests.durable import as_disk_error, hold_alone, make_folder, open_regular, publish
from kdpipe.manifests.errors import ConfigError, CorruptError, SpaceError
from kdpipe.manifests.failpoints import failpoint
from kdpipe.manifests.packed import (
    BLOCK_BYTES,
    KEY,
    VERSION,
    Cut,
    PackedFile,
    block_note,
    compressed,
    cuts_of,
    end_note,
    in_order,
    is_packed,
    note,
)
from kdpipe.manifests.places import require_outside
from kdpipe.manifests.progress import Progress
from kdpipe.manifests.shard import shard_path
from kdpipe.manifests.verify import check, examine

NOT_PACKED = {"claims", "quarantine", "tmp"}
"""Folders of a cache that nobody needs when its writers are gone."""
MEASURED = 8
"""Of the largest files, whose blocks say what all will take."""
SLACK = 1.03
"""What the forecast may be short of."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Packed:
    """A cache that was packed: bytes of its files, and of the packed file."""

    num_files: int
    num_bytes: int
    packed_bytes: int
    ratio: float


def pack(cache: Cache, out: Path, progress: Progress, *, most_bytes: int) -> Packed:
    """Write a complete cache into a file that is not there, unless what is there is that already.

    most_bytes: that its disk takes
    Raises ConfigError, IncompleteError, CorruptError where the cache is damaged, SpaceError, BusyError.
    """
    cache.require_complete()
    require_outside(out, option="OUT")
    files = _files(cache)
    total = sum(size for _, size, _ in files)
    # By the digest what was begun before a shard was made again is not gone on with.
    head = note({KEY: VERSION, "cache": cache.digest(), "files": [[name, size] for name, size, _ in files]})
    if os.path.lexists(out):
        _require_same(out, head)
        progress.note(f"{out} is there already; kdpipe cache verify {out} looks at every byte of it")
        return _packed(len(files), total, os.path.getsize(out))
    for finding in examine(cache, "full"):
        if isinstance(finding.part, int):
            break  # shards are checked when their turn comes
        if finding.error is not None:
            raise finding.error
    with as_disk_error(out), _part(out) as file:
        begun = _begun(Path(file.name), head, files)
        ratio = _ratio(files)
        require_room(out, int(total * ratio * SLACK) + len(head), most_bytes + begun.num_bytes)
        progress.note(f"{total:,} bytes of {len(files)} files will take about {int(total * ratio):,} ({ratio:.2f}x)")
        progress.begin("cache pack", total=total, unit="bytes")
        file.truncate(begun.num_bytes)
        file.seek(begun.num_bytes)
        if not begun.num_bytes:
            file.write(head)
        elif begun.num_blocks:
            progress.advance(begun.plain_bytes, "begun before")
        num_blocks = begun.num_blocks
        for cut, data in _compressed(cache, files, skipped=begun.num_blocks):
            file.write(block_note(cut, data) + data)
            num_blocks += 1
            failpoint("pack:block")
            progress.advance(cut.size)
        file.write(end_note(num_blocks))
        file.flush()
        os.fsync(file.fileno())
        packed_bytes = file.tell()
        failpoint("pack:flushed")
        if not publish(Path(file.name), out):
            raise ConfigError("it is there by now; name another file", where=out)
    progress.end()
    return _packed(len(files), total, packed_bytes)


def _packed(num_files: int, num_bytes: int, packed_bytes: int) -> Packed:
    ratio = packed_bytes / max(num_bytes, 1)
    return Packed(num_files=num_files, num_bytes=num_bytes, packed_bytes=packed_bytes, ratio=ratio)


def _require_same(out: Path, head: bytes) -> None:
    """What is there is a whole packed file of the same cache. Raises ConfigError, CorruptError for half of one."""
    if is_packed(out):
        with open(out, "rb") as file:
            same = file.read(len(head)) == head
        if same:
            PackedFile(out).close()
            return
    raise ConfigError("it is there already; name another file", where=out)


@contextmanager
def _part(out: Path) -> Iterator[BinaryIO]:
    """The file that becomes `out`, this process's own; it stays for the next try where something is in it."""
    make_folder(out.parent)
    path = out.with_name(f".{out.name}.pack")
    with open(path, "r+b", opener=lambda name, _: os.open(name, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)) as file:
        hold_alone(file.fileno(), out)
        try:
            yield file
        finally:
            file.flush()
            if path.exists() and not path.stat().st_size:
                path.unlink()


File = tuple[str, int, Path]
"""Its name in the cache, its size, where it is."""


def _files(cache: Cache) -> list[File]:
    """What is packed, the shards last and in order. Raises LayoutError for a link or a pipe."""
    found = []
    for path in sorted(cache.path.rglob("*")):
        name = path.relative_to(cache.path)
        if name.parts[0] in NOT_PACKED or (path.is_dir() and not path.is_symlink()):
            continue
        descriptor = open_regular(path)
        found.append((name.as_posix(), os.fstat(descriptor).st_size, path))
        os.close(descriptor)
    return sorted(found, key=lambda file: (file[0].startswith("shards/"), file[0]))


def _cuts(files: Iterable[File]) -> Iterator[Cut]:
    for number, (_, _, path) in enumerate(files):
        yield from cuts_of(number, path)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Begun:
    """What an interrupted packing left: so many bytes that are whole, their blocks, and the bytes that these hold."""

    num_bytes: int = 0
    num_blocks: int = 0
    plain_bytes: int = 0


def _begun(part: Path, head: bytes, files: list[File]) -> _Begun:
    """What is there of the same files; nothing where what is there is of others."""
    with open(part, "rb") as file:
        if file.read(len(head)) != head:
            return _Begun()
    found = _Begun(num_bytes=len(head))
    with PackedFile(part, whole=False) as packed, suppress(CorruptError):  # torn by the kill
        for block, cut in zip(packed.blocks(), _cuts(files), strict=False):
            if block.cut != cut:
                break
            packed.read(block)
            found = _Begun(
                num_bytes=block.at + block.num_bytes,
                num_blocks=found.num_blocks + 1,
                plain_bytes=found.plain_bytes + cut.size,
            )
    return found


def _compressed(cache: Cache, files: list[File], *, skipped: int) -> Iterator[tuple[Cut, bytes]]:
    """The blocks from one on, in order, by all cores; each shard is checked before. Raises CorruptError."""

    def work(cut: Cut) -> tuple[Cut, bytes]:
        return cut, compressed(_read(files[cut.file][2], cut), cut)

    shards = {shard_path(cache.path, number): number for number in range(len(cache.plan.shards))}

    def checked() -> Iterator[Cut]:
        seen = None
        for number, cut in enumerate(_cuts(files)):
            if number < skipped:
                continue
            path = files[cut.file][2]
            if cut.file != seen and path in shards:
                finding = check(cache, shards[path], "full")
                if finding.error is not None:
                    raise finding.error
            seen = cut.file
            yield cut

    yield from in_order(work, checked())


def _read(path: Path, cut: Cut) -> bytes:
    descriptor = open_regular(path)
    try:
        data = os.pread(descriptor, cut.size, cut.begin)
    finally:
        os.close(descriptor)
    if len(data) < cut.size:
        raise CorruptError(f"it ends at byte {cut.begin + len(data)} while it is packed", where=path)
    return data


def _ratio(files: list[File]) -> float:
    """What all files take, packed over plain: those of each folder as its largest say.

    A large file takes what its largest block does; the tables of a small one count beside its rows.
    """
    folders: dict[str, list[tuple[int, File]]] = {}
    for number, file in enumerate(files):
        folders.setdefault(file[0].partition("/")[0], []).append((number, file))
    packed = 0.0
    for inside in folders.values():
        measured, taken = 0, 0.0
        for number, (_, size, path) in sorted(inside, key=lambda each: -each[1][1])[:MEASURED]:
            cuts = sorted(cuts_of(number, path), key=lambda cut: -cut.size)
            if size > BLOCK_BYTES:
                cuts = cuts[:1]
            blocks = ((cut, compressed(_read(path, cut), cut)) for cut in cuts)
            found = sum(len(block_note(cut, data)) + len(data) for cut, data in blocks)
            measured += size
            taken += size * found / max(sum(cut.size for cut in cuts), 1)
        packed += sum(size for _, (_, size, _) in inside) * taken / max(measured, 1)
    return packed / max(sum(size for _, size, _ in files), 1)


def require_room(out: Path, needed: int, most_bytes: int) -> None:
    if needed > most_bytes:
        raise SpaceError(f"about {needed:,} bytes are needed, {most_bytes:,} are free; choose another disk", where=out)
