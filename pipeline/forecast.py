"""Forecast: what a cache will cost and from how many students on it pays.

Costs are counted in passes: a teacher forward is 2*P floating-point operations a token (P parameters), a student's
step 6*P: forward, backward, and the gradients of the weights. Without a cache the teacher runs in every epoch of
every student; with one it runs once. Disk time is not counted: rows are written while the teacher works and read ahead
while the student does, so it only shows where the disk is slower than that.
"""

import json
import math
import struct
from fractions import Fraction
from pathlib import Path

from kdpipe.manifests.errors import StudentError
from kdpipe.pipeline.room import room_at

FLEET = (1, 2, 4, 8, 16)
"""Numbers of students whose cost is compared."""


def break_even_students(epochs: float) -> int:
    """Smallest number of students that together run the teacher more than once without a cache.

    One epoch: 2. Two epochs or more: 1, its second epoch is already saved. Half an epoch: 3.
    """
    return math.floor(1 / Fraction(str(epochs))) + 1


def live_over_cached(students: int, epochs: float, *, teacher_params: int, student_params: int) -> float:
    """Operations of training `students` with a live teacher over those with a cache: above 1 the cache is cheaper."""
    teacher, student = forward_flops(teacher_params, 1), step_flops(student_params, 1)
    passes = students * epochs
    return passes * (teacher + student) / (teacher + passes * student)


def forward_flops(params: int, num_tokens: int) -> int:
    """Floating-point operations of a forward pass."""
    return 2 * params * num_tokens


def step_flops(params: int, num_tokens: int) -> int:
    """Floating-point operations of a training step: forward, backward, gradients of the weights."""
    return 6 * params * num_tokens


def compare(epochs: float, *, teacher_params: int, student_params: int) -> dict[str, float]:
    """live_over_cached for a few numbers of students, keyed by that number as JSON wants it."""
    sizes = {"teacher_params": teacher_params, "student_params": student_params}
    return {f"{count}": live_over_cached(count, epochs, **sizes) for count in FLEET}


def free_bytes(folder: Path) -> int:
    """Room where `folder` is, or will be: on its disk, and of a quota."""
    return room_at(folder).most_bytes


def count_parameters(folder: Path) -> int:
    """Parameters of a model from the headers of its safetensors files alone. Raises StudentError without any."""
    return sum(map(_file_parameters, _weight_files(folder)))


def weight_bytes(folder: Path) -> int:
    """Bytes of a model's safetensors files. Raises StudentError without any."""
    return sum(path.stat().st_size for path in _weight_files(folder))


def _weight_files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise StudentError("this is not a folder" if folder.exists() else "no such folder", where=folder)
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise StudentError("no *.safetensors files to count the student's parameters in", where=folder)
    return files


def _file_parameters(path: Path) -> int:
    try:
        with open(path, "rb") as file:
            header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
        return sum(math.prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")
    except (struct.error, ValueError, KeyError, TypeError, AttributeError, OverflowError, MemoryError):
        raise StudentError("not a safetensors file: its header cannot be read", where=path) from None
