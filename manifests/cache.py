"""Cache: a teacher's rows for every supervised token, read without a copy, a GPU or torch.

    cache = Cache.open(path); len(cache); cache[i] -> SampleView(token_ids, supervised, rows)

Invariant: only committed shards are read, and no byte of theirs is used before its block's checksum agreed.
Cost: one mapping a shard that was read lately, at most `most_mappings` over all caches of the process; a view keeps its
own. Format: FORMAT.md.
"""

# Shapes: N samples, n tokens and R rows of one sample, E teacher width, V rows of the teacher's head.

import contextlib
import hashlib
import os
import shlex
import weakref
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import xxhash

from kdpipe.manifests.access import most_mappings, open_bytes
from kdpipe.manifests.durable import make_folder, open_regular, publish
from kdpipe.manifests.errors import CorruptError, IncompleteError, LayoutError
from kdpipe.manifests.fitted import Choice, loss_of, open_fitted, require_known, source_codec
from kdpipe.manifests.made_with import extract_again, last_extraction, repair, repairable
from kdpipe.manifests.plan import GROWN, Plan, read_plan
from kdpipe.manifests.provenance import digest_stream
from kdpipe.manifests.sample import SampleView, is_heldout, row_positions
from kdpipe.manifests.samples import Samples
from kdpipe.manifests.shard import Commit, Shard, commit_path, read_commit, row_share
from kdpipe.manifests.specs import Io
from kdpipe.manifests.tensorfile import TAGS, Layout, lay_out, parse

HEAD_FILE = "head.safetensors"


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class HeadArrays:
    """The teacher's lm_head: weight [V, E], bias [V] or None; V counts padded rows too."""

    weight: np.ndarray
    bias: np.ndarray | None


