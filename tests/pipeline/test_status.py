"""kdpipe status: of a submission with recorded answers of Slurm, of a sweep without Slurm, of a cache's extraction."""

import json
import os
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from tests.caches import fill_shard, make_cache, make_plan, make_samples
from tests.conftest import Main

from kdpipe.manifests.durable import canonical
from kdpipe.manifests.run import RUN_FILE, RunInputs, RunRecord
from kdpipe.manifests.running import alone_in
from kdpipe.manifests.specs import RunSpec
from kdpipe.manifests.submission import Job, Submission, Task, submission_folder
from kdpipe.pipeline.entries import entries_of
from kdpipe.pipeline.queue import SQUEUE, ask_slurm
from kdpipe.pipeline.standing import rows_of

INPUTS = RunInputs(student="s", tokenizer="t", caches=("c",), heldout_fraction=0.1, spec=RunSpec())
FINISHED = canonical(
    RunRecord(
        inputs=INPUTS, num_steps=100, num_tokens=9, num_skipped=0, metrics={"heldout_kl": 0.25}, files={}
    ).model_dump(mode="json")
)


def write_run(folder: Path, *, step: int = 0, ending: str | None = None, error: str = "", at: float = 100.0) -> Path:
    """A student's output: steps so far, and how it ended."""
    folder.mkdir(parents=True)
    events = [{"kind": "run", "command": "train"}, {"kind": "start", "num_steps": 100}]
    events += [{"kind": "step", "step": step}, {"kind": "eval", "step": step, "heldout_kl": 0.5}] if step else []
    if ending:
        events.append({"kind": ending} | ({"error": error, "exit_code": 1} if error else {}))
    (folder / "events.jsonl").write_text("".join(json.dumps({"time": at, **event}) + "\n" for event in events))
    if ending == "finished":
        (folder / RUN_FILE).write_bytes(FINISHED)
    return folder


def submit(out: Path, *jobs: tuple[str, int | None, Sequence[Task], tuple[str, ...]]) -> None:
    """The record of a submission: (name, number, tasks, needs) of each job."""
    record = Submission(
        folder=str(out),
        jobs=tuple(
            Job(
                name=f"x-{name}", digest=name, script=f"{name}.sbatch", needs=needs, tasks=tuple(tasks), sent=1.0, id=id
            )
            for name, id, tasks, needs in jobs
        ),
    )
    submission_folder(out).mkdir(parents=True)
    (submission_folder(out) / "jobs.json").write_bytes(canonical(record.model_dump(mode="json")))


def student(out: Path, name: str, index: int | None = None) -> Task:
    return Task(index=index, step=f"train/{name}", output=str(out / name))


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """An squeue that gives an answer, in the fields it is asked for, and counts how often; no accounting."""

    def answer(*jobs: tuple[str, str, str]) -> Path:
        folder = tmp_path / "bin"
        folder.mkdir()
        fields = list(SQUEUE.values())
        lines = [(job, state, reason, "n1", "2", "2026-11-30T11:20:00") for job, state, reason in jobs]
        text = "".join(
            "".join(f"{value:<{width}}|" for value, width in zip(line, fields, strict=True)) + "\n" for line in lines
        )
        (folder / "answer").write_text(text)
        calls, disabled = folder / "calls", "Slurm accounting storage is disabled"
        (folder / "squeue").write_text(f'#!/bin/sh\necho "squeue $*" >> {calls}\ncat {folder / "answer"}\n')
        (folder / "sacct").write_text(f'#!/bin/sh\necho "sacct $*" >> {calls}\necho "{disabled}" >&2\nexit 1\n')
        for name in ("squeue", "sacct"):
            (folder / name).chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
        return calls

    return answer


