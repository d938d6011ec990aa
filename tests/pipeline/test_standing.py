"""Who is believed of a step: its own record, the controller, the accounts; and what is said of it."""

from pathlib import Path

import pytest

from kdpipe.manifests.submission import Job as Sent
from kdpipe.manifests.submission import Task
from kdpipe.pipeline.queue import Job, Queue
from kdpipe.pipeline.runs import RunState
from kdpipe.pipeline.standing import Entry, Row, exit_code_of, rows_of, summary, table

OUT = Path("runs/a")


def sent(name: str, number: int | None = 7, needs: tuple[str, ...] = ()) -> Sent:
    task = Task(index=None, step=name, output=str(OUT))
    return Sent(name=name, digest="d", script=f"{name}.sbatch", needs=needs, tasks=(task,), sent=0.0, id=number)


def entry(own: RunState | None, name: str = "train/a", number: int | None = 7, **more: object) -> Entry:
    job = sent(name, number, more.pop("needs", ()))  # type: ignore[arg-type]
    return Entry(name=name, output=OUT, own=own, sent=job, task=job.tasks[0], **more)  # type: ignore[arg-type]


def run(status: str, error: str | None = None, last_event: float | None = 50.0) -> RunState:
    return RunState(output=OUT, status=status, step=31, num_steps=100, error=error, last_event=last_event)  # type: ignore[arg-type]


