"""Shards: hidden states on disk, one safetensors file each.

Invariant: a shard under its final name is complete, and its commit record holds the digest of its body. The header is
a pure function of the plan and that digest, so a reader knows every byte of it beforehand.
Where rows have a ragged part, how long that is follows from the file's size, which the commit record has too.
Cost: row width x rows on disk; reading raw rows copies nothing; each 1 MiB block is checked once, on first touch.
Format: FORMAT.md section 4.
"""

# Shapes: N samples of the shard, R rows, E teacher width, n tokens of all its samples together, X ragged entries.

import math
import mmap
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import crc32c
import numpy as np
import pyarrow as pa
import xxhash
from pydantic import ValidationError

from kdpipe.manifests.access import open_bytes
from kdpipe.manifests.codec import CODECS, ENCODED_ROWS, RAW, Codec, Raw, num_bytes, ragged_of
from kdpipe.manifests.durable import (
    QUARANTINE,
    canonical,
    disk_error,
    fsync_folder,
    open_regular,
    publish,
    put_aside,
    read_small,
    write_once,
)
from kdpipe.manifests.errors import CorruptError, DriftError, IncompleteError, LayoutError
from kdpipe.manifests.failpoints import failpoint
from kdpipe.manifests.fitted import codec_of, expected_share
from kdpipe.manifests.made_with import extract_again, repair
from kdpipe.manifests.plan import Plan
from kdpipe.manifests.record import Record, first_problem
from kdpipe.manifests.sample import ID_BYTES, SampleView
from kdpipe.manifests.scratch_file import ScratchFile
from kdpipe.manifests.specs import Io
from kdpipe.manifests.tensorfile import DTYPES, TAGS, Layout, lay_out, parse

BLOCK = 1 << 20
NO_DIGEST = "0" * 32
MAX_COMMIT_BYTES = 1 << 16


class Commit(Record):
    """commits/NNNNNN.json: written last, it makes the shard count."""

    shard: int
    plan: str
    """sha256 of PLAN.json."""
    num_bytes: int
    """Size of the shard file."""
    digest: str
    """xxh3-128 of everything behind the header."""


def shard_path(folder: Path, index: int) -> Path:
    return folder / "shards" / f"{index:06d}.safetensors"


def commit_path(folder: Path, index: int) -> Path:
    return folder / "commits" / f"{index:06d}.json"