def test_a_submission_is_one_table_and_one_call(main: Main, slurm: Callable[..., Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    write_run(out / "done", step=100, ending="finished")
    write_run(out / "again", step=31, ending="terminated", error="stopped by SIGUSR2; saved")
    write_run(out / "bad", step=3, ending="failed", error="E-CHECK step 4: not finite")
    students = [student(out, name, index) for index, name in enumerate(("done", "again", "bad", "new"), start=1)]
    report = Task(index=None, step="report", output=str(out / "report.html"))
    names = tuple(task.step for task in students)
    submit(out, ("train", 17, students, ()), ("report", 18, [report], names))
    calls = slurm(
        ("17_2", "PENDING", "BeginTime"),
        ("17_3", "FAILED", "NonZeroExitCode"),
        ("17_4", "RUNNING", "None"),
        ("18", "PENDING", "Dependency"),
    )
    code, text, err = main("status", out, "--json")
    assert (code, err) == (1, "")
    steps = {row["name"]: row for row in json.loads(text)["steps"]}
    assert {name: row["state"] for name, row in steps.items()} == {
        "train/done": "finished",
        "train/again": "waiting",
        "train/bad": "failed",
        "train/new": "running",
        "report": "waiting",
    }
    done, again = steps["train/done"], steps["train/again"]
    assert (done["heldout_kl"], done["step"], done["num_steps"]) == (0.25, 100, 100)
    assert (again["step"], again["job"], again["requeues"], again["heldout_kl"]) == (31, "17_2", 2, 0.5)
    assert "before: stopped by SIGUSR2" in again["why"]
    assert steps["train/new"]["log"].endswith("submit/logs/train-17_4.txt")
    assert calls.read_text().count("\n") == 1, "one call of squeue"
    code, text, _ = main("status", out)
    lines = text.splitlines()
    assert lines[0].split() == ["NAME", "STATE", "STEP", "HELD-OUT", "KL", "JOB", "NODE", "REQUEUES", "WHY"]
    assert lines[-1] == "5 steps: 2 waiting, 1 finished, 1 failed, 1 running"


def test_what_slurm_has_forgotten_is_told_by_the_runs(main: Main, slurm: Callable[..., Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    write_run(out / "stopped", step=31, ending="terminated", error="stopped by SIGTERM; saved")
    students = [student(out, name, index) for index, name in enumerate(("stopped", "gone"), start=1)]
    submit(out, ("train", 17, students, ()))
    calls = slurm()
    code, text, _ = main("status", out, "--json")
    assert (code, [row["state"] for row in json.loads(text)["steps"]]) == (2, ["interrupted", "lost"])
    assert [line.split()[0] for line in calls.read_text().splitlines()] == ["squeue", "sacct"]


def test_a_finished_submission_asks_nobody(main: Main, slurm: Callable[..., Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    write_run(out / "a", step=100, ending="finished")
    submit(out, ("train", 17, [student(out, "a")], ()))
    calls = slurm()
    assert main("status", out)[0] == 0
    assert not calls.exists()


def test_without_slurm_its_silence_is_said_and_the_runs_tell(
    main: Main, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    write_run(out / "a", step=3, ending="failed", error="E-CHECK step 4: not finite")
    submit(out, ("train", 17, [student(out, "a")], ()))
    monkeypatch.setenv("PATH", str(tmp_path))
    code, text, err = main("status", out, "--json")
    assert (code, json.loads(text)["slurm"]) == (1, "squeue is not installed here")
    assert "squeue is not installed here" in err


def test_a_local_sweep_tells_running_from_killed_from_not_begun(main: Main, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (tmp_path / "run.toml").write_text(
        f'student.path = "s"\ncache.path = "c"\ntrain.output = "{out}"\n[sweep.grid]\ntrain.seed = [1, 2, 3, 4]\n'
    )
    write_run(out / "seed-1", step=100, ending="finished")
    write_run(out / "seed-2", step=7)
    write_run(out / "seed-3", step=9)
    (out / "seed-4").mkdir()
    (out / "seed-4" / "log.txt").write_text("E-CONFIG: an older try\nprepare: 3 samples\n")
    with alone_in(out / "seed-2"):
        code, text, _ = main("status", tmp_path / "run.toml", "--json")
    steps = json.loads(text)["steps"]
    assert [row["name"] for row in steps] == [f"train/seed-{number}" for number in (1, 2, 3, 4)]
    assert [row["state"] for row in steps] == ["finished", "running", "interrupted", "absent"]
    assert [row["job"] for row in steps] == [None] * 4
    assert code == 2
    (out / "seed-4" / "log.txt").write_text("E-STUDENT s: no such folder\n")
    code, text, _ = main("status", tmp_path / "run.toml", "--json")
    refused = json.loads(text)["steps"][3]
    assert (code, refused["state"], refused["why"]) == (1, "failed", "E-STUDENT s: no such folder")
    assert [row["name"] for row in json.loads(main("status", out, "--json")[1])["steps"]] == [
        *("seed-1", "seed-2", "seed-3", "seed-4")
    ], "a folder has what lies in it"
    assert json.loads(main("status", out / "seed-1", "--json")[1])["steps"][0]["state"] == "finished"


def test_a_local_sweeps_own_events_hide_none_of_its_runs(main: Main, tmp_path: Path) -> None:
    out = tmp_path / "out"
    write_run(out / "a", step=100, ending="finished")
    write_run(out / "b", step=7, ending="failed", error="E-CHECK step 8: not finite")
    events = [{"time": 1.0, "kind": "run", "command": "sweep"}, {"time": 2.0, "kind": "finished"}]
    (out / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    code, text, _ = main("status", out, "--json")
    assert [(row["name"], row["state"]) for row in json.loads(text)["steps"]] == [("a", "finished"), ("b", "failed")]
    assert code == 1


def session(cache: Path, name: str, part: list[int] | None, *events: dict[str, object], pid: int = 0) -> None:
    run = {"kind": "run", "command": "extract", "host": platform.node(), "pid": pid, "part": part}
    lines = [json.dumps({"time": 100.0, **event}) for event in (run, *events)]
    (cache / "runs").mkdir(exist_ok=True)
    (cache / "runs" / f"{name}.jsonl").write_text("\n".join(lines) + "\n")


def test_parts_of_an_extraction_are_told_by_their_last_sessions(main: Main, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    plan = make_plan(cache, make_samples(21))
    session(cache, "1-a", [1, 2], {"kind": "plan", "missing": [0, 1]}, {"kind": "terminated", "error": "SIGTERM"})
    session(cache, "2-b", [2, 2], {"kind": "plan", "missing": [2, 3]}, {"kind": "shard", "shard": 2}, pid=os.getpid())
    session(cache, "3-c", [1, 2], {"kind": "plan", "missing": [1]}, {"kind": "failed", "error": "E-GATE: swapped"})
    code, text, _ = main("status", cache, "--json")
    rows = json.loads(text)["steps"]
    assert [(row["name"], row["state"], row["step"], row["num_steps"]) for row in rows] == [
        ("extract 1/2", "failed", 0, 1),
        ("extract 2/2", "running", 1, 2),
    ]
    assert (code, rows[0]["why"]) == (1, "E-GATE: swapped")
    session(cache, "4-d", [3, 3], {"kind": "plan", "missing": [3]}, pid=os.getpid())
    rows = json.loads(main("status", cache, "--json")[1])["steps"]
    assert [(row["name"], row["state"]) for row in rows] == [("extract 3/3", "running")], "it was shared anew"
    for number in range(len(plan.shards)):
        fill_shard(cache, number)
    assert {row["state"] for row in json.loads(main("status", cache, "--json")[1])["steps"]} == {"finished"}


def extracted(cache: Path, part: int, parts: int) -> Task:
    return Task(index=part, step="extract", part=part, parts=parts, output=str(cache))


def test_a_part_that_was_sent_again_alone_keeps_its_name(
    main: Main, slurm: Callable[..., Path], tmp_path: Path
) -> None:
    out, cache = tmp_path / "out", tmp_path / "cache"
    of_two, of_three = [extracted(cache, part, 2) for part in (1, 2)], [extracted(cache, part, 3) for part in (1, 2, 3)]
    submit(out, ("extract", 4, of_three, ()), ("extract", 5, of_two, ()), ("extract", 6, of_two[1:], ()))
    slurm(("5_1", "RUNNING", "None"), ("6_2", "PENDING", "Resources"))
    rows = json.loads(main("status", out, "--json")[1])["steps"]
    assert [(row["name"], row["state"], row["job"]) for row in rows] == [
        ("extract 1/2", "running", "5_1"),
        ("extract 2/2", "waiting", "6_2"),
    ], "the parts of before, of three, are no more"


def test_parts_that_were_submitted_have_their_jobs(main: Main, slurm: Callable[..., Path], tmp_path: Path) -> None:
    out, cache = tmp_path / "out", tmp_path / "cache"
    make_plan(cache, make_samples(21))
    session(cache, "1-a", [1, 2], {"kind": "plan", "missing": [0]}, {"kind": "finished"})
    parts = [extracted(cache, part, 2) for part in (1, 2)]
    seal = Task(index=None, step="seal", output=str(cache))
    submit(out, ("extract", 5, parts, ()), ("seal", 6, [seal], ("extract",)))
    slurm(("5_2", "FAILED", "NonZeroExitCode"), ("6", "CANCELLED", "DependencyNeverSatisfied"))
    logs = submission_folder(out) / "logs"
    logs.mkdir()
    (logs / "extract-5_2.txt").write_text("prepare: 0 samples\nE-TEACHER teacher: no such folder\n")
    code, text, _ = main("status", out, "--json")
    rows = json.loads(text)["steps"]
    assert [(row["name"], row["state"], row["job"]) for row in rows] == [
        ("extract 1/2", "finished", "5_1"),
        ("extract 2/2", "failed", "5_2"),
        ("seal", "blocked", "6"),
    ]
    assert rows[1]["why"] == "E-TEACHER teacher: no such folder"
    assert rows[2]["why"] == "cannot start without extract 2/2 (failed)"
    assert code == 1


def test_a_seal_that_slurm_has_forgotten_is_finished_with_a_whole_cache(
    main: Main, slurm: Callable[..., Path], tmp_path: Path
) -> None:
    out, cache = tmp_path / "out", make_cache(tmp_path / "cache").path
    submit(out, ("seal", 6, [Task(index=None, step="seal", output=str(cache))], ("extract",)))
    slurm()
    code, text, _ = main("status", out, "--json")
    assert (code, json.loads(text)["steps"][0]["state"]) == (0, "finished")


def test_a_place_without_a_run_is_refused_in_a_line(main: Main, tmp_path: Path) -> None:
    for place, said in ((tmp_path, "no run is here"), (tmp_path / "no", "there is no such run file or folder")):
        code, out, err = main("status", place)
        assert (code, out, err.count("\n")) == (4, "", 1)
        assert said in err


def test_a_thousand_runs_take_one_call_and_a_moment(slurm: Callable[..., Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    tasks = [student(out, f"seed-{number}", number) for number in range(1000)]
    for number in range(1000):
        ending = ("finished", "terminated", None)[number % 3]
        write_run(out / f"seed-{number}", step=40, ending=ending, error="stopped" if ending == "terminated" else "")
    submit(out, ("train", 17, tasks, ()))
    calls = slurm(*((f"17_{number}", "RUNNING", "None") for number in range(1000)))
    began = time.process_time()
    entries = entries_of(out)
    queue = ask_slurm(entry.number for entry in entries if entry.number and not entry.is_finished)
    rows = rows_of(entries, queue)
    seconds = time.process_time() - began  # of this process alone: others share the machine
    assert len(rows) == 1000
    assert {row.state for row in rows} == {"finished", "running"}
    assert calls.read_text().count("\n") == 1
    assert seconds < 3.0, "some 0.5 s on an idle core"
