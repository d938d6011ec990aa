"""Update: a trainer's tensors to the engine beside it, all or those that changed, and the engine's count of them.

    tensors -> cast as the engine computes -> digest -> changed? -> a bucket of shared memory -> Load -> receipts

Invariant: after an update the engine holds the trainer's tensors, name for name by their digests, or it is an error; an
engine that may hold anything else is `broken` until an update of all tensors has succeeded.
Cost: of each tensor one digest here; of each that is sent a copy, and a digest there. BUCKET_BYTES of shared memory, or
those of the largest tensor, for the time of the update.
"""

import os
import time
from collections.abc import Iterable, Iterator, Set
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import xxhash
from safetensors import safe_open

from kdpipe.manifests.errors import CheckFailed, SpaceError
from kdpipe.manifests.specs import Dtype
from kdpipe.stages.models.folder import ModelFolder
from kdpipe.stages.rows import TORCH_DTYPES
from kdpipe.stages.sglang.process import SglangProcess
from kdpipe.stages.sglang.sink import write_all
from kdpipe.stages.sglang.weights import Load, Place, digest_of

BUCKET_BYTES = 1 << 30
ALIGNMENT = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class UpdateReport:
    """What was sent, and how long the whole update took."""

    num_tensors: int
    num_bytes: int
    seconds: float


class Updates:
    """Keeps the weights of one engine in step with a trainer's.

    version: of the weights that the engine has; None for those of its folder
    broken: why it may hold something else; "" where it does not
    """

    def __init__(
        self,
        process: SglangProcess,
        *,
        dtype: Dtype,
        num_ranks: int,
        timeout_s: float,
    ) -> None:
        self._process, self._dtype, self._num_ranks = process, TORCH_DTYPES[dtype], num_ranks
        self._timeout_s = timeout_s
        self._held: dict[str, int] = {}
        self._shapes: dict[str, torch.Size] = {}
        self.version: int | None = None
        self.broken = ""

    def send(self, tensors: Iterable[tuple[str, torch.Tensor]], version: int, *, changed_only: bool) -> UpdateReport:
        """Make the engine's weights those of `version`.

        tensors: all of the model's by their names in a checkpoint, on any device; they are taken one by one
        changed_only: send those that the engine has not; all, where it has none of the trainer's yet, or is broken
        Raises CheckFailed where the engine does not hold these tensors afterwards, EngineError where it is gone,
        SpaceError where memory is short.
        """
        started = time.monotonic()
        self._process.start()
        held, self._held = self._held, {}
        self.broken = f"the update to version {version} was not finished"
        given: dict[str, int] = {}
        shapes: dict[str, torch.Size] = {}
        with _shared_memory() as memory:
            bucket = _Bucket(memory=memory, version=version, every=not (changed_only and held))
            for name, tensor in tensors:
                data = _as_bytes(tensor, self._dtype)
                digest = xxhash.xxh3_64_intdigest(data.numpy().data)
                if name in given:
                    raise CheckFailed(f"'{name}' is given twice", where=bucket.who)
                given[name], shapes[name] = digest, tensor.shape
                if self._shapes.get(name, tensor.shape) != tensor.shape:  # SGLang would stretch it, or fill it up
                    was, found = list(self._shapes[name]), list(tensor.shape)
                    raise CheckFailed(f"'{name}' has the shape {found}, the version before {was}", where=bucket.who)
                if bucket.every or held.get(name) != digest:
                    if bucket.places and bucket.num_bytes + len(data) > BUCKET_BYTES:
                        self._load(bucket)
                    bucket.add(name, tensor, self._dtype, data, digest)
            if self._shapes and given.keys() != self._shapes.keys():
                raise CheckFailed(_difference(given.keys(), self._shapes.keys()), where=bucket.who)
            self._load(bucket, all_given=given)
        self._held, self._shapes, self.version, self.broken = given, shapes, version, ""
        return UpdateReport(
            num_tensors=bucket.sent_tensors, num_bytes=bucket.sent_bytes, seconds=time.monotonic() - started
        )

    def _load(self, bucket: "_Bucket", all_given: dict[str, int] | None = None) -> None:
        """Have the engine load the bucket and empty it; all_given: what it then holds, of the last bucket."""
        message = Load(
            number=self._process.next_number(),
            path=f"/proc/{os.getpid()}/fd/{bucket.memory}",
            places=tuple(bucket.places),
            folder=str(self._process.folder),
            num_ranks=self._num_ranks,
            version=bucket.version,
            every=bucket.every,
            first=bucket.is_first,
            last=all_given is not None,
        )
        (loaded,) = self._process.exchange([message], self._timeout_s, bucket.who)
        for receipt in loaded.receipts:
            if receipt.problem:
                raise CheckFailed(f"rank {receipt.rank} of the engine: {receipt.problem}", where=bucket.who)
            if all_given is not None and receipt.digest != digest_of(all_given):
                raise CheckFailed(
                    f"rank {receipt.rank} of the engine holds {receipt.num_tensors} tensors, the trainer gave "
                    f"{len(all_given)}, and their digests differ; tensors were lost on the way",
                    where=bucket.who,
                )
        bucket.clear()


def stored_tensors(folder: ModelFolder) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a model folder, one by one, as `Updates.send` takes them."""
    for name, file in folder.weights.items():
        with safe_open(file, "pt") as opened:
            yield name, opened.get_tensor(name)


@dataclass(kw_only=True, slots=True, eq=False)
class _Bucket:
    """Tensors that go to the engine together, one after the other in shared memory."""

    memory: int
    version: int
    every: bool
    places: list[Place] = field(default_factory=list)
    num_bytes: int = 0
    is_first: bool = True
    sent_tensors: int = 0
    sent_bytes: int = 0

    @property
    def who(self) -> str:
        return f"version {self.version} of the weights"

    def add(self, name: str, tensor: torch.Tensor, dtype: torch.dtype, data: torch.Tensor, digest: int) -> None:
        kept = dtype if tensor.is_floating_point() else tensor.dtype
        place = Place(
            name=name,
            dtype=str(kept).removeprefix("torch."),
            shape=tuple(tensor.shape),
            offset=self.num_bytes,
            num_bytes=len(data),
            digest=digest,
        )
        try:
            write_all(self.memory, data.numpy().data, place.offset)
        except OSError as err:
            raise SpaceError(f"'{name}' finds no room in shared memory: {err.strerror}", where=self.who) from None
        self.places.append(place)
        self.num_bytes = place.offset + -(-len(data) // ALIGNMENT) * ALIGNMENT
        self.sent_tensors += 1
        self.sent_bytes += len(data)

    def clear(self) -> None:
        self.places, self.num_bytes, self.is_first = [], 0, False


@contextmanager
def _shared_memory() -> Iterator[int]:
    """A file that lies in memory, has no name and goes with its last user; its descriptor."""
    descriptor = os.memfd_create("kdpipe-weights", os.MFD_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _as_bytes(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """uint8 [num_bytes] of a tensor as the engine computes with it."""
    cast = tensor.detach().to("cpu", dtype if tensor.is_floating_point() else tensor.dtype)
    return cast.contiguous().reshape(-1).view(torch.uint8)


def _difference(given: Set[str], known: Set[str]) -> str:
    sides = {"are missing": sorted(known - given), "are new": sorted(given - known)}
    parts = [f"{len(names)} tensors {what}, first {names[0]}" for what, names in sides.items() if names]
    return f"{' and '.join(parts)}; the version before had {len(known)}"
