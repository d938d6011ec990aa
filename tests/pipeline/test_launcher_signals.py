"""A scheduler's signal to the launcher alone, while two ranks take steps: each ends when its state is saved."""

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tests.conftest import Bench, Main

SETS = ["train.dtype=float32", "train.batch_tokens=600", "train.epochs=99", "train.max_steps=40"]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2])
def test_a_signal_to_the_launcher_during_steps_is_75_and_the_rest_is_done_later(
    number: signal.Signals, bench: Bench, main: Main, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    words = ["train", "--student", bench.student, "--cache", bench.cache, "--output", output, "--device", "cpu"]
    words += ["--nproc", 2, "--set", *SETS]
    command = [sys.executable, "-m", "kdpipe.pipeline.cli", *map(str, words)]
    running = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    events, until = output / "events.jsonl", time.monotonic() + 240
    try:
        while not (events.exists() and '"step"' in events.read_text()):
            assert time.monotonic() < until
            assert running.poll() is None
            time.sleep(0.02)
        running.send_signal(number)
        _, said = running.communicate(timeout=90)
    finally:
        running.kill()
    assert running.returncode == 75, said
    last = re.fullmatch(
        rf"E-TEMPORARY .*: stopped by {number.name}; its state after step (\d+) is saved; .*", said.splitlines()[-1]
    )
    assert last, said
    assert main(*words)[0] == 0
    told = [json.loads(line) for line in events.read_text().splitlines()]
    assert [event["step"] for event in told if event["kind"] == "step"] == list(range(1, 41))
    assert [event["step"] for event in told if event["kind"] == "resume"] == [int(last[1])]
