"""A student with another tokenizer as a user trains it: from a cache, beside the teacher, and measured."""

import json
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import Bench, Main
from tests.integration.running import SETS, ended, started

from kdpipe.manifests.aligned import ALIGNED


def test_it_is_trained_and_measured_with_the_data_of_its_cache(far_bench: Bench, main: Main, tmp_path: Path) -> None:
    words = ["--student", far_bench.student, "--cache", far_bench.cache, "--data", far_bench.data]
    line = ["train", *words, "--output", tmp_path / "out", "--align", "chunk", "--device", "cpu", "--json"]
    code, out, err = main(*line, "--set", *SETS, "train.max_steps=3", "loss.options.tau=50")
    assert code == 0, err
    assert "another tokenizer than the teacher's" in err
    trained = json.loads(out)
    code, out, err = main("eval", "--student", tmp_path / "out", *words[2:], "--json")
    assert code == 0, err
    assert json.loads(out)["heldout_bits_per_byte"] == pytest.approx(trained["heldout_bits_per_byte"], rel=1e-4)
    code, _, err = main("eval", "--student", tmp_path / "out", *words[2:4])
    assert (code, err.count("\n")) == (4, 1)
    assert "give the data that the cache was made of too (--data)" in err
    code, _, err = main(*line, "--set", *SETS, "loss.options.tauu=50")
    assert (code, err.count("E-CONFIG")) == (4, 1)
    assert "tauu" in err
    assert (far_bench.cache / ALIGNED).is_dir()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_stream_is_the_student_of_a_cache(far_bench: Bench, tmp_path: Path) -> None:
    words = ["--student", far_bench.student, "--data", far_bench.data]
    cached = [*words, "--cache", far_bench.cache, "--output", tmp_path / "off", "--max-length", 128]
    live = [*words, "--teacher", far_bench.teacher, "--output", tmp_path / "live", "--max-length", 128]
    for line in (["train", *cached, "--nproc", 1], ["stream", *live, "--heldout-fraction", 0.25]):
        code, _, err = ended(started(*line, "--set", *SETS))
        assert code == 0, err
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("off", "live")]
    assert weights[0] == weights[1]
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["live", "off"], "the plan is gone"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_it_learns_on_policy_from_what_it_writes_and_what_the_data_say(far_bench: Bench, tmp_path: Path) -> None:
    """Some prompts have no answer in the data. The same command again has nothing left to do."""
    prompts = tmp_path / "prompts.jsonl"
    asked = [
        json.dumps({"messages": [{"role": "user", "content": f"How many rows are {number}?"}]}) for number in range(8)
    ]
    prompts.write_text(far_bench.data.read_text() + "\n".join(asked) + "\n")
    models = ["--teacher", far_bench.teacher, "--student", far_bench.student, "--prompts", prompts]
    more = ["--max-length", 128, "--heldout-fraction", 0.25, "--lmbda", 0.5, "--max-new-tokens", 12]
    line = ["onpolicy", *models, *more, "--output", tmp_path / "out", "--json", "--set", *SETS]
    code, out, err = ended(started(*line, "loss.kd_weight=0.5"))
    assert code == 0, err
    assert "another tokenizer than the teacher's" in err
    steps = [event for event in read_events(tmp_path / "out") if event["kind"] == "step"]
    assert len(steps) > 2
    shares = [step["rollout/aligned_share"] for step in steps if step["rollout/num_answers"]]
    assert 0 < sum(shares) <= len(shares)
    found = json.loads(out)
    assert 0 < found["rollout_exact_tokens"] < found["rollout_tokens"]
    assert found["rollout_kl"] > 0
    assert found["heldout_bits_per_byte"] > 0
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["out", "prompts.jsonl"], "the plan is gone"
    assert "--cache CACHE --data DATA" in err
    code, again, err = ended(started(*line, "loss.kd_weight=0.5"))
    assert code == 0, err
    assert json.loads(again).items() <= found.items()


def read_events(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "events.jsonl").read_text().splitlines()]
