"""kdpipe sweep: real students from one cache, the same as by hand, whatever happens on the way."""

import json
import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tests.conftest import Bench, Main

from kdpipe.manifests.running import alone_in
from kdpipe.pipeline.runs import events_of, state_of

ROOT = Path(__file__).parents[2]


@pytest.fixture
def folder(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None) -> Path:
    """A working folder with a run file of two students, one of which cannot be trained."""
    (tmp_path / "run.toml").write_text(
        f"""
[cache]
path = "{bench.cache}"
[student]
path = "{bench.student}"
[train]
output = "runs"
device = "cpu"
batch_tokens = 512
max_steps = 4
[sweep]
report = false
[sweep.grid]
train.lr = [1e-3, 1e30]
"""
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join([str(ROOT / "tools" / "typing"), os.environ.get("PYTHONPATH", "")])
    )
    return tmp_path


def test_students_are_those_of_the_commands_typed_by_hand_and_a_bad_run_stops_none(folder: Path, main: Main) -> None:
    code, out, err = main("sweep", "run.toml", "--jobs", "2", "--json")
    assert (code, err.startswith("2 runs to do; 8 steps, ")) == (1, True)
    assert err.splitlines()[-1].startswith("E-CHECK runs: 1 of 2 did not end well: lr-1e+30; ")
    assert "lr-1e+30: failed: E-CHECK step 2: loss nan" in err
    students = json.loads(out)["students"]
    assert [(one["name"], one["status"]) for one in students] == [("lr-0.001", "finished"), ("lr-1e+30", "failed")]
    assert events_of(Path("runs"))[-1]["kind"] == "finished"

    by_hand = ("train", "--config", "run.toml", "--set", "train.lr=0.001", "--output", "hand")
    assert main(*by_hand)[0] == 0
    weights = [Path(at, "model.safetensors").read_bytes() for at in ("hand", "runs/lr-0.001")]
    assert weights[0] == weights[1]

    code, dry, _ = main("sweep", "run.toml", "--dry-run")
    assert (code, dry) == (0, "kdpipe train --config run.toml --set train.lr=1e+30 --output runs/lr-1e+30\n")
    code, out, err = main("sweep", "run.toml", "--set", "sweep.grid.train.lr=[1e-3]")
    assert (code, err) == (0, ""), "nothing is left to do"
    assert [line.split()[:2] for line in out.splitlines()[1:]] == [["lr-0.001", "finished"]]
    code, _, err = main("sweep", "run.toml", "--set", "train.weight_decay=0.1")
    assert code == 4
    assert "it holds the student of another run: its spec.train.weight_decay is 0.0, this run's is 0.1" in err


def test_a_sweep_is_refused_before_it_starts(folder: Path, main: Main) -> None:
    assert main("sweep")[2].startswith("E-CONFIG kdpipe sweep: no run file is named")
    assert main("sweep", "run.toml", "--config", "run.toml")[2].startswith("E-CONFIG kdpipe sweep: two run files")
    assert "it varies nothing" in main("sweep", "run.toml", "--set", "sweep.grid={}")[2]
    nodes = main("sweep", "run.toml", "--set", "sweep.grid={slurm={nodes=[1, 2]}}", "--dry-run")
    assert "runs nodes-1 and nodes-2 differ in [slurm] alone, which only kdpipe submit reads" in nodes[2]
    code, _, err = main("sweep", "run.toml", "--set", "student.path=none")
    assert (code, err) == (4, "E-STUDENT none: no such folder\n")
    Path("runs").mkdir()
    with alone_in(Path("runs")):
        code, _, err = main("sweep", "run.toml")
    assert (code, err.startswith("E-BUSY runs: another run is at work here: pid")) == (75, True)
    assert list(Path("runs").iterdir()) == [], "it leaves nothing"


@pytest.mark.slow
def test_a_run_that_would_be_refused_is_refused_before_the_first_begins(folder: Path, main: Main) -> None:
    Path("runs").mkdir()
    Path("runs/lr-1e+30").touch()  # where a student should go
    code, out, err = main("sweep", "run.toml")
    assert (code, out, [path.name for path in Path("runs").iterdir()]) == (4, "", ["lr-1e+30"]), "nothing was begun"
    assert err.endswith("runs/lr-1e+30: run lr-1e+30: this is not a folder; choose another --output\n")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGKILL", "SIGTERM", "SIGINT"])
def test_a_sweep_that_is_ended_and_run_again_ends_with_the_same_students(name: str, folder: Path, main: Main) -> None:
    grid = "sweep.grid.train.lr=[1e-3, 3e-3, 1e-2]"
    asked = ("sweep", "run.toml", "--jobs", "2", "--set", grid, "train.save_every=1", "train.max_steps=12")
    command = [sys.executable, "-m", "kdpipe.pipeline.cli", *asked]
    codes = []
    for step in (2, 5, None):
        with subprocess.Popen(command, stdout=subprocess.DEVNULL) as sweep:
            watched = os.pidfd_open(sweep.pid)
            while step is not None and (state_of(Path("runs/lr-0.003")).step or 0) < step:
                assert not select.select([watched], [], [], 0.05)[0], "it has ended by itself"
            if step is not None:
                sweep.send_signal(signal.Signals[name])
            codes.append(sweep.wait(100))
            os.close(watched)
    ended = {"SIGKILL": -signal.SIGKILL, "SIGTERM": 75, "SIGINT": 130}[name]
    assert codes == [ended, ended, 0]
    for lr in ("0.001", "0.003", "0.01"):
        by_hand = ("--set", f"train.lr={lr}", "train.max_steps=12", "--output", f"hand/{lr}")
        assert main("train", "--config", "run.toml", *by_hand)[0] == 0
        assert Path(f"hand/{lr}/model.safetensors").read_bytes() == Path(f"runs/lr-{lr}/model.safetensors").read_bytes()
