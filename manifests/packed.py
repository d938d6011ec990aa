"""Packed files: a folder's files in one, block by block, each block shuffled and compressed by itself.

    note, (note, zstd frame)*, note        the first note lists the files, the last one closes the file

A note is a skippable frame of the zstd format that holds crc32c and JSON, so `zstd -t` tests a packed file, and `zstd
-d` gives its blocks one after the other. A block is a stretch of one file: of a tensor whole rows, whose bytes are
put in another order before zstd sees them: the first bytes of all numbers, column by column, then the second ones.
Invariant: a block is read and checked without any other; no byte of it is used before its digest agreed.
Cost: the memory of a block for each thread. Format: FORMAT.md section 9.
"""

# Shapes: R rows of a block, C columns, W bytes of a number.

import json
import os
import struct
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO, TypeVar

import crc32c
import numpy as np
import pyarrow as pa
import xxhash

from kdpipe.manifests.cores import given_cores
from kdpipe.manifests.durable import open_regular
from kdpipe.manifests.errors import CorruptError, LayoutError
from kdpipe.manifests.tensorfile import DTYPES, parse

VERSION = 1
NOTE = struct.Struct("<III")
"""Magic, length of what follows, crc32c of the JSON."""
MAGIC = 0x184D2A5B
"""Of a skippable frame; the zstd format leaves the last digit free."""
KEY = "kdpipe_packed"
BLOCK_BYTES = 4 << 20
MAX_BLOCK_BYTES = 1 << 30
LEVEL = 1
"""zstd's search for repetitions finds none in shuffled rows: higher levels take longer and give more bytes."""
END_BYTES = 128
"""Of the last note, so that whether a file is whole shows without reading it."""
MAX_NOTE_BYTES = 1 << 30
DAMAGED = "unpack another copy of it"


@dataclass(frozen=True, kw_only=True, slots=True)
class Cut:
    """A stretch of a file: `size` bytes from `begin` on, whole rows of `columns` numbers of `width` bytes each.

    file: its number in the list of files
    """

    file: int
    begin: int
    size: int
    width: int
    columns: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Block:
    """A cut as it lies in a packed file: so many bytes from `at` on, and their digest."""

    cut: Cut
    at: int
    num_bytes: int
    digest: str


def is_packed(path: Path) -> bool:
    """Whether a path is a packed file, whole or not."""
    try:
        with open(open_regular(path), "rb") as file:
            head = file.read(NOTE.size + len(KEY) + 2)
    except (OSError, LayoutError):
        return False
    return head[:4] == MAGIC.to_bytes(4, "little") and head[NOTE.size :] == f'{{"{KEY}'.encode()


