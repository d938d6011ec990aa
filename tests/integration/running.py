"""Commands of kdpipe in processes of their own, as a user runs them, waited for with a bound."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

SETS = ["train.dtype=float32", "train.batch_tokens=300", "train.lr=1e-2", "train.epochs=2", "train.save_every=3"]
ENV = os.environ | {"OMP_NUM_THREADS": "1"}


def started(*words: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "kdpipe.pipeline.cli", *map(str, words)]
    return subprocess.Popen(command, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def ended(process: subprocess.Popen[str], timeout_s: float = 180.0) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=timeout_s)
    return process.returncode, out, err


def steps_of(output: Path) -> int:
    try:
        lines = (output / "events.jsonl").read_text().splitlines()
    except OSError:
        return 0
    return sum(json.loads(line)["kind"] == "step" for line in lines if line.endswith("}"))


def wait_for(what: Callable[[], object], timeout_s: float = 200.0) -> None:
    until = time.monotonic() + timeout_s
    while not what():
        assert time.monotonic() < until, "it did not come"
        time.sleep(0.01)
