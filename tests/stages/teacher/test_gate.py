"""Every way an engine has been seen to lie, done to the rows of a true one, and that the gate says no."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.models import make_model
from tests.opened import teacher_in
from tests.stages.teacher.make_requests import make_request

from kdpipe.manifests.errors import GateError, TeacherError
from kdpipe.stages.models.head import Head
from kdpipe.stages.rows import checksum
from kdpipe.stages.teacher.describe import describe_teacher
from kdpipe.stages.teacher.engine import Ack, Request
from kdpipe.stages.teacher.gate import (
    check_ack,
    check_finite,
    check_identity,
    choose_probes,
    choose_scored,
    is_probed_inside,
    rounding,
)
from kdpipe.stages.teacher.head import read_head
from kdpipe.stages.teacher.transformers_engine import TransformersEngine

DTYPES = ("float32", "bfloat16")
Answer = tuple[list[Request], list[Ack], Head]


@pytest.fixture(scope="module", params=DTYPES)
def make_answer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Answer]:
    """A fresh true answer to three requests each time, in each dtype."""
    dtype = request.param
    folder: Path = make_model("qwen3", tmp_path_factory.mktemp("gate"))
    head = read_head(describe_teacher(teacher_in(folder), dtype))
    engine = TransformersEngine(teacher_in(folder), dtype=dtype, device="cpu")

    def make() -> Answer:
        requests = [make_request(sample, 33, dtype=dtype, every=True) for sample in range(3)]
        return requests, list(engine.run([requests])), head

    return make


def resealed(request: Request, ack: Ack) -> Ack:
    """The ack of an engine that believes in what it wrote."""
    return replace(ack, checksum=checksum(request.target.array))


def test_true_rows_pass(make_answer: Callable[[], Answer]) -> None:
    requests, acks, head = make_answer()
    for request, ack in zip(requests, acks, strict=True):
        check_ack(request, ack)
        check_finite(request)
    assert check_identity(requests, acks, head) < (1e-5 if head.dtype == "float32" else 0.15)
    assert check_identity([], [], head) == 0.0


def test_swapped_samples_are_caught(make_answer: Callable[[], Answer]) -> None:
    requests, acks, head = make_answer()
    first, second = requests[0].target.array, requests[1].target.array
    first[:], second[:] = second.copy(), first.copy()
    with pytest.raises(GateError, match="checksum"):
        check_ack(requests[0], acks[0])
    for request, ack in zip(requests, acks, strict=True):
        check_ack(request, resealed(request, ack))
    with pytest.raises(GateError, match=r"sample 0: row \d+ puts the logits"):
        check_identity(requests, acks, head)
    with pytest.raises(GateError, match=r"sample 1: row \d+ puts the logits"):
        check_identity(requests[1:], acks[1:], head)


@pytest.mark.parametrize("shift", [1, -1])
def test_rows_shifted_by_one_are_caught(shift: int, make_answer: Callable[[], Answer]) -> None:
    requests, acks, head = make_answer()
    requests[2].target.array[:] = np.roll(requests[2].target.array, shift, axis=0)
    with pytest.raises(
        GateError, match=r"sample 2: row \d+ puts the logits of tokens \d+ and \d+ -?\d+\.\d+ apart, the engine -?\d"
    ):
        check_identity(requests, acks, head)


@pytest.mark.parametrize("column", [0, 3])
def test_a_difference_just_beyond_that_of_rounding_is_caught(column: int, make_answer: Callable[[], Answer]) -> None:
    """The bound of the module's docstring, by hand: u*(|z_v| + |z_y|) + 1e-3, of one probe of one sample."""
    requests, acks, head = make_answer()
    unit = {"float32": 2.0**-24, "bfloat16": 2.0**-8}[head.dtype]
    for request, ack in zip(requests, acks, strict=True):
        rows = request.target.array[request.probes].astype(np.float64)
        logits = rows @ head.weight.double().numpy().T
        ack.probe_logprobs[:] = np.take_along_axis(logits, request.scored, 1) - np.log(np.exp(logits).sum(1))[:, None]
    rows = requests[1].target.array[requests[1].probes[2:3]].astype(np.float64)
    wanted = (rows @ head.weight.double().numpy().T)[0, requests[1].scored[2]]
    apart = [unit * (abs(one) + abs(wanted[0])) + 1e-3 for one in wanted[1:]]
    bound = min(apart) if column == 0 else apart[column - 1]
    true = acks[1].probe_logprobs[2, column]
    for share, caught in ((0.9, False), (1.15, True), (-0.9, False), (-1.15, True)):
        acks[1].probe_logprobs[2, column] = true + share * bound
        if not caught:
            assert check_identity(requests, acks, head) == pytest.approx(0.9 * bound, rel=0.02)
            continue
        with pytest.raises(GateError, match=f"sample 1: row {requests[1].probes[2]} puts the logits"):
            check_identity(requests, acks, head)


