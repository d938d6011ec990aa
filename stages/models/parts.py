"""Parts: a model's tensors read from its files a range at a time, so that no process ever has to hold all of one.

    skeleton (meta) -> files_of: each tensor has its bytes in one file? -> make_buffers -> Stored.read, range by range

Invariant: what is read is, bit for bit, what from_pretrained loads in the skeleton's dtype. A folder of which that
cannot be promised (quantised, or one whose weights transformers puts together while it loads) is WholeOnlyError.
Cost: BLOCK_BYTES beside the tensor that is filled. Nothing is mapped: no page of a file counts as the process's own.
"""

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from kdpipe.manifests.errors import is_of_others

BLOCK_BYTES = 1 << 17
"""Of a file that are in memory at a time while they are cast: of blocks of some MiB malloc keeps the holes."""
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class WholeOnlyError(Exception):
    """The model can only be loaded whole; the text says why."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Stored:
    """A tensor in a safetensors file, its first byte at `begin`."""

    file: Path
    begin: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    def read(self, out: torch.Tensor, first: int = 0) -> None:
        """Fill `out` with the elements from `first` on, in row-major order, cast to its dtype. Raises OSError."""
        flat, size = out.view(-1), self.dtype.itemsize
        block = torch.empty(min(BLOCK_BYTES, len(flat) * size), dtype=torch.uint8)
        with open(self.file, "rb", buffering=0) as file:
            for part in flat.split(BLOCK_BYTES // size):
                wanted = block[: len(part) * size]
                _read_exactly(file.fileno(), wanted, self.begin + first * size, self.file)
                part.copy_(wanted.view(self.dtype))
                first += len(part)


@dataclass(frozen=True, slots=True, eq=False)
class Value:
    """A tensor that is in memory already."""

    tensor: torch.Tensor

    def read(self, out: torch.Tensor, first: int = 0) -> None:
        """As Stored.read."""
        out.view(-1).copy_(self.tensor.view(-1)[first : first + out.numel()])


Readable = Stored | Value


def files_of(model: PreTrainedModel, weights: Mapping[str, Path]) -> dict[str, Stored]:
    """Where each tensor of a skeleton's state lies, by the model's own names; weights: tensor name -> its file.

    What the files have beyond the model counts for nothing: ModelFolder.examine says whether it may.
    Raises WholeOnlyError.
    """
    if getattr(model.config, "quantization_config", None) is not None:
        raise WholeOnlyError("its weights are quantised")
    if model._get_dtype_plan(model.dtype):
        raise WholeOnlyError(f"some of its weights stay in float32 beside {model.dtype}")
    if tensors_aside(model):
        raise WholeOnlyError("it has tensors that are neither parameters nor buffers")
    state = model.state_dict(keep_vars=True)
    found: dict[int, Stored] = {}  # by id of a tensor: tied ones have several names
    stored = {name: each for file in sorted(set(weights.values())) for name, each in _stored_in(file).items()}
    for name, place in _by_own_names(model, stored).items():
        if id(state[name]) in found:
            raise WholeOnlyError(f"'{name}' is tied by its config and has weights of its own in the files")
        if state[name].shape != place.shape:
            raise WholeOnlyError(
                f"'{name}' has the shape {list(place.shape)} in the files, {list(state[name].shape)} here"
            )
        found[id(state[name])] = place
    for name, tensor in state.items():
        if id(tensor) not in found:
            raise WholeOnlyError(f"'{name}' is not in the files, and transformers makes it")
    return {name: found[id(tensor)] for name, tensor in state.items()}


def tensors_aside(skeleton: nn.Module) -> bool:
    """Whether a skeleton has tensors that are neither parameters nor buffers: nobody can give them a value by name."""
    values = (value for module in skeleton.modules() for value in vars(module).values())
    return any(isinstance(value, torch.Tensor) and value.is_meta for value in values)


def replace_tensors(model: nn.Module, new: Callable[[str, torch.Tensor], torch.Tensor]) -> None:
    """Put new(name, tensor) in the place of every parameter and buffer; what was one tensor stays one."""
    made: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # by id of the old one, which is kept alive with it
    for prefix, module in model.named_modules():
        tables: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for table in tables:
            for name, tensor in table.items():
                if tensor is None:
                    continue
                if id(tensor) not in made:
                    made[id(tensor)] = tensor, new(f"{prefix}.{name}" if prefix else name, tensor)
                table[name] = made[id(tensor)][1]


def make_buffers(model: PreTrainedModel) -> None:
    """Give a skeleton the values of its buffers that no file holds, as from_pretrained does: by the model's own code.

    Its parameters are still on the meta device, where setting their first values does nothing.
    Raises WholeOnlyError where that code needs them.
    """
    buffers = dict(model.named_buffers())
    replace_tensors(model, lambda name, old: torch.empty_like(old, device="cpu") if name in buffers else old)
    try:
        model.initialize_weights()
    except Exception as err:
        # Any model's code, which may raise anything.
        if is_of_others(err):
            raise
        raise WholeOnlyError(f"its buffers need its weights ({type(err).__name__})") from err


def _by_own_names(model: PreTrainedModel, stored: Mapping[str, Stored]) -> dict[str, Stored]:
    """What the files hold by the names the model has for it, which transformers may rename."""
    transforms = get_model_conversion_mapping(model)
    renamings = [each for each in transforms if isinstance(each, WeightRenaming)]
    converters = [each for each in transforms if isinstance(each, WeightConverter)]
    state, prefix, found = model.state_dict(), model.base_model_prefix, {}
    for name, place in stored.items():
        own, converted = rename_source_key(name, renamings, converters, prefix, state)
        if own not in state and name in state:
            own, converted = name, None
        if converted is not None:
            raise WholeOnlyError(f"transformers converts its weights while it loads them ('{name}')")
        if own in state:
            found[own] = place
    # What save_pretrained undoes, as from_pretrained leaves it.
    model._weight_conversions = [each for each in transforms if each.was_used()]
    return found


def _stored_in(file: Path) -> dict[str, Stored]:
    """The tensors of a safetensors file, which was found whole."""
    with open(file, "rb") as opened:
        body = 8 + int.from_bytes(opened.read(8), "little")
        entries = json.loads(opened.read(body - 8))
    entries.pop("__metadata__", None)
    found = {}
    for name, entry in entries.items():
        if entry["dtype"] not in DTYPES:
            raise WholeOnlyError(f"'{name}' holds {entry['dtype']}")
        begin, shape = body + entry["data_offsets"][0], tuple(entry["shape"])
        found[name] = Stored(file=file, begin=begin, dtype=DTYPES[entry["dtype"]], shape=shape)
    return found


def _read_exactly(descriptor: int, out: torch.Tensor, at: int, where: Path) -> None:
    """Fill the bytes of `out` from byte `at` of a file. Raises OSError for one that ends before."""
    view = out.numpy().data
    while view:
        got = os.preadv(descriptor, [view], at)
        if not got:
            raise OSError(f"{where.name} ends before its header says")
        view, at = view[got:], at + got
