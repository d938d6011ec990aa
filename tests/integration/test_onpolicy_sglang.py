"""On-policy with the student's answers written by the real SGLang, its weights updated after every step."""

import json
from pathlib import Path

import pytest
from tests.conftest import Bench
from tests.integration.running import ended, started
from tests.integration.test_onpolicy import asked, events

pytest.importorskip("sglang", reason="make sglang")


def test_answers_are_written_by_an_engine_that_follows_the_student(bench: Bench, tmp_path: Path) -> None:
    """One step ahead, so that it writes while the student trains; a teacher's gate and a student's loss as ever."""
    output = tmp_path / "out"
    words = asked(bench, output, "--lmbda", 1, "--beta", 1, "--rollout-engine", "sglang", "--overlap", 1)
    code, out, err = ended(started(*words, "--set", "train.max_steps=5"), timeout_s=400)
    assert code == 0, err
    steps = events(output, "step")
    assert [step["staleness/max"] for step in steps] == [0, 1, 1, 1, 1]
    updated = [step for step in steps if "update/gap" in step]
    assert len(updated) >= 4
    assert max(step["update/gap"] for step in updated) < 1e-8
    assert all(step["update/num_tensors"] > 0 for step in updated)
    assert json.loads(out)["rollout_reverse_kl"] < events(output, "eval")[0]["rollout_reverse_kl"]
    written = [json.loads(line) for line in (output / "rollouts-00000.jsonl").read_text().splitlines()]
    assert {each["version"] for each in written} == {0, 1, 2, 3}