class Cache:
    """A cache folder, open for reading; it may still be growing, then `complete` is False."""

    _open: ClassVar["weakref.WeakSet[Cache]"] = weakref.WeakSet()

    def __init__(self, path: Path, plan: Plan, io: Io = "mmap") -> None:
        self.path, self.plan, self.io = path, plan, io
        require_known(Choice.read(plan.settings.codec, path).name, where=path)
        self.samples = Samples(path, plan, io)
        self._starts = plan.shards.starts
        self._every_row = plan.settings.rows == "all"
        self._shards: dict[int, Shard] = {}
        self._checked: dict[int, bytearray] = {}
        """Of shards that were let go: which of their blocks were found good."""
        self._most = most_mappings()
        self._open.add(self)

    @classmethod
    def open(cls, path: str | Path, *, io: Io = "mmap", fingerprint: str | None = None) -> "Cache":
        """Open the cache at `path`: all that is in it, or what was before it grew where that has the fingerprint.

        io: "mmap" maps its files, "pread" reads them, for network file systems
        Raises CacheError where there is none, LayoutError where it is not readable, ConfigError for an unknown codec.
        """
        last = max(_commit_numbers(Path(path)), default=-1)  # before the plan: a growing cache's plan comes first
        plan = read_plan(Path(path))
        if last >= len(plan.shards):
            raise LayoutError(
                f"shard {last} is committed, its plans have {len(plan.shards)} shards: a folder of {GROWN}/ is lost; "
                "put it back from a copy, or extract everything into another cache",
                where=path,
            )
        if fingerprint is not None and plan.fingerprint.overall() != fingerprint:
            earlier = (read_plan(Path(path), generation) for generation in reversed(range(plan.generation)))
            plan = next((each for each in earlier if each.fingerprint.overall() == fingerprint), plan)
        return cls(Path(path), plan, io)

    def fingerprints(self) -> set[str]:
        """Of all that is in it, and of what was before each time it grew."""
        plans = [read_plan(self.path, generation) for generation in range(self.plan.generation)]
        return {plan.fingerprint.overall() for plan in (*plans, self.plan)}

    def __len__(self) -> int:
        return self.plan.num_samples

    def __getitem__(self, index: int) -> SampleView:
        size = self.plan.num_samples
        if not -size <= index < size:
            raise IndexError(f"sample {index} of a cache of {size}")
        shard, within = self._locate(index % size)
        view = shard.sample(within)
        if self._every_row:
            view = replace(view, rows=_select(view.rows, row_positions(view.supervised)))
        return view

    def rows(self, index: int) -> np.ndarray:
        """The rows of a sample's supervised tokens, [R, E]: those of `cache[index]`."""
        return self[index].rows if self._every_row else self.stored_rows(index)

    def stored_rows(self, index: int) -> np.ndarray:
        """All rows that are kept of a sample, [R, E]: `cache[index].rows` has those of supervised tokens alone."""
        shard, within = self._locate(index)
        return shard.rows_of(within)

    def stored_parts(self, index: int) -> dict[str, np.ndarray]:
        """The same as they are stored, the codec's tensors by name."""
        shard, within = self._locate(index)
        return shard.parts_of(within)

    def __iter__(self) -> Iterator[SampleView]:
        return (self[index] for index in range(len(self)))

    def prefetch(self, index: int) -> None:
        """Ask the kernel to read a sample's rows ahead of `cache[index]`."""
        shard, within = self._locate(index)
        shard.prefetch(within)

    def _locate(self, index: int) -> tuple[Shard, int]:
        number = bisect_right(self._starts, index) - 1
        return self.shard(number), index - self._starts[number]

    def shard(self, number: int) -> Shard:
        """A committed shard; the one opened first makes room. Raises IncompleteError if it is not committed yet."""
        if number not in self._shards:
            while len(self._shards) >= max(self._most // len(self._open), 1):
                oldest = next(iter(self._shards))
                self._checked[oldest] = self._shards.pop(oldest).good
            self._shards[number] = Shard(self.path, self.plan, number, self.io, good=self._checked.pop(number, None))
        return self._shards[number]

    def committed(self) -> list[int]:
        """Numbers of the shards that have a commit record."""
        return [number for number in range(len(self.plan.shards)) if commit_path(self.path, number).exists()]

    @property
    def complete(self) -> bool:
        return len(self.committed()) == len(self.plan.shards)

    def require_complete(self) -> None:
        """Raises IncompleteError unless every shard is committed."""
        done = len(self.committed())
        if done < len(self.plan.shards):
            raise IncompleteError(
                f"{done} of {len(self.plan.shards)} shards are extracted",
                where=self.path,
                hint=extract_again(self.path),
            )

    def num_tokens(self) -> np.ndarray:
        """Tokens of every sample, int32 [N]."""
        return self.samples.column("num_tokens")

    def num_supervised(self) -> np.ndarray:
        """Supervised tokens of every sample, those with a row to learn from, int32 [N]."""
        return self.samples.column("num_supervised")

    def heldout(self, fraction: float | None = None) -> np.ndarray:
        """Which samples are held out from training, bool [N]; the plan's fraction unless another is given."""
        fraction = self.plan.heldout_fraction if fraction is None else fraction
        return is_heldout(self.samples.column("content_id"), fraction)

    @property
    def teacher_folder(self) -> Path:
        """Holds the head and the tokenizer files."""
        return self.path / "teacher"

    def head(self) -> HeadArrays:
        """The teacher's lm_head. Raises LayoutError or CorruptError where the file is damaged."""
        path = self.teacher_folder / HEAD_FILE
        try:
            with repairable(self.path):
                descriptor = open_regular(path)
        except FileNotFoundError:
            raise IncompleteError("the teacher's head is missing", where=path, hint=extract_again(self.path)) from None
        size = os.fstat(descriptor).st_size
        os.close(descriptor)
        if not size:
            raise LayoutError("an empty file", where=path, hint=repair(self.path))
        buffer = open_bytes(path, size, self.io).read(0, size)
        found, metadata = parse(buffer.data, path)
        record, digest = self.plan.head, metadata.get("xxh3_128", "")
        shape = (record.head_rows, record.hidden_size)
        layout = head_layout(record.dtype, shape, has_bias=record.has_bias, digest=digest)
        if found.header != layout.header:
            raise LayoutError(
                f"not the head PLAN.json describes: {record.dtype}, {shape[0]} x {shape[1]}, "
                f"{'a' if record.has_bias else 'no'} bias",
                where=path,
                hint=repair(self.path),
            )
        actual, planned = xxhash.xxh3_128_hexdigest(buffer.data), self.plan.teacher_files.get(HEAD_FILE)
        if actual != planned:
            raise CorruptError(f"xxh3-128 {actual}, PLAN.json says {planned}", where=path, hint=repair(self.path))
        arrays = {name: tensor.view(buffer) for name, tensor in layout.tensors.items()}
        return HeadArrays(weight=arrays["weight"], bias=arrays.get("bias"))

    def check_teacher_files(self) -> None:
        """Look at what lies beside the head: tokenizer, chat template, the head's record.

        Raises IncompleteError where a file is missing, LayoutError where something else is in its place, CorruptError
        where one is not what was written.
        """
        with repairable(self.path):
            found = teacher_files(self.teacher_folder, but=HEAD_FILE)
        for name, planned in sorted(self.plan.teacher_files.items()):
            actual, where = found.get(name), self.teacher_folder / name
            if actual is None and name != HEAD_FILE:
                if os.path.lexists(where):
                    raise LayoutError("not a regular file", where=where, hint=repair(self.path))
                raise IncompleteError("it is missing", where=where, hint=extract_again(self.path))
            if actual is not None and actual != planned:
                raise CorruptError(f"xxh3-128 {actual}, PLAN.json says {planned}", where=where, hint=repair(self.path))

    def num_bytes(self) -> int:
        """Bytes of the files in the cache, without the unfinished ones of writers at work."""
        scratch = self.path / "tmp"
        return sum(
            path.stat().st_size for path in self.path.rglob("*") if path.is_file() and scratch not in path.parents
        )

    def digest(self) -> str:
        """Of all that it holds, complete: sha256 over its plan and the record of every shard."""
        found = hashlib.sha256(self.plan.digest.encode())
        for number in range(len(self.plan.shards)):
            found.update(commit_path(self.path, number).read_bytes())
        return found.hexdigest()

    def info(self) -> dict[str, object]:
        """What `kdpipe cache info --json` prints. Raises LayoutError where a commit record is not of this plan."""
        plan = self.plan
        committed = {number: read_commit(self.path, plan, number) for number in self.committed()}
        return {
            "num_samples": plan.num_samples,
            "num_tokens": plan.num_tokens,
            "num_rows": plan.num_rows,
            "hidden_size": plan.head.hidden_size,
            "vocab_size": plan.head.vocab_size,
            **self._codec_info(committed),
            "dtype": plan.settings.dtype,
            "num_bytes": self.num_bytes(),
            "shards": len(plan.shards),
            "shards_committed": len(committed),
            "complete": len(committed) == len(plan.shards),
            "times_grown": plan.generation,
            "fingerprint": plan.fingerprint.overall(),
            "teacher": plan.head.architecture,
            **self._sidecar(),
            "engine": plan.engine.model_dump(),
            "settings": plan.settings.model_dump(),
            "heldout_fraction": plan.heldout_fraction,
            "num_heldout": int(self.heldout().sum()),
            "counts": plan.counts,
            "made_with": self._made_with(),
        }

    def _codec_info(self, committed: Mapping[int, Commit]) -> dict[str, object]:
        """Its codec, and of one that is fitted what rows take in these shards, and lose as it was measured."""
        choice = Choice.read(self.plan.settings.codec)
        if not choice.is_fitted:
            return {"codec": choice.name}
        record = open_fitted(self.path, self.plan).record
        return {
            "codec": choice.name,
            "codec_share": row_share(self.plan, committed) if committed else record.share,
            "codec_kl_mean": record.kl_mean,
            "codec_kl_p99": record.kl_p99,
            "codec_same_top": record.same_top,
            "codec_fit_rows": record.fit_rows,
            "codec_test_rows": record.test_rows,
        }

    def _sidecar(self) -> dict[str, object]:
        """What rows have that are no hidden states, and which losses they serve; nothing of a teacher's own."""
        sidecar, engine = self.plan.head.sidecar, self.plan.engine
        if sidecar is None:
            return {}
        told: dict[str, object] = {"rows_have": sidecar.has, "serves": sidecar.serves, "bias": sidecar.bias}
        if sidecar.kind == "topk":
            how = "imported" if engine.name == "import" else "derived"
            told["biased"] = f"{how}: {sidecar.has} alone"
        if (source := source_codec(self.plan)) is not None:
            told |= {"source_codec": source, "source_codec_kl_mean": loss_of(self.path, self.plan)}
        return told

    def _made_with(self) -> dict[str, object] | None:
        """The last extraction, as a hint: the cache may have moved, and its teacher and data too."""
        made = last_extraction(self.path)
        return None if made is None else {"command": shlex.join(made.argv), "folder": made.folder, **made.paths}


def teacher_files(folder: Path, *, but: str | None = None) -> dict[str, str]:
    """xxh3-128 of every file in a teacher/ folder but one, by its name there. Raises LayoutError for a link or pipe."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if not path.is_dir() and path.name != but:
            with open(open_regular(path), "rb") as file:
                found[path.relative_to(folder).as_posix()] = digest_stream(file)
    return found


def restore_teacher_files(plan: Plan, made: Path, cache: Path) -> None:
    """Put what teacher/ lacks in place, from a folder in which it was made again, on the same disk.

    Raises CorruptError where one does not come out as it was.
    """
    found = teacher_files(made)
    for name in lost_teacher_files(plan, cache):
        place = cache / "teacher" / name
        if found.get(name) != plan.teacher_files[name]:
            raise CorruptError(
                "it is lost, and made again it is another, with other threads or libraries perhaps; put it back from "
                "a copy, or make the cache again in another folder",
                where=place,
            )
        with open(made / name, "rb") as file:
            os.fsync(file.fileno())
        make_folder(place.parent)
        publish(made / name, place)


def lost_teacher_files(plan: Plan, cache: Path) -> list[str]:
    """Names of the teacher's files that a cache lacks."""
    return [name for name in plan.teacher_files if not os.path.lexists(cache / "teacher" / name)]


def _commit_numbers(cache: Path) -> list[int]:
    """Numbers of the shards that have a commit record, whatever the plan says."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        names = (name.partition(".") for name in os.listdir(cache / "commits"))
        return [int(stem) for stem, _, end in names if end == "json" and stem.isdecimal()]
    return []


def _select(rows: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """rows[positions], as a view where the positions are adjacent."""
    if len(positions) and positions[-1] - positions[0] + 1 == len(positions):
        return rows[positions[0] : positions[-1] + 1]
    return rows[positions]


def head_layout(dtype: str, shape: tuple[int, ...], *, has_bias: bool, digest: str) -> Layout:
    """The layout of teacher/head.safetensors: weight [V, E], then bias [V] where there is one."""
    bias = [("bias", TAGS[dtype], shape[:1])] if has_bias else []
    metadata = {"format": "kdpipe-head", "version": "1", "xxh3_128": digest}
    return lay_out([("weight", TAGS[dtype], shape), *bias], metadata)


def write_head(folder: Path, weight: np.ndarray, bias: np.ndarray | None, *, dtype: str) -> None:
    """Write head.safetensors into a folder that is not in place yet. weight [V, E] and bias [V] in `dtype`."""
    body = b"".join(array.tobytes() for array in (weight, bias) if array is not None)
    digest = xxhash.xxh3_128_hexdigest(body)
    layout = head_layout(dtype, weight.shape, has_bias=bias is not None, digest=digest)
    with open(folder / HEAD_FILE, "xb") as file:
        file.write(layout.header)
        file.write(body)