@pytest.mark.parametrize(
    ("parts", "roundings"),
    [
        ({}, 1),
        ({"bias": torch.zeros(1)}, 2),
        ({"scale": 0.25}, 2),
        ({"softcap": 30.0}, 4),
        ({"bias": torch.zeros(1), "scale": 0.25, "softcap": 30.0}, 6),
    ],
)
def test_each_operation_between_row_and_logit_is_a_rounding(parts: dict[str, Any], roundings: int) -> None:
    for dtype, unit in ((torch.bfloat16, 2.0**-8), (torch.float16, 2.0**-11), (torch.float32, 2.0**-24)):
        assert rounding(Head(torch.zeros(1, 1, dtype=dtype), **parts)) == roundings * unit


def test_row_lost_in_the_middle_is_caught(make_answer: Callable[[], Answer]) -> None:
    requests, acks, head = make_answer()
    array = requests[0].target.array
    array[15:-1] = array[16:].copy()  # the rows after it moved up, the last is there twice
    array[-1] = 0
    with pytest.raises(GateError, match="sample 0: row"):
        check_identity(requests, acks, head)


def test_a_row_unlike_that_of_a_prompt_cut_there_is_caught(make_answer: Callable[[], Answer]) -> None:
    requests, acks, head = make_answer()
    taken = requests[1].target.array[requests[1].probes].copy()
    acks[1] = replace(acks[1], probe_rows=taken)
    check_identity(requests, acks, head)
    row = int(requests[1].probes[1])
    requests[1].target.array[row] = requests[1].target.array[row - 1].copy()
    with pytest.raises(GateError, match=f"sample 1: row {row} is .* from that of the prompt cut there"):
        check_identity(requests, acks, head)
    taken[0] = taken[2]
    with pytest.raises(GateError, match="sample 1: row 0 puts the logits"):
        check_identity(requests, acks, head)


def test_rows_never_written_are_caught(make_answer: Callable[[], Answer]) -> None:
    requests, acks, head = make_answer()
    requests[1].target.array[:] = 0
    with pytest.raises(GateError, match="sample 1: row 0"):
        check_identity(requests, acks, head)


def test_ack_without_a_probes_answer_is_caught(make_answer: Callable[[], Answer]) -> None:
    requests, acks, head = make_answer()
    acks[1].probe_logprobs[2, 5] = np.nan
    with pytest.raises(GateError, match=f"sample 1: row {requests[1].probes[2]}"):
        check_identity(requests, acks, head)
    with pytest.raises(GateError, match=r"\(4, 8\) ids were scored, the engine answered for \(3, 8\)"):
        check_ack(requests[0], replace(acks[0], probe_logprobs=acks[0].probe_logprobs[:3]))


def test_ack_of_another_sample_and_a_dropped_row_are_caught(make_answer: Callable[[], Answer]) -> None:
    requests, acks, _ = make_answer()
    with pytest.raises(GateError, match="sample 0: the engine acknowledged sample 1"):
        check_ack(requests[0], acks[1])
    with pytest.raises(GateError, match="sample 0: the plan has 32 rows, the engine wrote 31"):
        check_ack(requests[0], replace(acks[0], num_rows=31))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_row_that_is_not_finite_is_named_with_exit_code_4(value: float, make_answer: Callable[[], Answer]) -> None:
    requests, _, _ = make_answer()
    requests[1].target.array[17, 5] = value
    check_finite(requests[0])
    with pytest.raises(TeacherError, match=r"sample 1: row 17 \(token 17\) is not finite") as caught:
        check_finite(requests[1])
    assert caught.value.exit_code == 4


def test_one_flipped_bit_is_caught_by_the_checksum(make_answer: Callable[[], Answer]) -> None:
    requests, acks, _ = make_answer()
    requests[0].target.array.view(np.uint8)[3, 3] ^= 1
    with pytest.raises(GateError, match="checksum"):
        check_ack(requests[0], acks[0])


def test_probes_hold_the_ends_and_are_spread_between() -> None:
    for num_rows in (0, 1, 2, 3, 4, 5, 7, 100, 8191):
        for count in (2, 3, 4, 9):
            probes = choose_probes(11, num_rows, count)
            assert len(probes) == min(num_rows, count)
            assert (np.diff(probes) > 0).all()
            assert num_rows == 0 or (probes[0], probes[-1]) == (0, num_rows - 1)
            if num_rows == 8191:
                assert np.diff(probes).max() <= 2 * num_rows / max(count - 2, 1)


def test_probes_are_a_pure_function_of_the_sample() -> None:
    assert choose_probes(7, 1000, 5).tolist() == [0, 251, 555, 813, 999]
    assert choose_probes(7, 1000, 5).tolist() != choose_probes(8, 1000, 5).tolist()
    assert choose_probes(7, 1000, 1).tolist() == [999]
    assert sum(is_probed_inside(sample, 128) for sample in range(12_800)) == pytest.approx(100, abs=30)
    assert all(is_probed_inside(sample, 1) for sample in range(9))
    ids = np.arange(50, 90, dtype=np.int32)
    scored = choose_scored(7, ids, np.array([3, 38]), 1000)
    assert scored.tolist() == choose_scored(7, ids, np.array([3, 38]), 1000).tolist()
    assert scored[:, 0].tolist() == [54, 89]
    assert set(scored[:, 1:5].flat) <= set(ids.tolist())
    assert scored.max() < 1000
    assert len(set(scored.flat)) > 10
