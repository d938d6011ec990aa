"""When a cache pays, and what it takes to know."""

import json
import struct
from fractions import Fraction
from pathlib import Path

import pytest

from kdpipe.manifests.errors import StudentError
from kdpipe.pipeline.forecast import break_even_students, count_parameters, weight_bytes


@pytest.mark.parametrize("passes", map(Fraction, ["0.1", "0.3", "0.5", "0.7", "1", "1.5", "2", "3"]))
def test_break_even_is_the_first_number_of_students_that_cost_more_than_one_teacher_pass(passes: Fraction) -> None:
    students = break_even_students(passes)
    assert students >= 1
    assert students * passes > 1
    assert (students - 1) * passes <= 1


def safetensors(path: Path, header: bytes) -> None:
    path.write_bytes(struct.pack("<Q", len(header)) + header)


def test_parameters_are_counted_from_headers_alone(tmp_path: Path) -> None:
    def tensor(*shape: int) -> dict[str, object]:
        return {"dtype": "BF16", "shape": shape, "data_offsets": [0, 0]}

    safetensors(tmp_path / "a.safetensors", json.dumps({"__metadata__": {}, "w": tensor(3, 5)}).encode())
    safetensors(tmp_path / "b.safetensors", json.dumps({"b": tensor(7), "scalar": tensor()}).encode())
    assert count_parameters(tmp_path) == 3 * 5 + 7 + 1
    assert weight_bytes(tmp_path) == sum(path.stat().st_size for path in tmp_path.iterdir())


@pytest.mark.parametrize("data", [b"", b"\xff" * 9, struct.pack("<Q", 2) + b"[]", struct.pack("<Q", 9) + b'{"w": {}}'])
def test_a_broken_weight_file_is_named(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(data)
    with pytest.raises(StudentError, match=r"model\.safetensors"):
        count_parameters(tmp_path)


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StudentError, match=r"no \*\.safetensors"):
        count_parameters(tmp_path)


def test_a_student_that_is_not_there_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(StudentError, match="no such folder"):
        count_parameters(tmp_path / "none")
