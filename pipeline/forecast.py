"""Forecast: what a cache will cost and from how many students on it pays.

Costs are counted in passes: a teacher forward is 2*P floating-point operations a token (P parameters), a student's
step 6*P: forward, backward, and the gradients of the weights; frozen ones have no gradient. Without a cache the teacher
runs in every epoch of every student; with one it runs once. Disk time is not counted: rows are written while the
teacher works and read ahead while the student does, so it only shows where the disk is slower than that.
"""

import json
import math
import re
import struct
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

from kdpipe.manifests.adapter import ADAPTER_WEIGHTS, base_of, is_adapter
from kdpipe.manifests.errors import StudentError
from kdpipe.manifests.specs import RunFile, StudentSpec
from kdpipe.manifests.specs.student import ALL_LINEAR
from kdpipe.pipeline.room import room_at

FLEET = (1, 2, 4, 8, 16)
"""Numbers of students whose cost is compared."""
ADAPTER_BYTES = 4
"""Of a number of an adapter that is written."""
NF4_BYTES = 0.516
"""Of a weight in nf4 with its scales quantised too: 4 bits, and 8 bits for 64 of them, and 32 bits for 256 of those."""
HEAD = ("lm_head", "embed_out")
NOT_LINEAR = re.compile(r"embed|\bw[tp]e\b|lm_head|\.experts\.|norm")
"""In the names of matrices that are no linear layer's: embeddings, the head, the experts of a mixture."""


def break_even_students(passes: Fraction) -> int:
    """Smallest number of students that together run the teacher more than once without a cache.

    passes: of the teacher over the cache's tokens, in the training of one. 1: 2 students. 2 or more: 1, its second
    epoch is already saved. 1/2: 3.
    """
    return math.floor(1 / passes) + 1


def forward_flops(params: int, num_tokens: int) -> int:
    """Floating-point operations of a forward pass."""
    return 2 * params * num_tokens


def step_flops(params: int, num_tokens: int, trained: int | None = None) -> int:
    """Floating-point operations of a training step: forward, backward, gradients of the weights.

    trained: how many of the parameters are; all when not given
    """
    return (4 * params + 2 * (params if trained is None else trained)) * num_tokens


def free_bytes(folder: Path) -> int:
    """Room where `folder` is, or will be: on its disk, and of a quota."""
    return room_at(folder).most_bytes


def count_parameters(folder: Path) -> int:
    """Parameters of a model from the headers of its safetensors files alone. Raises StudentError without any."""
    return sum(math.prod(shape) for _, shape in _shapes(folder))


def count_trained(folder: Path, spec: StudentSpec) -> int:
    """How many numbers of a student are trained: its parameters, or those of its adapters.

    A new adapter of rank r has r*(in + out) for each layer [out, in]; which layers are linear is told by their names.
    """
    if is_adapter(folder) and not spec.lora_rank:
        return sum(math.prod(shape) for name, shape in _header(folder / ADAPTER_WEIGHTS) if ".lora_" in name)
    if not spec.lora_rank:
        return count_parameters(folder)
    return sum(spec.lora_rank * sum(shape) for name, shape in _shapes(folder) if _is_target(name, shape, spec))


def frozen_bytes(folder: Path, spec: StudentSpec) -> int:
    """Bytes of the weights that lie frozen under adapters, as they are stored or in 4 bits; 0 where all are trained."""
    if not spec.lora_rank and not is_adapter(folder):
        return 0
    if not spec.lora_base_bits:
        return weight_bytes(folder)
    linear = sum(math.prod(shape) for name, shape in _shapes(folder) if _is_linear(name, shape))
    params = count_parameters(folder)
    return round(weight_bytes(folder) * (params - linear) / params + NF4_BYTES * linear)


def exported_bytes(run: RunFile) -> int:
    """Of the student that a run writes."""
    folder = run.student.path
    assert folder is not None, "whoever plans has asked for it"
    if run.train.export != "merged" and (run.student.lora_rank or is_adapter(folder)):
        return ADAPTER_BYTES * count_trained(folder, run.student)
    return weight_bytes(folder)


def weight_bytes(folder: Path) -> int:
    """Bytes of a model's safetensors files. Raises StudentError without any."""
    return sum(path.stat().st_size for path in _weight_files(folder))


def _is_linear(name: str, shape: Sequence[int]) -> bool:
    return len(shape) == 2 and name.endswith(".weight") and not NOT_LINEAR.search(name)


def _is_target(name: str, shape: Sequence[int], spec: StudentSpec) -> bool:
    layer = name.removesuffix(".weight")
    if layer.endswith(HEAD):
        return spec.lora_head
    wanted = spec.lora_targets
    return _is_linear(name, shape) and (
        ALL_LINEAR in wanted or any(f".{layer}".endswith(f".{each}") for each in wanted)
    )


def _shapes(folder: Path) -> list[tuple[str, list[int]]]:
    """Names and shapes of a model's weights; of an adapter's base."""
    return [entry for path in _weight_files(folder) for entry in _header(path)]


def _weight_files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise StudentError("this is not a folder" if folder.exists() else "no such folder", where=folder)
    folder = base_of(folder)
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise StudentError("no *.safetensors files to count the student's parameters in", where=folder)
    return files


def _header(path: Path) -> list[tuple[str, list[int]]]:
    try:
        with open(path, "rb") as file:
            header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
        found = [(name, entry["shape"]) for name, entry in header.items() if name != "__metadata__"]
        math.prod(size for _, shape in found for size in shape)
        return found
    except (struct.error, ValueError, KeyError, TypeError, AttributeError, OverflowError, MemoryError):
        raise StudentError("not a safetensors file: its header cannot be read", where=path) from None
