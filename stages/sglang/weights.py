"""Weights: a trainer's tensors into the schedulers of an engine, through shared memory, both sides counting.

    update.py (the trainer)     tensors -> a memfd, the digest of each         \\
    Load (the host)             SGLang's own update call carries where they lie  > a bucket at a time
    load (each scheduler)       mapped, digests compared -> model.load_weights   /
                                a receipt: what it holds now, or what is wrong

No tensor is pickled. `load` is SGLang's `custom_weight_loader`: whatever it raised would end the scheduler, so all of
it goes into the receipt, and an update without a receipt of every rank is one that failed.
Invariant: a receipt counts digests of bytes that this scheduler read itself. An update of all tensors first makes every
parameter NaN and looks for NaN at its end: what SGLang drops without a word (a name that it does not know) is found,
and an engine between two versions cannot answer with numbers.
Cost: of an update of all tensors two passes over the parameters; else one over the tensors that are sent.
"""

import json
import mmap
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash

LOADER = "kdpipe.stages.sglang.weights.load"
"""What an engine that takes updates is started with, as `custom_weight_loader`."""
POISONED = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """A tensor in the shared memory: xxh3-64 of its bytes, and where they begin."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    num_bytes: int
    digest: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Receipt:
    """What a scheduler holds after a bucket.

    rank: of the scheduler in its tensor-parallel group
    num_tensors, digest: of all it was ever given, as `digest_of` has them
    problem: what was wrong, "" where nothing was
    """

    rank: int
    num_tensors: int
    digest: int
    problem: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Loaded:
    """The receipts of all ranks."""

    number: int
    receipts: tuple[Receipt, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Load:
    """A bucket of tensors for the engine; a Message of the host.

    path: of the shared memory that holds them
    folder: where receipts go
    version: of the weights, once the last bucket is in
    every: the update has all tensors, not those alone that changed
    """

    number: int
    path: str
    places: tuple[Place, ...]
    folder: str
    num_ranks: int
    version: int
    every: bool
    first: bool
    last: bool

    @property
    def who(self) -> str:
        return f"version {self.version} of the weights"

    async def ask(self, engine: Any) -> Loaded:
        """Into every scheduler of a sglang.Engine. Raises RuntimeError for what SGLang refuses."""
        from sglang.srt.managers import io_struct
        from sglang.srt.utils import MultiprocessingSerializer

        manager = engine.tokenizer_manager
        if self.first:
            begun, _ = await manager.begin_weight_update(io_struct.BeginWeightUpdateReqInput(selector="target"))
            if not begun:  # the update before was given up
                _require(await manager.end_weight_update(io_struct.EndWeightUpdateReqInput()))
                _require(await manager.begin_weight_update(io_struct.BeginWeightUpdateReqInput(selector="target")))
        note = torch.frombuffer(bytearray(json.dumps(asdict(self)).encode()), dtype=torch.uint8)
        request = io_struct.UpdateWeightsFromTensorReqInput(
            serialized_named_tensors=[
                MultiprocessingSerializer.serialize([("kdpipe", note)]) for _ in range(self.num_ranks)
            ],
            load_format=LOADER,
            selector="target",
            flush_cache=self.last,  # what was computed with the old weights
        )
        _require(await manager.update_weights_from_tensor(request))
        receipts = tuple(_take_receipt(Path(self.folder), rank) for rank in range(self.num_ranks))
        if self.last and not any(receipt.problem for receipt in receipts):
            _require(await manager.end_weight_update(io_struct.EndWeightUpdateReqInput()))
            # Every answer bears it from here on.
            await manager.update_weight_version(
                io_struct.UpdateWeightVersionReqInput(new_version=str(self.version), abort_all_requests=False)
            )
        return Loaded(number=self.number, receipts=receipts)


def digest_of(digests: Mapping[str, int]) -> int:
    """xxh3-64 over the names and digests of tensors, whatever their order."""
    return xxhash.xxh3_64_intdigest(json.dumps(sorted(digests.items())).encode())


def _require(answer: tuple[bool, str]) -> None:
    """SGLang returns its refusals."""
    success, message = answer
    if not success:
        raise RuntimeError(f"SGLang refused the update: {message}")


def _receipt_path(folder: Path, rank: int) -> Path:
    return folder / f"weights-{rank}"


def _take_receipt(folder: Path, rank: int) -> Receipt:
    path = _receipt_path(folder, rank)
    if not path.exists():
        raise RuntimeError(f"no receipt of rank {rank}")
    receipt = Receipt(**json.loads(path.read_text()))
    path.unlink()
    return receipt


# What follows runs in the schedulers.

_held: dict[str, int] = {}
"""Digests of the tensors that this scheduler has loaded, by name."""


def load(model: Any, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """SGLang's custom_weight_loader: the one tensor that comes is a note of where the others lie."""
    from sglang.srt.runtime_context import get_parallel

    ((_, note),) = named_tensors
    asked: dict[str, Any] = json.loads(note.cpu().numpy().tobytes())
    rank = int(get_parallel().tp_rank)
    try:
        problem = _load(model, asked)
    except Exception as err:  # a tensor that does not fit, memory that is gone: the trainer's to judge
        problem = f"{type(err).__name__}: {err}"
    receipt = Receipt(rank=rank, num_tensors=len(_held), digest=digest_of(_held), problem=problem)
    path = _receipt_path(Path(asked["folder"]), rank)
    path.with_suffix(".part").write_text(json.dumps(asdict(receipt)))
    os.replace(path.with_suffix(".part"), path)


def _load(model: Any, asked: Mapping[str, Any]) -> str:
    """Check and load a bucket; what is wrong with it."""
    if asked["every"] and asked["first"]:
        _held.clear()
        for parameter in model.parameters():
            if parameter.dtype in POISONED:
                parameter.data.fill_(torch.nan)
    places = [Place(**place | {"shape": tuple(place["shape"])}) for place in asked["places"]]
    data = _mapped(asked["path"]) if places else torch.empty(0)
    tensors = []
    for place in places:
        _held.pop(place.name, None)
        part = data[place.offset : place.offset + place.num_bytes]
        found = xxhash.xxh3_64_intdigest(part.numpy().data)
        if found != place.digest:
            return f"{place.name} has the digest {found:016x} in shared memory, the trainer wrote {place.digest:016x}"
        tensors.append((place.name, part.view(getattr(torch, place.dtype)).view(place.shape)))
    model.load_weights(iter(tensors))
    _held.update({place.name: place.digest for place in places})
    if asked["every"] and asked["last"]:
        return _unwritten(model)
    return ""


def _mapped(path: str) -> torch.Tensor:
    """uint8, all of a file; whoever writes to it changes a copy. torch.from_file writes into files that are short."""
    with open(path, "rb") as file:
        return torch.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY), dtype=torch.uint8)


def _unwritten(model: Any) -> str:
    missing = [
        name
        for name, parameter in model.named_parameters()
        if parameter.dtype in POISONED and bool(parameter.isnan().any())
    ]
    if not missing:
        return ""
    return f"{len(missing)} parameters are not numbers after an update of all tensors, {missing[0]} is the first"
