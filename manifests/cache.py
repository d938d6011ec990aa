"""Cache: a teacher's rows for every supervised token, read without a copy, a GPU or torch.

    cache = Cache.open(path); len(cache); cache[i] -> SampleView(token_ids, supervised, rows)

Invariant: only committed shards are read, and no byte of theirs is used before its block's checksum agreed.
Cost: one open mapping a shard, kept for the life of the object. Format: FORMAT.md.
"""

# Shapes: N samples, n tokens and R rows of one sample, E teacher width, V rows of the teacher's head.

import hashlib
import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash

from kdpipe.manifests.durable import write_once
from kdpipe.manifests.errors import CorruptError, IncompleteError, LayoutError
from kdpipe.manifests.plan import PLAN_FILE, SAMPLES_FILE, Plan, Samples, read_plan
from kdpipe.manifests.sample import is_heldout, row_positions
from kdpipe.manifests.shard import Shard, commit_path, shard_path
from kdpipe.manifests.tensorfile import TAGS, lay_out, parse

HEAD_FILE = "head.safetensors"


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class SampleView:
    """One sample of a cache: views into the mapping.

    token_ids: int32 [n]
    supervised: bool [n]
    rows: [R, E]; row j belongs to the j-th t with supervised[t+1]. A zero-copy view, bfloat16 through ml_dtypes; a copy
        only where the cache keeps every row and the supervised ones are not adjacent.
    """

    token_ids: np.ndarray
    supervised: np.ndarray
    rows: np.ndarray


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class HeadArrays:
    """The teacher's lm_head: weight [V, E], bias [V] or None; V counts padded rows too."""

    weight: np.ndarray
    bias: np.ndarray | None


class Cache:
    """A cache folder, open for reading; it may still be growing, then `complete` is False."""

    def __init__(self, path: Path, plan: Plan) -> None:
        self.path, self.plan = path, plan
        self.plan_digest = plan.digest()
        self.samples = Samples(path, plan)
        self._first = np.array([shard.first_sample for shard in plan.shards], dtype=np.int64)
        self._shards: dict[int, Shard] = {}

    @classmethod
    def open(cls, path: str | Path) -> "Cache":
        """Open the cache at `path`. Raises CacheError where there is none, LayoutError where it is not readable."""
        return cls(Path(path), read_plan(Path(path)))

    def __len__(self) -> int:
        return self.plan.num_samples

    def __getitem__(self, index: int) -> SampleView:
        if not -len(self) <= index < len(self):
            raise IndexError(f"sample {index} of a cache of {len(self)}")
        shard, within = self._locate(index % len(self))
        sample = shard.sample(within)
        rows = sample.rows
        if self.plan.settings.rows == "all":
            rows = rows[row_positions(sample.supervised)]
        return SampleView(token_ids=sample.token_ids, supervised=sample.supervised, rows=rows)

    def __iter__(self) -> Iterator[SampleView]:
        return (self[index] for index in range(len(self)))

    def prefetch(self, index: int) -> None:
        """Ask the kernel to read a sample's rows ahead of `cache[index]`."""
        shard, within = self._locate(index)
        shard.prefetch(within)

    def _locate(self, index: int) -> tuple[Shard, int]:
        number = int(np.searchsorted(self._first, index, side="right")) - 1
        return self.shard(number), index - int(self._first[number])

    def shard(self, number: int) -> Shard:
        """A committed shard, mapped once. Raises IncompleteError if it is not committed yet."""
        if number not in self._shards:
            self._shards[number] = Shard(self.path, self.plan, self.plan_digest, number)
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
                f"{done} of {len(self.plan.shards)} shards are extracted; run the same kdpipe extract again",
                where=self.path,
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
        """The teacher's lm_head, mapped. Raises CorruptError where the file is damaged."""
        path = self.teacher_folder / HEAD_FILE
        try:
            with open(path, "rb") as file:
                mapping = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ)
        except (FileNotFoundError, ValueError):
            raise IncompleteError(
                "the teacher's head is missing; run the same kdpipe extract again", where=path
            ) from None
        layout, metadata = parse(memoryview(mapping), path)
        buffer = np.frombuffer(mapping, np.uint8)
        digest = xxhash.xxh3_128_hexdigest(buffer[layout.body :].data)
        if digest != metadata.get("xxh3_128"):
            raise CorruptError(f"xxh3-128 {digest}, its header says {metadata.get('xxh3_128')}", where=path)
        arrays = {name: tensor.view(buffer) for name, tensor in layout.tensors.items()}
        record = self.plan.head
        if "weight" not in arrays or arrays["weight"].shape != (record.head_rows, record.hidden_size):
            raise LayoutError(f"no weight of {record.head_rows} x {record.hidden_size}", where=path)
        return HeadArrays(weight=arrays["weight"], bias=arrays.get("bias"))

    def num_bytes(self) -> int:
        """Bytes of the files in the cache."""
        return sum(path.stat().st_size for path in self.path.rglob("*") if path.is_file())

    def info(self) -> dict[str, object]:
        """What `kdpipe cache info --json` prints."""
        plan = self.plan
        return {
            "num_samples": plan.num_samples,
            "num_tokens": plan.num_tokens,
            "num_rows": plan.num_rows,
            "hidden_size": plan.head.hidden_size,
            "vocab_size": plan.head.vocab_size,
            "codec": plan.settings.codec,
            "dtype": plan.settings.dtype,
            "num_bytes": self.num_bytes(),
            "shards": len(plan.shards),
            "shards_committed": len(self.committed()),
            "complete": self.complete,
            "fingerprint": plan.fingerprint.overall(),
            "teacher": plan.head.architecture,
            "engine": plan.engine.model_dump(),
            "settings": plan.settings.model_dump(),
            "heldout_fraction": plan.heldout_fraction,
            "num_heldout": int(self.heldout().sum()),
            "counts": plan.counts,
        }

    def verify(self) -> Iterator[int]:
        """Check every committed byte; yields the number of each shard found good.

        Raises CorruptError or LayoutError at the first damage, IncompleteError at the end if shards are missing.
        """
        with open(self.path / SAMPLES_FILE, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != self.plan.samples_digest:
            raise CorruptError(
                f"sha256 {digest}, {PLAN_FILE} says {self.plan.samples_digest}",
                where=self.path / SAMPLES_FILE,
            )
        self.head()
        for number in range(len(self.plan.shards)):
            if commit_path(self.path, number).exists():
                self.shard(number).verify(self.samples.shard(number))
                yield number
            elif shard_path(self.path, number).exists():
                continue  # linked, not committed: a writer is at work or was killed; extract settles it
        self.require_complete()


def write_head(folder: Path, weight: np.ndarray, bias: np.ndarray | None, *, dtype: str, scratch_folder: Path) -> None:
    """Write teacher/head.safetensors durably unless it is there. weight [V, E] and bias [V] in `dtype`."""
    arrays = {"weight": weight} | ({"bias": bias} if bias is not None else {})
    body = b"".join(np.ascontiguousarray(array).view(np.uint8).tobytes() for array in arrays.values())
    layout = lay_out(
        [(name, TAGS[dtype], array.shape) for name, array in arrays.items()],
        {"format": "kdpipe-head", "version": "1", "xxh3_128": xxhash.xxh3_128_hexdigest(body)},
    )
    write_once(folder / HEAD_FILE, layout.header + body, scratch_folder=scratch_folder)
