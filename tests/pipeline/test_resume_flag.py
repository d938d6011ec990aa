"""--resume: an interrupted run goes on, starts again, or goes on from the checkpoint that was named."""

import json
import os
import re
import signal
from pathlib import Path

import pytest
from tests.conftest import Bench, Main

from kdpipe.pipeline.progress import ConsoleProgress

SETS = ["train.dtype=float32", "train.batch_tokens=300", "train.max_steps=5", "train.save_every=1", "train.keep=9"]


def events_of(output: Path, kind: str) -> list[int]:
    lines = (output / "events.jsonl").read_text().splitlines()
    return [event["step"] for event in map(json.loads, lines) if event["kind"] == kind]


@pytest.mark.parametrize("flag", [None, "auto", "never", "PATH"])
def test_an_interrupted_run_goes_on_as_it_is_asked(
    flag: str | None, bench: Bench, main: Main, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    words = ["train", "--student", bench.student, "--cache", bench.cache, "--output", output, "--device", "cpu"]
    words += ["--nproc", 1, "--set", *SETS]
    own = ConsoleProgress.event

    def event(progress: ConsoleProgress, kind: str, **fields: object) -> None:
        own(progress, kind, **fields)
        if (kind, fields.get("step")) == ("step", 3):
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(ConsoleProgress, "event", event)
    code, _, err = main(*words)
    assert code == 75, err
    said = re.search(r"stopped by SIGTERM; its state after step (\d) is saved", err.splitlines()[-1])
    assert said, err
    last = int(said[1])
    monkeypatch.undo()
    chosen = output / "checkpoints" / "000002" if flag == "PATH" else flag
    code, _, err = main(*words, *([] if flag is None else ["--resume", chosen]))
    assert code == 0, err
    wanted = {None: [last], "auto": [last], "never": [], "PATH": [2]}[flag]
    assert events_of(output, "resume") == wanted
    first = wanted[0] + 1 if wanted else 1
    assert events_of(output, "step") == [*range(1, last + 1), *range(first, 6)]
