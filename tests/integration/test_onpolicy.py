"""kdpipe onpolicy as a user runs it: the student's own answers, scored by a teacher in a process of its own."""

import json
from pathlib import Path

import pytest
from tests.conftest import Bench
from tests.integration.running import SETS, ended, started


def asked(bench: Bench, output: Path, *more: object) -> list[object]:
    data = ["--prompts", bench.data, "--max-length", 128, "--heldout-fraction", 0.25]
    models = ["--teacher", bench.teacher, "--student", bench.student]
    return ["onpolicy", *models, *data, "--output", output, "--max-new-tokens", 12, "--set", *SETS, "--json", *more]


def events(output: Path, kind: str) -> list[dict[str, float]]:
    lines = (output / "events.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


def test_without_answers_of_its_own_the_student_is_that_of_a_cache(
    bench: Bench,
    offline: bytes,
    tmp_path: Path,
) -> None:
    code, _, err = ended(started(*asked(bench, tmp_path / "out", "--lmbda", 0)))
    assert code == 0, err
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == offline


def test_a_student_that_is_its_teacher_has_nothing_to_learn_from_its_own_answers(bench: Bench, tmp_path: Path) -> None:
    words = asked(bench, tmp_path / "out", "--lmbda", 1, "--beta", 1)
    words[words.index("--student") + 1] = bench.teacher
    code, out, err = ended(started(*words))
    assert code == 0, err
    steps = events(tmp_path / "out", "step")
    assert len(steps) > 2
    assert max(abs(step["loss/mean"]) for step in steps) < 1e-6
    assert json.loads(out)["rollout_reverse_kl"] == pytest.approx(0.0, abs=1e-5)
    assert all(step["rollout/num_answers"] > 0 for step in steps)
