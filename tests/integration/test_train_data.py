"""kdpipe train --data as a user runs it: one process or two, killed on the way, and nothing left beside the student."""

import json
import os
import signal
from pathlib import Path

import pytest
from tests.conftest import Bench
from tests.integration.running import SETS, ended, started, steps_of, wait_for

DATA = ("--max-length", 128, "--heldout-fraction", 0.25)


def training(bench: Bench, output: Path, *more: object) -> list[object]:
    words = ["--student", bench.student, "--data", bench.data, *DATA, "--output", output]
    return ["train", *words, "--json", "--nproc", 1, *more, "--set", *SETS]


def weights(output: Path) -> bytes:
    return (output / "model.safetensors").read_bytes()


def test_killed_it_goes_on_to_the_student_of_a_cache_by_cross_entropy(bench: Bench, tmp_path: Path) -> None:
    """Bit for bit; the figures are printed as they stand in kdpipe.json, without those that need a teacher."""
    cached = ["--student", bench.student, "--cache", bench.cache, "--output", tmp_path / "cached", "--nproc", 1]
    whole = started("train", *cached, "--set", *SETS, "loss.kd_weight=0")
    killed_and_resumed(training(bench, tmp_path / "out"), tmp_path / "out", whole_of=tmp_path)
    code, _, err = ended(whole)
    assert code == 0, err
    assert weights(tmp_path / "out") == weights(tmp_path / "cached")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["cached", "out"], "the samples are gone"


@pytest.mark.slow
def test_two_ranks_that_were_killed_go_on_to_the_same_student(bench: Bench, tmp_path: Path) -> None:
    code, _, err = ended(started(*training(bench, tmp_path / "whole", "--nproc", 2)))
    assert code == 0, err
    killed_and_resumed(training(bench, tmp_path / "out", "--nproc", 2), tmp_path / "out", whole_of=tmp_path)
    assert weights(tmp_path / "out") == weights(tmp_path / "whole")


def killed_and_resumed(words: list[object], output: Path, *, whole_of: Path) -> None:
    """Run, kill the command when a checkpoint is there, run again to the end."""
    process = started(*words)
    wait_for(lambda: steps_of(output) >= 5 or process.poll() is not None)
    os.kill(process.pid, signal.SIGKILL)
    ended(process)
    assert (whole_of / f".{output.name}.samples").exists()
    code, out, err = ended(started(*words))
    assert code == 0, err
    assert "no input has changed since the data were prepared" in err
    assert "going on from the checkpoint of step" in err
    record = json.loads((output / "kdpipe.json").read_text())
    assert json.loads(out) == record["metrics"] | {
        "num_steps": record["num_steps"],
        "trained_tokens": record["num_tokens"],
    }
    assert not {name for name in record["metrics"] if "kl" in name or "teacher" in name or "top1" in name}
