"""What Slurm answers, read as it was recorded, and how often it is asked."""

import os
import subprocess
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

import pytest

from kdpipe.pipeline import queue
from kdpipe.pipeline.queue import Job, Queue, ask_slurm, read_sacct, read_squeue

RECORDED = Path(__file__).parent / "recorded"
SQUEUE = (RECORDED / "squeue-22.05.8.txt").read_text()
SACCT = (RECORDED / "sacct-23.02.txt").read_text()


def when(text: str) -> float:
    return datetime.fromisoformat(text).timestamp()


def test_jobs_of_22_05_are_read_in_every_state() -> None:
    jobs = {job.job: job for job in read_squeue(SQUEUE)}
    assert jobs["9"] == Job(job="9", state="PENDING", reason="DependencyNeverSatisfied", restarts=0)
    assert jobs["8"].reason == "NonZeroExitCode"
    assert (jobs["10"].state, jobs["10"].reason) == ("CANCELLED", "DependencyNeverSatisfied")
    assert [jobs[f"11_{task}"].reason for task in range(4)] == ["Dependency"] * 4, "a line for each task"
    assert (jobs["12_1"].state, jobs["12_1"].restarts) == ("PENDING", 1), "requeued: the newer line counts"
    running = jobs["12_3"]
    assert (running.nodes, running.started, running.reason) == ("n1", when("2026-11-30T12:13:43"), "")


def test_accounts_are_read_with_tasks_that_never_began() -> None:
    jobs = {job.job: job for job in read_sacct(SACCT)}
    assert list(jobs) == ["17", "18_0", "18_1", "18_2", "18_3", "18_4", "18_5", "18_8"]
    assert (jobs["18_0"].state, jobs["18_2"].exit_code, jobs["18_1"].nodes) == ("CANCELLED", 75, "n[1-2]")
    assert (jobs["18_8"].nodes, jobs["18_8"].started) == ("", None)


class Slurm:
    """Answers by the name of the command, and keeps what it was asked."""

    def __init__(self, **answers: tuple[int, str, str]) -> None:
        self.answers, self.asked = answers, []

    def __call__(self, command: Sequence[str]) -> subprocess.CompletedProcess[str]:
        self.asked.append(list(command))
        return subprocess.CompletedProcess(list(command), *self.answers[command[0]])


def test_one_call_for_all_jobs_where_the_controller_knows_them() -> None:
    slurm = Slurm(squeue=(0, SQUEUE, ""))
    found = ask_slurm(["8", "12_1", "12_2", "12_1"], slurm)
    assert list(found.jobs) == ["8", "12_1", "12_2"]
    assert [command[0] for command in slurm.asked] == ["squeue"]
    assert "--jobs=8,12" in slurm.asked[0], "an array is named once"


def test_the_forgotten_are_looked_for_in_the_accounts_once() -> None:
    slurm = Slurm(squeue=(0, SQUEUE, ""), sacct=(0, SACCT, ""))
    found = ask_slurm(["8", "17", "18_4", "99"], slurm)
    assert (found.jobs["17"].state, found.jobs["18_4"].state) == ("COMPLETED", "CANCELLED")
    assert "99" not in found.jobs
    assert [command[0] for command in slurm.asked] == ["squeue", "sacct"]
    assert "--jobs=17,18,99" in slurm.asked[1]


def test_a_controller_that_has_forgotten_all_is_no_silence() -> None:
    forgotten = (1, "", "slurm_load_jobs error: Invalid job id specified\n")
    slurm = Slurm(squeue=forgotten, sacct=(1, "", "Slurm accounting storage is disabled\n"))
    assert ask_slurm(["99"], slurm) == Queue()


def test_a_silent_controller_says_why_and_is_not_asked_again() -> None:
    slurm = Slurm(squeue=(1, "", "slurm_load_jobs error: Unable to contact slurm controller (connect failure)\n"))
    found = ask_slurm(["8"], slurm)
    assert "Unable to contact slurm controller" in found.silence
    assert len(slurm.asked) == 1


def test_nobody_is_asked_of_no_jobs() -> None:
    assert ask_slurm([], Slurm()) == Queue()


def test_no_slurm_and_a_hanging_one_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert ask_slurm(["1"]).silence == "squeue is not installed here"
    (tmp_path / "squeue").write_text("#!/bin/sh\nexec /bin/sleep 60\n")
    (tmp_path / "squeue").chmod(0o755)
    monkeypatch.setattr(queue, "ASKED_S", 0.2)
    assert ask_slurm(["1"]).silence.startswith("squeue did not answer within")


def test_what_the_user_has_set_for_squeue_changes_no_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "squeue").write_text('#!/bin/sh\necho "$SQUEUE_FORMAT2.$SLURM_TIME_FORMAT" >&2\nexit 1\n')
    (tmp_path / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("SQUEUE_FORMAT2", "jobid")
    monkeypatch.setenv("SLURM_TIME_FORMAT", "relative")
    assert ask_slurm(["1"]).silence == ".standard"