def shard_layout(plan: Plan, index: int, digest: str, *, codec: Codec | None = None, num_ragged: int = 0) -> Layout:
    """The layout of a shard: known before the teacher runs, save for the digest's 32 characters and a ragged part.

    codec: of the cache, where the plan alone does not say which
    """
    shard = plan.shards[index]
    width = plan.head.hidden_size
    codec, dtype = codec or CODECS[plan.settings.codec], plan.settings.dtype
    ragged = ragged_of(codec)
    tables = (shard.num_samples + 1) * 16 + shard.num_tokens * 5 + shard.num_samples * ID_BYTES
    behind = 0 if ragged is None else num_ragged * ragged.entry_bytes
    num_blocks = -(-(num_bytes(codec, shard.num_rows, width, dtype) + tables + behind) // BLOCK)
    return lay_out(
        [
            *codec.tensors(shard.num_rows, width, dtype),
            ("row_offsets", "I64", (shard.num_samples + 1,)),
            ("token_offsets", "I64", (shard.num_samples + 1,)),
            ("token_ids", "I32", (shard.num_tokens,)),
            ("supervised", "U8", (shard.num_tokens,)),
            ("sample_ids", "U8", (shard.num_samples, ID_BYTES)),
            *(() if ragged is None else ((name, tag, (num_ragged,)) for name, tag in ragged.tensors)),
            ("crc32c", "U32", (num_blocks,)),
        ],
        _metadata(plan, index, digest),
    )


def _metadata(plan: Plan, index: int, digest: str) -> dict[str, str]:
    """Of a shard's header."""
    return {
        "format": "kdpipe-shard",
        "version": "1",
        "plan": plan.digest_in(index),
        "shard": str(index),
        "xxh3_128": digest,
    }


def sized_layout(plan: Plan, index: int, digest: str, codec: Codec, size: int) -> Layout:
    """The layout of a shard of so many bytes; of another size where no number of ragged entries gives that one."""
    layout, ragged = shard_layout(plan, index, digest, codec=codec), ragged_of(codec)
    if ragged is None or size <= layout.num_bytes:
        return layout
    # Four bytes of checksum follow for every block that there is.
    content = size - layout.body
    content -= 4 * -(-content // (BLOCK + 4))
    count = (content - (layout.tensors["crc32c"].begin - layout.body)) // ragged.entry_bytes
    return shard_layout(plan, index, digest, codec=codec, num_ragged=max(count, 0))


def planned_bytes(folder: Path, plan: Plan, index: int) -> int:
    """Size of a committed shard's file, by the plan, or by its commit record where it has a ragged part."""
    codec = codec_of(folder, plan)
    if ragged_of(codec) is not None:
        return read_commit(folder, plan, index).num_bytes
    return shard_layout(plan, index, NO_DIGEST, codec=codec).num_bytes


def expected_bytes(folder: Path, plan: Plan, index: int) -> int:
    """Bytes that a shard will take: exact for raw rows, and else by what a row takes in the mean."""
    if plan.settings.codec in CODECS:
        return shard_layout(plan, index, NO_DIGEST).num_bytes
    raw = num_bytes(RAW, plan.shards[index].num_rows, plan.head.hidden_size, plan.settings.dtype)
    whole = shard_layout(plan, index, NO_DIGEST, codec=RAW).num_bytes
    return whole - int(raw * (1 - expected_share(folder, plan)))


def row_share(plan: Plan, commits: Mapping[int, Commit]) -> float:
    """Bytes that the rows of some committed shards take over those of raw ones."""
    raw, spared = 0, 0
    for index, commit in commits.items():
        raw += num_bytes(RAW, plan.shards[index].num_rows, plan.head.hidden_size, plan.settings.dtype)
        spared += shard_layout(plan, index, NO_DIGEST, codec=RAW).num_bytes - commit.num_bytes
    return 1 - spared / max(raw, 1)


def blocks(layout: Layout) -> Iterator[tuple[int, int]]:
    """(begin, end) of every checksummed block: 1 MiB steps from the first tensor to the checksum table."""
    end = layout.tensors["crc32c"].begin
    for begin in range(layout.body, end, BLOCK):
        yield begin, min(begin + BLOCK, end)


class ShardWriter:
    """A shard being filled: rows land in any order straight in the mapped file, then `commit` seals it.

    Rows that are not stored as they come land in a second file, and `commit` encodes them. Leaving the `with` block
    without `commit` removes what was written.
    path: the file that rows are written to
    hidden: [R, E] in it
    """

    def __init__(self, folder: Path, plan: Plan, index: int, samples: pa.RecordBatch) -> None:
        self._folder, self._plan, self._index = folder, plan, index
        self._codec = codec_of(folder, plan)
        self.layout = shard_layout(plan, index, NO_DIGEST, codec=self._codec)
        final, shape = shard_path(folder, index), (plan.shards[index].num_rows, plan.head.hidden_size)
        self._shard = ScratchFile(folder / "tmp", final.name, self.layout.num_bytes, final=final)
        failpoint("shard:allocated")
        if isinstance(self._codec, Raw):
            self._rows, self._rows_at = self._shard, self.layout.body
        else:
            size = num_bytes(RAW, *shape, plan.settings.dtype)
            try:
                self._rows, self._rows_at = ScratchFile(folder / "tmp", f"{index:06d}.rows", size, final=final), 0
            except BaseException:
                self._shard.close()
                raise
        self.path = self._rows.path
        dtype = DTYPES[TAGS[plan.settings.dtype]]
        self.hidden = np.ndarray(shape, dtype, buffer=self._rows.bytes, offset=self._rows_at)
        self._write_tables(samples)

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, *exc: object) -> None:
        self._shard.close()
        if self._rows is not self._shard:
            self._rows.close()

    def rows(self, first: int, count: int) -> tuple[np.ndarray, int]:
        """The place of `count` rows from `first` on: the [count, E] view and its byte offset in `path`, made ready."""
        view = self.hidden[first : first + count]
        offset = self._rows_at + first * self.hidden.strides[0]
        self._rows.make_ready(offset, view.nbytes)
        return view, offset

    def commit(self) -> Commit:
        """Checksum, digest, flush, link into place, commit record; the record of the shard now in place.

        Raises DriftError if this shard is committed already with other bytes: the first copy stays.
        """
        if self._rows is not self._shard:
            self._encode()
        data = self._shard.bytes
        table = self.layout.tensors["crc32c"].view(data)
        table[:] = [crc32c.crc32c(data[begin:end]) for begin, end in blocks(self.layout)]
        digest = xxhash.xxh3_128_hexdigest(data[self.layout.body :].data)
        sealed = sized_layout(self._plan, self._index, digest, self._codec, self.layout.num_bytes)
        data[: sealed.body] = np.frombuffer(sealed.header, np.uint8)
        failpoint("shard:digested")
        record = _commit_of(self._plan, self._index, sealed, digest)
        final = shard_path(self._folder, self._index)
        try:
            self._shard.flush()
            failpoint("shard:flushed")
            fresh = publish(self._shard.path, final)
        except OSError as err:
            raise disk_error(err, final) from err
        if not fresh:
            self._agree(record, final)
            self._shard.path.unlink(missing_ok=True)
        line = canonical(record.model_dump())
        if not write_once(commit_path(self._folder, self._index), line, scratch_folder=self._folder / "tmp"):
            first = read_commit(self._folder, self._plan, self._index)
            if first != record:
                put_aside(self._folder, final)  # it was put in place just now, where the committed one was gone
                raise DriftError(f"committed with digest {first.digest}, this run gave {digest}", where=final)
        return record

    def _agree(self, record: Commit, final: Path) -> None:
        """The shard in place must be the one we made: linked by a twin, or by a run killed before its commit."""
        with open(final, "rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as there:
            same = there[:] == self._shard.map[:] if len(there) == len(self._shard.map) else False
        if not same:
            (aside,) = put_aside(self._folder, self._shard.path)
            raise DriftError(
                f"a shard with other bytes is in place, this run gave digest {record.digest}; the first one stays, the "
                f"other is {QUARANTINE}/{aside.name}. Was the teacher, its engine or the machine changed?",
                where=final,
            )

    def _encode(self) -> None:
        """Write the rows as they are stored; a ragged part makes the file longer when all of it is known."""
        ragged = ragged_of(self._codec)
        behind: dict[str, list[np.ndarray]] = {name: [] for name, _ in (() if ragged is None else ragged.tensors)}
        for first in range(0, len(self.hidden), ENCODED_ROWS):
            for name, part in self._codec.encode(self.hidden[first : first + ENCODED_ROWS]).items():
                if name in behind:
                    behind[name].append(part)
                else:
                    self.layout.tensors[name].view(self._shard.bytes)[first : first + len(part)] = part
        if behind and self.hidden.size:
            whole = {name: np.concatenate(parts) for name, parts in behind.items()}
            count = len(next(iter(whole.values())))
            self.layout = shard_layout(self._plan, self._index, NO_DIGEST, codec=self._codec, num_ragged=count)
            self._shard.resize(self.layout.num_bytes)
            for name, part in whole.items():
                self.layout.tensors[name].view(self._shard.bytes)[:] = part

    def _write_tables(self, samples: pa.RecordBatch) -> None:
        tensors = self.layout.tensors
        columns = {
            "row_offsets": np.concatenate([[0], np.cumsum(samples.column("num_rows").to_numpy())]),
            "token_offsets": np.concatenate([[0], np.cumsum(samples.column("num_tokens").to_numpy())]),
            "token_ids": samples.column("token_ids").values.to_numpy(),
            "supervised": samples.column("supervised").values.to_numpy(zero_copy_only=False),
            "sample_ids": np.frombuffer(samples.column("content_id").buffers()[1], np.uint8),
        }
        for name, values in columns.items():
            view = tensors[name].view(self._shard.bytes)
            view[...] = values[: view.size].reshape(view.shape)


def _commit_of(plan: Plan, index: int, layout: Layout, digest: str) -> Commit:
    return Commit(shard=index, plan=plan.digest_in(index), num_bytes=layout.num_bytes, digest=digest)


def read_commit(folder: Path, plan: Plan, index: int) -> Commit:
    """The commit record of a shard. Raises IncompleteError where there is none, LayoutError where it is not ours."""
    path = commit_path(folder, index)
    try:
        data = read_small(path, MAX_COMMIT_BYTES)
        record = Commit.model_validate_json(data)
    except FileNotFoundError:
        raise IncompleteError("not extracted yet", where=path, hint=extract_again(folder)) from None
    except ValidationError as err:
        raise LayoutError(f"not a commit record: {first_problem(err)}", where=path, hint=repair(folder)) from None
    if canonical(record.model_dump()) != data:
        raise LayoutError("it was edited after it was written", where=path, hint=repair(folder))
    expected = plan.digest_in(index)
    if record.shard != index or record.plan != expected:
        raise LayoutError(
            f"it is for shard {record.shard} of plan {record.plan}, expected shard {index} of {expected}",
            where=path,
            hint=repair(folder),
        )
    return record


def adopt(folder: Path, plan: Plan, index: int) -> bool:
    """Commit a shard in place without a commit record, as a kill between the two leaves it; whether there was one.

    Its rows passed the gate before it was put in place. Raises CorruptError if its bytes are not those of its digest.
    """
    path = shard_path(folder, index)
    try:
        with open(open_regular(path), "rb") as file:
            size = os.fstat(file.fileno()).st_size
            data = np.memmap(file, np.uint8, mode="r") if size else np.empty(0, np.uint8)
    except FileNotFoundError:
        return False
    codec = codec_of(folder, plan)
    digest = xxhash.xxh3_128_hexdigest(data[shard_layout(plan, index, NO_DIGEST, codec=codec).body :].data)
    layout = sized_layout(plan, index, digest, codec, len(data))
    if len(data) != layout.num_bytes or data[: layout.body].tobytes() != layout.header:
        raise CorruptError(
            f"it has no commit record and its bytes have digest {digest}, which is not the one in its header",
            where=path,
        )
    record = _commit_of(plan, index, layout, digest)
    fsync_folder(path.parent)  # the kill may have come before the name was on the disk
    write_once(commit_path(folder, index), canonical(record.model_dump()), scratch_folder=folder / "tmp")
    return True


def check_without_codec(folder: Path, plan: Plan, index: int, io: Io, *, whole: bool) -> None:
    """Size and header of a committed shard, and where `whole` every byte, though the codec of its rows is missing.

    Raises CorruptError, LayoutError.
    """
    path, commit = shard_path(folder, index), read_commit(folder, plan, index)
    data = open_bytes(path, commit.num_bytes, io).read(0, commit.num_bytes)
    try:
        layout, metadata = parse(data.data, path)
    except LayoutError as err:
        raise CorruptError(err.fact, where=path, hint=repair(folder)) from None
    expected = _metadata(plan, index, commit.digest)
    tensors = [(each.name, each.dtype, each.shape) for each in layout.tensors.values()]
    if metadata != expected or lay_out(tensors, expected).header != layout.header:
        raise CorruptError("header differs from what the commit record says", where=path, hint=repair(folder))
    if whole and (digest := xxhash.xxh3_128_hexdigest(data[layout.body :].data)) != commit.digest:
        raise CorruptError(f"digest {digest}, the commit record says {commit.digest}", where=path, hint=repair(folder))


class Shard:
    """A committed shard, open for reading; mapped, it stays so for as long as the object lives."""

    def __init__(self, folder: Path, plan: Plan, index: int, io: Io = "mmap", *, good: bytearray | None = None) -> None:
        self.path, self._cache = shard_path(folder, index), folder
        commit = read_commit(folder, plan, index)
        self._codec = codec_of(folder, plan)
        self.layout = sized_layout(plan, index, commit.digest, self._codec, commit.num_bytes)
        self.digest = commit.digest
        if commit.num_bytes != self.layout.num_bytes:
            raise LayoutError(
                f"it says {commit.num_bytes} bytes, the plan says {self.layout.num_bytes}",
                where=commit_path(folder, index),
                hint=repair(folder),
            )
        self._file = open_bytes(self.path, self.layout.num_bytes, io)
        header = self._file.read(0, self.layout.body).tobytes()
        if header != self.layout.header:
            at = next(i for i, (a, b) in enumerate(zip(header, self.layout.header, strict=True)) if a != b)
            raise self.corrupt(f"header differs from what the plan and the commit record say at byte {at}")
        tensors = self.layout.tensors
        self._body, self._checked_to = self.layout.body, tensors["crc32c"].begin
        self._crc = self._file.read(self._checked_to, self.layout.num_bytes).view(np.uint32)
        self.good = bytearray(len(self._crc)) if good is None else good
        """1 for every block that was found good, by this object or, where `good` is given, by one before it."""
        first = tensors["row_offsets"].begin
        tables = self._checked(first, tensors["sample_ids"].end)
        names = ("row_offsets", "token_offsets", "token_ids", "supervised", "sample_ids")
        arrays = [tensors[name].view(tables, first) for name in names]
        self.row_offsets, self.token_offsets, self.token_ids, supervised, self.sample_ids = arrays
        self.supervised = supervised.view(bool)
        # Plain ints, because indexing an array costs ten times as much and `sample` does little else.
        self._row_at, self._token_at = self.row_offsets.tolist(), self.token_offsets.tolist()
        self.num_rows, self._width = plan.shards[index].num_rows, plan.head.hidden_size
        self._dtype = DTYPES[TAGS[plan.settings.dtype]]
        stored = self._codec.tensors(self.num_rows, self._width, plan.settings.dtype)
        self._stored = [(tensors[name], math.prod(shape[1:]) * DTYPES[tag].itemsize) for name, tag, shape in stored]
        """The tensors that hold rows, and bytes of a row in each."""
        self._row_bytes, self._mapped, self._ragged = self._stored[0][1], None, ragged_of(self._codec)
        if self._ragged is not None:
            counts = tensors[self._ragged.counts]
            each = self._checked(counts.begin, counts.end).view(DTYPES[counts.dtype])
            self._ragged_at = np.concatenate([[0], np.cumsum(each, dtype=np.int64)]).tolist()
            """int [R + 1], the first ragged entry of each row."""
            if self._ragged_at[-1] != (entries := tensors[self._ragged.tensors[0][0]].shape[0]):
                raise self.corrupt(f"its rows have {self._ragged_at[-1]} entries of {counts.name}, it holds {entries}")
        if io == "mmap" and isinstance(self._codec, Raw):
            self._mapped = tensors["hidden"].view(self._file.read(0, self._checked_to))

    def corrupt(self, what: str) -> CorruptError:
        """The error for damage in this shard."""
        return CorruptError(what, where=self.path, hint=repair(self._cache))

    def sample(self, index: int) -> SampleView:
        """The sample at `index` within this shard, with all its rows; blocks are checked on first touch."""
        token, next_token = self._token_at[index], self._token_at[index + 1]
        return SampleView(
            token_ids=self.token_ids[token:next_token],
            supervised=self.supervised[token:next_token],
            rows=self.rows_of(index),
        )

    def rows_of(self, index: int) -> np.ndarray:
        """All rows of the sample at `index` within this shard, [R, E]."""
        return self.rows(self._row_at[index], self._row_at[index + 1])

    def parts_of(self, index: int) -> dict[str, np.ndarray]:
        """The same as they are stored."""
        return self.parts(self._row_at[index], self._row_at[index + 1])

    def rows(self, first: int, after: int) -> np.ndarray:
        """Rows first to after, [after - first, E], a view where raw and mapped; blocks are checked on first touch."""
        if self._mapped is None:
            return self._read_rows(first, after)
        self.check(self._body + first * self._row_bytes, self._body + after * self._row_bytes)
        return self._mapped[first:after]

    def _read_rows(self, first: int, after: int) -> np.ndarray:
        """The same, read and decoded: a copy, but for raw rows one that reading has made."""
        parts = self.parts(first, after)
        if isinstance(self._codec, Raw):
            return parts["hidden"]
        out = np.empty((after - first, self._width), self._dtype)
        self._codec.decode(parts, out)
        return out

    def parts(self, first: int, after: int) -> dict[str, np.ndarray]:
        """Rows first to after as they are stored, the codec's tensors by name; blocks are checked on first touch."""
        parts = {}
        for tensor, row_bytes in self._stored:
            data = self._checked(tensor.begin + first * row_bytes, tensor.begin + after * row_bytes)
            parts[tensor.name] = np.ndarray((after - first, *tensor.shape[1:]), DTYPES[tensor.dtype], buffer=data)
        for name, tag in () if self._ragged is None else self._ragged.tensors:
            low, high = self._ragged_at[first], self._ragged_at[after]
            begin, size = self.layout.tensors[name].begin, DTYPES[tag].itemsize
            data = self._checked(begin + low * size, begin + high * size)
            parts[name] = np.ndarray(high - low, DTYPES[tag], buffer=data)
        return parts

    def prefetch(self, index: int) -> None:
        """Ask the kernel to read a sample's rows ahead, and whole blocks where they are verified first."""
        first, after = self._row_at[index : index + 2]
        for tensor, row_bytes in self._stored:
            begin, end = tensor.begin + first * row_bytes, tensor.begin + after * row_bytes
            if end > begin and self._unseen(begin, end) >= 0:
                begin, end = self._blocks_of(begin, end)
            self._file.prefetch(begin, end)

    def check(self, begin: int, end: int) -> None:
        """Verify the blocks that hold bytes begin..end, those not verified before. Raises CorruptError."""
        if end > begin and self._unseen(begin, end) >= 0:
            self._checked(begin, end)

    def _unseen(self, begin: int, end: int) -> int:
        """The first block not verified before that holds some of bytes begin..end; -1 where there is none."""
        body = self._body
        return self.good.find(0, (begin - body) // BLOCK, (end - 1 - body) // BLOCK + 1)

    def _blocks_of(self, begin: int, end: int) -> tuple[int, int]:
        """Where the blocks that hold bytes begin..end begin and end."""
        first, last = (begin - self._body) // BLOCK, (end - 1 - self._body) // BLOCK
        return self._body + first * BLOCK, min(self._body + (last + 1) * BLOCK, self._checked_to)

    def _checked(self, begin: int, end: int) -> np.ndarray:
        """Bytes begin..end, read together with the rest of the blocks that are verified on the way."""
        body, stop = self._body, self._checked_to
        block = self._unseen(begin, end) if end > begin else -1
        if block < 0:
            return self._file.read(begin, end)
        low, high = self._blocks_of(begin, end)
        data = self._file.read(low, high)
        while block >= 0:
            start = body + block * BLOCK
            found = crc32c.crc32c(data[start - low : start - low + BLOCK])
            if found != self._crc[block]:
                raise self.corrupt(
                    f"bytes {start}-{min(start + BLOCK, stop) - 1} do not match their checksum "
                    f"(crc32c {found:08x}, recorded {int(self._crc[block]):08x})"
                )
            self.good[block] = 1
            block = self.good.find(0, block, -(-(high - body) // BLOCK))
        return data[begin - low : end - low]

    def verify(self, samples: pa.RecordBatch | None) -> None:
        """Every block, the digest, and the tables against samples.arrow where that is given. Raises CorruptError."""
        self.good = bytearray(len(self.good))
        found = xxhash.xxh3_128()
        for begin, end in blocks(self.layout):
            found.update(self._checked(begin, end).data)
        found.update(self._file.read(self._checked_to, self.layout.num_bytes).data)
        digest = found.hexdigest()
        if digest != self.digest:
            raise self.corrupt(f"digest {digest}, the commit record says {self.digest}")
        if samples is None:
            return
        ids = np.frombuffer(samples.column("content_id").buffers()[1], np.uint8)[: self.sample_ids.size]
        agree = (
            np.array_equal(self.token_ids, samples.column("token_ids").values.to_numpy())
            and np.array_equal(self.supervised, samples.column("supervised").values.to_numpy(zero_copy_only=False))
            and np.array_equal(np.diff(self.row_offsets), samples.column("num_rows").to_numpy())
            and np.array_equal(self.sample_ids.reshape(-1), ids)
        )
        if not agree:
            raise self.corrupt("its ids, masks or row counts are not those of samples.arrow")