def cuts_of(number: int, path: Path) -> Iterator[Cut]:
    """A file cut into blocks: a tensor file between rows, any other wherever it comes."""
    size = path.stat().st_size
    for begin, end, width, columns in _stretches(path, size):
        row = width * columns
        step = max(BLOCK_BYTES // row, 1) * row
        for at in range(begin, end, step):
            yield Cut(file=number, begin=at, size=min(step, end - at), width=width, columns=columns)


def _stretches(path: Path, size: int) -> list[tuple[int, int, int, int]]:
    """(begin, end, width, columns): a tensor file's header and each of its tensors, or the whole file."""
    whole = [(0, size, 1, 1)]
    if path.suffix != ".safetensors" or not size:
        return whole
    try:
        layout, _ = parse(np.memmap(path, np.uint8, mode="r").data, path)
    except LayoutError:
        return whole
    found = [(0, layout.body, 1, 1)]
    for tensor in sorted(layout.tensors.values(), key=lambda tensor: tensor.begin):
        columns = max(int(np.prod(tensor.shape[1:], dtype=np.int64)), 1)
        found.append((tensor.begin, tensor.end, DTYPES[tensor.dtype].itemsize, columns))
    return found


def compressed(data: bytes, cut: Cut) -> bytes:
    """A cut's bytes as they are stored."""
    bits = np.frombuffer(data, np.uint8).reshape(-1, cut.columns, cut.width)
    return _codec().compress(np.ascontiguousarray(bits.transpose(2, 1, 0)), asbytes=True)


def restored(data: bytes, cut: Cut) -> bytes:
    """The cut's bytes again."""
    bits = _codec().decompress(data, cut.size, asbytes=True)
    ordered = np.frombuffer(bits, np.uint8).reshape(cut.width, cut.columns, -1)
    return ordered.transpose(2, 1, 0).tobytes()


A = TypeVar("A")
B = TypeVar("B")


def in_order(work: Callable[[A], B], items: Iterable[A]) -> Iterator[B]:
    """The results of a function, in order, a few made ahead on as many threads as there are cores."""
    threads = given_cores().count
    waiting: deque[Future[B]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        for item in items:
            waiting.append(pool.submit(work, item))
            if len(waiting) > threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _codec() -> pa.Codec:
    return pa.Codec("zstd", compression_level=LEVEL)


def note(fields: Mapping[str, object], *, num_bytes: int = 0) -> bytes:
    """A note with these fields, padded with blanks to so many bytes where it is shorter."""
    text = json.dumps(fields, separators=(",", ":")).encode().ljust(num_bytes - NOTE.size)
    return NOTE.pack(MAGIC, len(text) + 4, crc32c.crc32c(text)) + text


def block_note(cut: Cut, data: bytes) -> bytes:
    """What stands before a block's bytes."""
    return note(asdict(cut) | {"num_bytes": len(data), "xxh3_128": xxhash.xxh3_128_hexdigest(data)})


def end_note(num_blocks: int) -> bytes:
    """What closes a packed file."""
    return note({"num_blocks": num_blocks}, num_bytes=END_BYTES)


class PackedFile:
    """A packed file that is read from its first note on.

    files: their names in the cache and their sizes
    digest: of the first note, which no file of another cache has
    cache: digest of the cache, as Cache.digest
    Raises LayoutError for another version's file, CorruptError for one that is damaged.
    """

    def __init__(self, path: Path, *, whole: bool = True) -> None:
        """whole: the file must be closed; else it may end anywhere"""
        self.path, self._file = path, os.fdopen(open_regular(path), "rb")
        try:
            self.num_bytes = os.fstat(self._file.fileno()).st_size
            found = read_note(self._file, path) or {}
            if found.get(KEY) != VERSION:
                raise LayoutError(f"of version {found.get(KEY)}, this kdpipe reads version {VERSION}", where=path)
            self.files: Sequence[tuple[str, int]] = _names(found.get("files"), path)
            self.cache = found.get("cache")
            self._first = self._file.tell()
            self.digest = xxhash.xxh3_64_hexdigest(os.pread(self._file.fileno(), self._first, 0))
            if whole:
                self._require_end()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> "PackedFile":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        self._file.close()

    def blocks(self) -> Iterator[Block]:
        """Its blocks in order, none of whose bytes were looked at. Raises CorruptError at a note that is no block's."""
        at, count = self._first, 0
        while True:
            self._file.seek(at)
            found = read_note(self._file, self.path)
            if found is None:
                return
            if "num_blocks" in found:
                if found["num_blocks"] != count:
                    raise CorruptError(f"it has {count} blocks of {found['num_blocks']}", where=self.path, hint=DAMAGED)
                return
            block = self._block(found)
            yield block
            at, count = block.at + block.num_bytes, count + 1

    def cut_of(self, block: Block) -> tuple[Cut, bytes]:
        """A block's cut and its bytes as they were. Raises CorruptError."""
        return block.cut, restored(self.read(block), block.cut)

    def _block(self, found: dict) -> Block:
        try:
            cut = Cut(**{name: int(found[name]) for name in Cut.__slots__})
            row, size = cut.width * cut.columns, self.files[cut.file][1]
            fits = 0 < cut.size <= MAX_BLOCK_BYTES and 0 <= cut.begin <= size - cut.size and not cut.size % row
            block = Block(
                cut=cut, at=self._file.tell(), num_bytes=int(found["num_bytes"]), digest=str(found["xxh3_128"])
            )
        except (KeyError, TypeError, ValueError, IndexError, ZeroDivisionError):
            fits = False
        if not fits:
            raise CorruptError("a note in it says of no block where it belongs", where=self.path, hint=DAMAGED)
        return block

    def read(self, block: Block) -> bytes:
        """The bytes of a block's frame. Raises CorruptError where they are not those that were written."""
        data = os.pread(self._file.fileno(), block.num_bytes, block.at)
        if len(data) < block.num_bytes or xxhash.xxh3_128_hexdigest(data) != block.digest:
            cut = block.cut
            raise CorruptError(
                f"bytes {block.at}-{block.at + block.num_bytes - 1} do not match their digest; they hold bytes "
                f"{cut.begin}-{cut.begin + cut.size - 1} of {self.files[cut.file][0]}",
                where=self.path,
                hint=DAMAGED,
            )
        return data

    def _require_end(self) -> None:
        self._file.seek(max(self.num_bytes - END_BYTES, self._first))
        try:
            end = read_note(self._file, self.path)
        except CorruptError:
            end = None
        if end is None or "num_blocks" not in end:
            raise CorruptError(
                f"its last note is missing: {self.num_bytes:,} bytes are not all of it, or its end is damaged",
                where=self.path,
                hint=DAMAGED,
            )


def _names(listed: object, where: Path) -> list[tuple[str, int]]:
    """The names and sizes of the files, none of them outside of the folder that they are unpacked into."""
    found = []
    for name, size in listed if isinstance(listed, list) else []:
        if Path(name).is_absolute() or ".." in Path(name).parts or size < 0:
            raise LayoutError(f"it names a file that is in no cache: {name}", where=where)
        found.append((name, size))
    return found


def read_note(file: BinaryIO, where: object) -> dict | None:
    """The note at a file's place; None where the file ends there. Raises CorruptError for any other bytes."""
    at, head = file.tell(), file.read(NOTE.size)
    if not head:
        return None
    magic, size, crc = NOTE.unpack(head) if len(head) == NOTE.size else (0, 0, 0)
    text = file.read(size - 4) if magic == MAGIC and 4 <= size < MAX_NOTE_BYTES else b""
    if not text or crc32c.crc32c(text) != crc:
        raise CorruptError(f"byte {at} begins no note that is whole: what follows cannot be read", where=where)
    found: dict = json.loads(text)
    return found
