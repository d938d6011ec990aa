"""A student with another tokenizer as a user trains it: from a cache, beside the teacher, and measured."""

import json
from pathlib import Path

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


def test_on_policy_refuses_it_and_says_what_takes_it(far_bench: Bench, main: Main, tmp_path: Path) -> None:
    words = ["--teacher", far_bench.teacher, "--student", far_bench.student, "--prompts", far_bench.data]
    code, _, err = main("onpolicy", *words, "--output", tmp_path / "out", "--max-length", 128)
    assert code == 4, err
    assert "kdpipe train with --cache and --data, or kdpipe stream" in err.splitlines()[-1]
