"""kdpipe submit on a real Slurm, two nodes on this machine: one command from nothing to a report, and what fails."""

import json
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import Bench, Main
from tests.integration.lab import Lab
from tests.integration.lab import lab as lab
from tests.integration.lab import on_lab as on_lab

from kdpipe.manifests.submission import read_submission

pytestmark = pytest.mark.timeout(900)

RUN = """
[teacher]
path = "{bench.teacher}"
[data]
paths = ["{bench.data}"]
max_length = 128
heldout_fraction = 0.25
[cache]
path = "cache"
shard_tokens = 700
[student]
path = "{bench.student}"
[train]
dtype = "float32"
batch_tokens = 600
device = "cpu"
save_every = 4
[sweep]
output = "out"
runs = [
    {{ name = "a", train.lr = 1e-2 }},
    {{ name = "b", loss.divergence = "reverse_kl" }},
    {{ name = "wide", train.seed = 1, slurm.nodes = 2 }},
    {{ name = "bad", train.lr = 1e30 }},
]
[slurm]
extract_tasks = 4
cpus_per_task = 1
time = 10
signal_seconds = 20
stage_dir = "local"
[slurm.extract]
cpus_per_task = 2
"""
NOT_COMPARED = {"runs", "claims", "tmp", "quarantine"}


def contents(cache: Path) -> dict[str, bytes]:
    paths = (path for path in sorted(cache.rglob("*")) if path.is_file())
    names = {path.relative_to(cache): path for path in paths}
    return {str(name): path.read_bytes() for name, path in names.items() if name.parts[0] not in NOT_COMPARED}


def weights(output: Path) -> bytes:
    return (output / "model.safetensors").read_bytes()


@pytest.mark.usefixtures("one_thread")
def test_one_command_from_nothing_to_a_report(
    on_lab: Lab, bench: Bench, main: Main, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("run.toml").write_text(RUN.format(bench=bench))
    code, out, err = main("submit", "run.toml", "--json")
    assert code == 0, err
    jobs = {job["name"].removeprefix("out-"): str(job["id"]) for job in json.loads(out)["jobs"]}
    assert list(jobs) == ["extract", "seal", "train", "train-2", "report"]
    code, out, _ = main("submit", "run.toml", "--json")
    assert (code, json.loads(out)["jobs"]) == (0, [])
    code, found = standing(main)
    assert code == 0
    assert {row["state"] for row in found.values()} <= {"waiting", "running", "finished"}
    assert found["train/wide"]["job"] == jobs["train-2"]
    states = on_lab.wait_for_the_end(600)

    record = read_submission(Path("out"))
    assert record is not None
    failed = {task.step for job in record.jobs for task in job.tasks if states[job.task_id(task)] != "COMPLETED"}
    assert failed == {"train/bad"}, logs()
    assert states[f"{jobs['train']}_3"] == "FAILED"
    assert on_lab.nodes(jobs["extract"]) == on_lab.nodes(jobs["train-2"]) == {"n1", "n2"}
    assert Path("out/report.html").stat().st_size > 1000
    assert "not finite" in Path("out/bad/events.jsonl").read_text()
    assert not Path("out/bad/kdpipe.json").exists()
    assert len([path for path in Path("local").iterdir() if path.is_dir()]) == 1
    code, found = standing(main)
    assert code == 1
    assert {name for name, row in found.items() if row["state"] != "finished"} == {"train/bad"}
    assert (found["train/bad"]["state"], "not finite" in found["train/bad"]["why"]) == ("failed", True)
    assert found["train/a"]["heldout_kl"] > 0.0

    alone = ["--config", "run.toml", "--set", "cache.path=alone"]
    code, _, err = main("extract", "--config", "run.toml", "--cache", "alone")
    assert code == 0, err
    assert contents(Path("cache")) == contents(Path("alone"))
    for name, sets, ranks in (
        ("a", ["train.lr=1e-2"], 1),
        ("b", ["loss.divergence=reverse_kl"], 1),
        ("wide", ["train.seed=1"], 2),
    ):
        output = Path("plain") / name
        code, _, err = main("train", *alone, *sets, "--nproc", ranks, "--output", output)
        assert code == 0, err
        assert weights(output) == weights(Path("out") / name), name

    code, out, _ = main("submit", "run.toml", "--json")  # only what failed is left, and a report
    assert [job["name"] for job in json.loads(out)["jobs"]] == ["out-train", "out-report"]
    code, out, _ = main("cancel", "run.toml", "--json")
    assert (code, len(json.loads(out)["cancelled"])) == (0, 2)
    on_lab.wait_for_the_end()


def test_an_extraction_that_fails_for_good_ends_all_that_waits_for_it(
    on_lab: Lab, bench: Bench, main: Main, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("data.jsonl").write_text("{")
    Path("run.toml").write_text(RUN.format(bench=bench).replace(str(bench.data), "data.jsonl"))
    code, _, err = main("submit", "run.toml", "--set", "slurm.extract_tasks=2", "sweep.report=false")
    assert code == 0, err
    record = read_submission(Path("out"))
    assert record is not None
    extract = record.jobs[0]
    on_lab.wait(lambda: all(on_lab.states()[extract.task_id(task)] == "FAILED" for task in extract.tasks))
    states = on_lab.wait_for_the_end(60)
    found = {(task.step, task.part): states[job.task_id(task)] for job in record.jobs for task in job.tasks}
    assert found.pop(("extract", 1)) == found.pop(("extract", 2)) == "FAILED"
    assert set(found.values()) == {"CANCELLED"}
    assert "E-DATA" in logs()
    code, rows = standing(main)
    assert code == 1
    assert {name: row["state"] for name, row in rows.items() if row["state"] != "blocked"} == {
        "extract 1/2": "failed",
        "extract 2/2": "failed",
    }
    assert "E-DATA" in rows["extract 1/2"]["why"]
    assert not [row for row in rows.values() if row["state"] == "blocked" and "extract" not in row["why"]]


def standing(main: Main) -> tuple[int, dict[str, Any]]:
    """Exit code and steps, by name, of `kdpipe status`."""
    code, out, _ = main("status", "run.toml", "--json")
    answer = json.loads(out)
    assert answer["slurm"] is None
    return code, {row["name"]: row for row in answer["steps"]}


def logs() -> str:
    """What the jobs have printed."""
    return "\n".join(path.read_text() for path in sorted(Path("out/submit/logs").iterdir()))
