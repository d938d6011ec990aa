"""Evaluation: the figures of transformers' own logits, over the samples that were held out and no others."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from tests.conftest import Bench
from tests.models import make_model, make_tokenizer
from tests.stages import by_hand
from tests.stages.conftest import STUDENTS
from tests.stages.ranks import Recorder
from tests.stages.train.test_train import training_for

from kdpipe.manifests.cache import Cache
from kdpipe.manifests.progress import Progress, Silent
from kdpipe.manifests.specs import DataSpec
from kdpipe.stages.evaluate import evaluate_student
from kdpipe.stages.train import train


def measured(student: Path, cache: Path, progress: Progress | None = None, **changes: object) -> dict[str, float]:
    asked = {"heldout_fraction": None, "device": "cpu", "dtype": "auto", "batch_tokens": 500} | changes
    return evaluate_student(student, [cache], progress=progress or Silent(), **asked)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["plain", *STUDENTS])
def test_scores_equal_those_by_hand(kind: str, bench: Bench, families: dict[str, Bench]) -> None:
    """heldout_kl and its sisters from the logits of both models in float64, no cache and no kdpipe code between."""
    some = families.get(kind, bench)
    truth = by_hand.scores(some, np.flatnonzero(Cache.open(some.cache).heldout()))
    assert measured(some.student, some.cache) == pytest.approx(truth, rel=2e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_student_is_measured_in_the_dtype_it_is_stored_in(dtype: str, bench: Bench, tmp_path: Path) -> None:
    student = make_tokenizer(make_model("llama", tmp_path, vocab_size=320, seed=1, dtype=dtype))
    asked = {name: measured(student, bench.cache, dtype=name) for name in ("auto", "float32", "bfloat16")}
    assert asked["auto"] == asked[dtype]
    assert asked["float32"]["heldout_kl"] != asked["bfloat16"]["heldout_kl"]
    assert asked["float32"]["heldout_kl"] == pytest.approx(asked["bfloat16"]["heldout_kl"], rel=0.02)


@pytest.mark.parametrize("tokens", [1, 300, 700])
def test_an_evaluation_on_the_way_takes_the_first_samples_up_to_its_tokens(
    tokens: int, bench: Bench, tmp_path: Path
) -> None:
    """One at least; the last evaluation takes all."""
    cache = Cache.open(bench.cache)
    heldout = np.flatnonzero(cache.heldout())
    lengths = np.array([len(cache[int(index)].token_ids) for index in heldout])
    some = heldout[: max(int((lengths.cumsum() <= tokens).sum()), 1)]
    assert len(some) < len(heldout)
    recorder = Recorder()
    train(training_for(bench, tmp_path, eval_tokens=tokens, eval_every=1, max_steps=2, lr=1e-12), recorder)
    for name, value in by_hand.scores(bench, some).items():
        assert recorder.values("eval", name)[:2] == pytest.approx([value] * 2, rel=2e-5), name
    assert recorder.values("eval", "num_tokens")[2] == by_hand.scores(bench, heldout)["num_tokens"]


def test_a_student_is_measured_on_what_it_held_out_itself(bench: Bench, tmp_path: Path) -> None:
    """Not on what the cache holds out, where nothing else is asked."""
    training = training_for(bench, tmp_path, max_steps=1)
    spec = training.spec.model_copy(update={"data": DataSpec(heldout_fraction=0.6)})
    metrics = train(dataclasses.replace(training, spec=spec), Silent())
    cache = Cache.open(bench.cache)
    counts = {share: int(cache.num_supervised()[cache.heldout(share)].sum()) for share in (0.1, 0.25, 0.6)}
    assert len(set(counts.values())) == 3
    assert metrics["num_tokens"] == counts[0.6]
    assert measured(tmp_path, bench.cache)["num_tokens"] == counts[0.6]
    assert measured(tmp_path, bench.cache, heldout_fraction=0.1)["num_tokens"] == counts[0.1]
    assert measured(bench.student, bench.cache)["num_tokens"] == counts[0.25]


def test_a_student_that_saw_what_is_measured_is_said_so(bench: Bench, tmp_path: Path) -> None:
    train(training_for(bench, tmp_path, max_steps=1), Silent())
    notes = {}
    for share in (None, 0.1, 0.25, 0.3):
        recorder = Recorder()
        measured(tmp_path, bench.cache, recorder, heldout_fraction=share)
        notes[share] = recorder.notes
    assert notes.pop(0.3) == [
        "this student held out 0.25 of its samples, 0.3 are measured: it was trained on some of them"
    ]
    assert set(map(tuple, notes.values())) == {()}