STOPPED = run("interrupted", "stopped by SIGUSR2; its state after step 31 is saved")
FAILED = run("failed", "E-CHECK step 3: not finite")
ABSENT = run("absent", last_event=None)
KILLED = run("killed")
AT_WORK = run("running")
CASES = {
    "finished, whatever its job is called": (run("finished"), ("RUNNING", "", 40.0), "finished", ""),
    "at work": (AT_WORK, ("RUNNING", "", 40.0), "running", ""),
    "at work, stale in the accounts": (AT_WORK, ("PREEMPTED", "", 10.0), "running", ""),
    "its job begins": (ABSENT, ("RUNNING", "", 60.0), "running", "starts"),
    "it begins again after a preemption": (STOPPED, ("RUNNING", "", 60.0), "running", "starts; before: stopped by"),
    "it has just been stopped, its job ends": (
        STOPPED,
        ("COMPLETING", "", 40.0),
        "running",
        "ends: stopped by SIGUSR2",
    ),
    "it has just failed, its job ends": (FAILED, ("COMPLETING", "", 40.0), "failed", "not finite"),
    "suspended": (AT_WORK, ("SUSPENDED", "", 40.0), "waiting", "suspended by Slurm"),
    "queued again": (STOPPED, ("PENDING", "BeginTime", None), "waiting", "before: stopped by SIGUSR2"),
    "queued again after its node died": (KILLED, ("PENDING", "Resources", None), "waiting", "before: it was killed"),
    "queued again, its lock still seen": (AT_WORK, ("PENDING", "Priority", None), "waiting", "waits its turn"),
    "waits for nobody we know": (ABSENT, ("PENDING", "QOSMaxJobsPerUserLimit", None), "waiting", "Slurm: QOSMax"),
    "failed by its own word": (FAILED, ("FAILED", "NonZeroExitCode", 40.0), "failed", "E-CHECK step 3"),
    "failed before it could say": (ABSENT, ("FAILED", "NonZeroExitCode", 40.0), "failed", "see its log"),
    "out of memory": (KILLED, ("OUT_OF_MEMORY", "", 40.0), "failed", "want of memory"),
    "at its time limit": (KILLED, ("TIMEOUT", "", 40.0), "interrupted", "reached its time limit"),
    "stopped, and not queued again": (STOPPED, ("FAILED", "NonZeroExitCode", 40.0), "interrupted", "step 31 is saved"),
    "its node failed": (KILLED, ("NODE_FAIL", "", 40.0), "interrupted", "its node failed"),
    "completed half-done": (STOPPED, ("COMPLETED", "", 40.0), "interrupted", "ended as COMPLETED, but it is not"),
    "cancelled at work": (STOPPED, ("CANCELLED", "", 40.0), "cancelled", "goes on from what is saved"),
    "cancelled in the accounts": (ABSENT, ("CANCELLED", "", None), "cancelled", "cancelled"),
    "forgotten, finished": (run("finished"), None, "finished", ""),
    "forgotten, at work": (AT_WORK, None, "running", ""),
    "forgotten, failed": (FAILED, None, "failed", "E-CHECK"),
    "forgotten, interrupted": (STOPPED, None, "interrupted", "stopped by SIGUSR2"),
    "forgotten, killed": (KILLED, None, "interrupted", "killed"),
    "forgotten, and nothing is left": (ABSENT, None, "lost", "Slurm knows no such job any more"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_students_own_record_and_slurm_are_weighed(case: str) -> None:
    own, said, state, why = CASES[case]
    jobs = {}
    if said is not None:
        jobs["7"] = Job(job="7", state=said[0], reason=said[1], started=said[2], nodes="n1", restarts=2)
    (row,) = rows_of([entry(own)], Queue(jobs=jobs))
    assert row.state == state
    assert why in row.why if why else not row.why
    assert "\n" not in row.why
    assert (row.job, row.requeues) == ("7", 2 if said else None)


def test_a_step_that_cannot_start_names_the_one_that_failed() -> None:
    jobs = {
        "7": Job(job="7", state="FAILED", reason="NonZeroExitCode"),
        "8": Job(job="8", state="PENDING", reason="DependencyNeverSatisfied"),
        "9": Job(job="9", state="CANCELLED", reason="DependencyNeverSatisfied"),
        "10": Job(job="10", state="CANCELLED", reason=""),
    }
    entries = [entry(FAILED, "extract")]
    entries += [entry(ABSENT, f"train/{n}", n, needs=("extract",)) for n in (8, 9, 10, 99)]
    entries += [entry(None, "report", 10, needs=("extract",), whatever=True)]
    rows = rows_of(entries, Queue(jobs=jobs))
    assert [row.state for row in rows] == ["failed", *["blocked"] * 4, "cancelled"]
    assert {row.why for row in rows[1:5]} == {"cannot start without extract (failed)"}, "99 is forgotten by Slurm"


def test_a_step_without_a_record_is_what_slurm_says_or_what_lies_there(tmp_path: Path) -> None:
    log = tmp_path / "seal-7.txt"
    log.write_text("verify: 3 shards\nE-CORRUPT c/shards/000001.safetensors: committed, but the file is gone\nrc 1\n")
    for state, made, wanted in (
        ("RUNNING", False, "running"),
        ("COMPLETED", False, "finished"),
        ("FAILED", False, "failed"),
        ("CANCELLED", False, "cancelled"),
        ("NODE_FAIL", False, "interrupted"),
        (None, True, "finished"),
        (None, False, "failed"),
    ):
        jobs = {"7": Job(job="7", state=state)} if state else {}
        (row,) = rows_of([entry(None, "seal", made=made, log=log)], Queue(jobs=jobs))
        assert row.state == wanted
        if wanted == "failed":
            assert row.why == "E-CORRUPT c/shards/000001.safetensors: committed, but the file is gone"


def test_a_job_whose_number_was_not_seen_and_a_silent_slurm_are_no_failure() -> None:
    (row,) = rows_of([entry(ABSENT, number=None)], Queue())
    assert (row.state, row.job) == ("absent", None)
    assert "kdpipe submit looks for it" in row.why
    (row,) = rows_of([entry(ABSENT)], Queue(silence="squeue is not installed here"))
    assert row.state == "absent"


def test_exit_codes_tell_failed_from_stopped_from_under_way() -> None:
    def rows(*states: str) -> list[Row]:
        return [Row(name="a", state=state) for state in states]  # type: ignore[arg-type]

    assert exit_code_of(rows("finished", "running", "waiting")) == 0
    assert exit_code_of(rows("finished", "interrupted")) == exit_code_of(rows("absent")) == 2
    assert exit_code_of(rows("lost", "cancelled")) == 2
    assert exit_code_of(rows("finished", "running", "absent")) == 0, "its turn comes"
    assert exit_code_of(rows("running", "interrupted")) == 2
    assert exit_code_of(rows("running", "failed", "cancelled")) == exit_code_of(rows("blocked")) == 1
    assert exit_code_of([]) == 0


def test_the_table_has_the_columns_that_say_something() -> None:
    plain = table([Row(name="a", state="running", step=31, num_steps=1200), Row(name="bcd", state="absent")])
    assert plain.splitlines() == ["NAME  STATE    STEP", "a     running  31/1,200", "bcd   absent"]
    rows = [Row(name="a", state="finished", heldout_kl=0.12345, job="7_1", node="n1", requeues=2, why="w")]
    titles = ["NAME", "STATE", "HELD-OUT", "KL", "JOB", "NODE", "REQUEUES", "WHY"]
    assert table(rows).splitlines()[0].split() == titles
    assert "0.1235" in table(rows)
    assert summary([*rows, *rows, Row(name="b", state="failed")]) == "3 steps: 2 finished, 1 failed"
