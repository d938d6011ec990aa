"""The head's formula against every kind's own logits, and against heads that lack one of its parts."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.models import KINDS, make_model
from tests.opened import teacher_in
from tests.stages.teacher.make_requests import make_request

from kdpipe.manifests.errors import TeacherError
from kdpipe.stages.models import head as formula
from kdpipe.stages.models.head import Head
from kdpipe.stages.teacher.canary import check_head, compare_rows
from kdpipe.stages.teacher.describe import describe_teacher
from kdpipe.stages.teacher.head import read_head
from kdpipe.stages.teacher.transformers_engine import TransformersEngine

SAMPLES = [make_request(0, 41).token_ids, make_request(1, 7).token_ids]


def opened(kind: str, folder: Path, dtype: str) -> tuple[TransformersEngine, Head]:
    make_model(kind, folder)
    head = read_head(describe_teacher(teacher_in(folder), dtype))
    return TransformersEngine(teacher_in(folder), dtype=dtype, device="cpu"), head


@pytest.mark.parametrize("kind", KINDS)
def test_rows_times_head_are_the_models_own_logits(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formula, "CHUNK_ENTRIES", 100)
    engine, head = opened(kind, tmp_path, "float32")
    assert check_head(engine, head, SAMPLES, path=tmp_path) < 1e-6
    engine, head = opened(kind, tmp_path, "bfloat16")
    assert 1e-4 < check_head(engine, head, SAMPLES, path=tmp_path) < 5e-3


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("kind", "lost"),
    [("gemma2", {"softcap": None}), ("cohere", {"scale": 1.0}), ("granite", {"scale": 1.0}), ("phi", {})],
)
def test_a_step_that_the_record_does_not_know_is_refused(kind: str, lost: dict, dtype: str, tmp_path: Path) -> None:
    engine, head = opened(kind, tmp_path, dtype)
    head = replace(head, bias=None, **lost)
    with pytest.raises(TeacherError, match="does something between hidden state and logits"):
        check_head(engine, head, SAMPLES, path=tmp_path)


def test_an_error_in_fp32_that_bf16_would_explain_is_refused(tmp_path: Path) -> None:
    engine, head = opened("llama", tmp_path, "float32")
    for off, refused in ((3e-6, False), (3e-5, True), (1e-4, True), (1e-2, True)):
        scaled = replace(head, weight=head.weight * (1 + off))
        if not refused:
            assert check_head(engine, scaled, SAMPLES, path=tmp_path) == pytest.approx(off, rel=0.2)
            continue
        with pytest.raises(TeacherError, match=r"differ from the model's own by \d\.\de-0\d \(allowed 1\.0e-05\)"):
            check_head(engine, scaled, SAMPLES, path=tmp_path)


@pytest.mark.parametrize("part", ["the rows", "the logits"])
def test_a_teacher_whose_numbers_are_not_finite_is_told_so(part: str, tmp_path: Path) -> None:
    engine, head = opened("llama", tmp_path, "float32")
    weight = engine._model.model.norm.weight if part == "the rows" else engine._model.lm_head.weight[3]
    weight[5] = torch.inf
    with pytest.raises(TeacherError, match="its hidden states or logits are not finite in float32"):
        check_head(engine, head, SAMPLES, path=tmp_path)


@pytest.mark.parametrize("bad", [0, 1])
def test_one_sample_of_several_is_enough(bad: int, tmp_path: Path) -> None:
    """A true engine whose answer for one sample is that of another formula."""
    engine, head = opened("llama", tmp_path, "float32")

    class Lying:
        architecture = "Lying"

        def rows_and_logits(self, token_ids: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
            rows, logits = engine.rows_and_logits(token_ids)
            return rows, logits * (2.0 if len(token_ids) == len(SAMPLES[bad]) else 1.0)

    with pytest.raises(TeacherError, match=r"differ from the model's own by 5\.0e-01"):
        check_head(Lying(), head, SAMPLES, path=tmp_path)


def test_a_head_of_another_size_is_refused(tmp_path: Path) -> None:
    engine, head = opened("llama", tmp_path, "float32")
    smaller = replace(head, weight=head.weight[:-1])
    with pytest.raises(TeacherError, match="inf"):
        check_head(engine, smaller, SAMPLES, path=tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_chosen_entries_are_those_of_the_models_own_logits(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(formula, "COLUMN_ELEMENTS", 5 * 48 * 7)  # seven rows at a time
    engine, head = opened(kind, tmp_path, "float32")
    rows, logits = engine.rows_and_logits(SAMPLES[0])
    ids = torch.from_numpy(np.random.default_rng(0).integers(0, 251, (len(rows), 5)))
    assert (head.chosen(rows, ids) - logits.gather(1, ids)).abs().max() < 1e-5 * logits.abs().max()


@pytest.mark.parametrize(("dtype", "bound"), [("float32", 1e-4), ("float16", 0.02), ("bfloat16", 0.1)])
def test_rows_are_judged_by_the_tolerance_of_their_dtype(dtype: str, bound: float, tmp_path: Path) -> None:
    own = [torch.randn(3, 5).double(), torch.randn(9, 5).double()]
    for share in (0.8, 1.25):
        off = [own[0], own[1] * (1 + share * bound)]
        if share < 1:
            found = compare_rows(off, own, dtype=dtype, exact=True, path=tmp_path)
            assert found == pytest.approx(share * bound)
            continue
        with pytest.raises(TeacherError, match="the engine's rows differ from transformers' own by"):
            compare_rows(off, own, dtype=dtype, exact=True, path=tmp_path)


def test_rows_of_another_implementation_are_measured_and_judged(tmp_path: Path) -> None:
    own = [torch.randn(9, 5), torch.randn(3, 5)]
    close = [rows * (1 + 1e-6) for rows in own]
    assert compare_rows(close, own, dtype="float32", exact=True, path=tmp_path) == pytest.approx(1e-6, rel=0.2)
    swapped = [own[0][:3], own[1]]
    with pytest.raises(TeacherError, match="differ from transformers' own by 1"):
        compare_rows(swapped[::-1], swapped, dtype="bfloat16", exact=True, path=tmp_path)
    assert compare_rows(swapped[::-1], swapped, dtype="bfloat16", exact=False, path=tmp_path) > 1
    own[1][1, 1] = torch.nan
    with pytest.raises(TeacherError, match="by nan"):
        compare_rows(own, close, dtype="float32", exact=False, path=tmp_path)
