"""Submitting: every piece of work is sent once, whatever is lost on the way; what is sent again is what is missing."""

import json
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
from tests.conftest import Bench, Main
from tests.finished import write_record
from tests.pipeline import fake_slurm

from kdpipe.manifests.errors import BusyError, ConfigError, NoAnswerError, RefusedError
from kdpipe.manifests.running import alone_in
from kdpipe.manifests.specs import load, members_of
from kdpipe.manifests.submission import RESEND_S, read_submission, submission_folder
from kdpipe.pipeline import submit as submit_module
from kdpipe.pipeline.cluster import Cluster
from kdpipe.pipeline.preflight import preflight
from kdpipe.pipeline.steps import Disk
from kdpipe.pipeline.submit import Sent, Wanted, cancel, is_all_active, submit

RUN = """
[teacher]
path = "teacher"
[data]
paths = ["data.jsonl"]
[cache]
path = "cache"
[student]
path = "student"
[sweep]
output = "out"
grid = { "train.lr" = [1e-3, 1e-4] }
runs = [{ name = "a" }, { name = "b", slurm.mem = "8G" }]
[slurm]
extract_tasks = 3
"""
IN_ORDER = ["out-extract", "out-seal", "out-train", "out-train-2", "out-report"]


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a fake Slurm, whose commands are the ones that PATH leads to; the run file is beside it."""
    folder = tmp_path / "slurm"
    monkeypatch.setenv("PATH", f"{fake_slurm.install(folder)}:/usr/bin:/bin")
    monkeypatch.setenv("FAKE_SLURM", str(folder))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.toml").write_text(RUN)
    return folder


@pytest.fixture
def send(slurm: Path, tmp_path: Path) -> Callable[..., Sent]:
    """Submit run.toml with what is on the disk."""

    def run(*sets: str, disk: Disk | None = None) -> Sent:
        config = tmp_path / "run.toml"
        wanted = Wanted(config=config, run=load(config, sets), sets=sets, folder=tmp_path)
        return submit(wanted, disk or Disk(), Cluster(seconds=60.0))

    return run


Send = Callable[..., Sent]


def names(slurm: Path) -> list[str]:
    """Of the jobs that Slurm has, in the order in which they were accepted."""
    return list(dict.fromkeys(job[5] for job in fake_slurm.jobs(slurm)))


def dependencies(slurm: Path) -> list[str]:
    found = []
    for words in fake_slurm.calls(slurm, "sbatch"):
        found += [word.partition("=")[2] for word in words if word.startswith("--dependency=")] or [""]
    return found


def test_one_submission_sends_each_kind_of_job_once_and_joins_them(slurm: Path, send: Send, tmp_path: Path) -> None:
    sent = send()
    assert names(slurm) == [job.name for job in sent.jobs] == IN_ORDER
    assert dependencies(slurm) == ["", "afterok:7", "afterok:8", "afterok:8", "afterany:9:10"]
    assert len(fake_slurm.calls(slurm, "squeue")) == 1
    record = read_submission(tmp_path / "out")
    assert record is not None
    assert [job.id for job in record.jobs] == [7, 8, 9, 10, 11]
    assert [task.part for task in record.jobs[0].tasks] == [1, 2, 3]
    assert [task.step for task in record.jobs[2].tasks] == ["train/a_lr-0.001", "train/a_lr-0.0001"]
    assert (tmp_path / "out" / "submit" / "run.toml").read_text() == RUN
    comments = {job[5]: job[4] for job in fake_slurm.jobs(slurm)}
    assert comments == {job.name: job.comment for job in record.jobs}


def test_a_second_submission_sends_nothing_while_jobs_wait_or_run(slurm: Path, send: Send) -> None:
    send()
    fake_slurm.set_state(slurm, "RUNNING", "7")
    again = send()
    assert (again.jobs, again.active_before) == ((), 9)
    assert len(fake_slurm.calls(slurm, "sbatch")) == len(IN_ORDER)


@pytest.mark.parametrize("fault", ["hang", "lose"])
@pytest.mark.parametrize("at", range(2))
def test_a_job_whose_answer_is_lost_is_found_and_not_sent_again(
    slurm: Path, send: Send, tmp_path: Path, fault: str, at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    arm = Cluster.sbatch

    def armed(cluster: Cluster, script: Path, *words: str) -> int:
        if len(fake_slurm.calls(slurm, "sbatch")) == at:
            (slurm / fault).touch()
            cluster = Cluster(seconds=3.0)
        return arm(cluster, script, *words)

    monkeypatch.setattr(Cluster, "sbatch", armed)
    sent = send()
    assert names(slurm) == IN_ORDER
    assert len(fake_slurm.calls(slurm, "sbatch")) == len(IN_ORDER)
    assert [job.id for job in sent.jobs] == [7, 8, 9, 10, 11]
    assert len(dependencies(slurm)) == 5


def test_a_submit_that_was_killed_before_the_answer_finds_its_job_later(
    slurm: Path, send: Send, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(cluster: Cluster, script: Path, *words: str) -> int:
        sbatch(cluster, script, *words)
        raise KeyboardInterrupt

    sbatch = Cluster.sbatch
    monkeypatch.setattr(Cluster, "sbatch", killed)
    with pytest.raises(KeyboardInterrupt):
        send()
    record = read_submission(tmp_path / "out")
    assert record is not None
    assert [job.id for job in record.jobs] == [None]
    monkeypatch.setattr(Cluster, "sbatch", sbatch)
    assert [job.name for job in send().jobs] == IN_ORDER[1:]
    assert names(slurm) == IN_ORDER
    assert len(fake_slurm.jobs(slurm)) == 9


def test_a_lost_record_does_not_send_again_what_waits(slurm: Path, send: Send, tmp_path: Path) -> None:
    send()
    (submission_folder(tmp_path / "out") / "jobs.json").unlink()
    assert [job.id for job in send().jobs] == [7, 8, 9, 10, 11]
    assert len(fake_slurm.calls(slurm, "sbatch")) == len(IN_ORDER)


def test_an_answer_that_is_lost_and_not_found_is_left_to_the_next_submit(
    slurm: Path, send: Send, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(submit_module.time, "sleep", lambda seconds: None)

    def silent(cluster: Cluster, script: Path, *words: str) -> int:
        raise NoAnswerError("no answer", where="sbatch")

    monkeypatch.setattr(Cluster, "sbatch", silent)
    with pytest.raises(NoAnswerError) as caught:
        send()
    assert caught.value.exit_code == 75
    monkeypatch.undo()
    monkeypatch.setenv("PATH", f"{slurm / 'bin'}:/usr/bin:/bin")
    monkeypatch.setenv("FAKE_SLURM", str(slurm))
    with pytest.raises(NoAnswerError, match=r"out-extract, sent at .* may still come"):
        send()
    assert fake_slurm.calls(slurm, "sbatch") == []
    pass_time(monkeypatch)
    assert [job.name for job in send().jobs] == IN_ORDER


def pass_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """So much that a job without an answer is taken for lost."""
    then = time.time() + RESEND_S + 1.0
    monkeypatch.setattr(submit_module.time, "time", lambda: then)


@pytest.fixture
def late(slurm: Path, send: Send, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Slurm that has taken the first job of a submission, and has neither said nor shown it yet."""
    (slurm / "late").touch()
    monkeypatch.setattr(submit_module.time, "sleep", lambda seconds: None)
    with pytest.raises(NoAnswerError, match=r"timed out .* may still come"):
        send()
    return slurm


def test_a_job_that_slurm_accepts_late_is_not_sent_twice(late: Path, send: Send, tmp_path: Path) -> None:
    with pytest.raises(NoAnswerError, match=r"squeue --name=out-extract.* run the same command again"):
        send()
    with pytest.raises(NoAnswerError, match="0 tasks of it are ended, but out-extract"):
        cancel(tmp_path / "out", Cluster())
    fake_slurm.accept(late)
    assert [job.name for job in send().jobs] == IN_ORDER[1:]
    assert sorted(names(late)) == sorted(IN_ORDER)
    assert len(fake_slurm.jobs(late)) == 9


@pytest.mark.parametrize("how", ["submit", "cancel"])
def test_a_job_that_comes_when_it_was_taken_for_lost_is_ended(
    late: Path, send: Send, tmp_path: Path, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pass_time(monkeypatch)
    assert [job.id for job in send().jobs] == [7, 8, 9, 10, 11]
    fake_slurm.accept(late)
    config = tmp_path / "run.toml"
    wanted = Wanted(config=config, run=load(config), sets=(), folder=tmp_path)
    if how == "submit":
        assert not is_all_active(wanted, Disk(), Cluster())
        again = send()
        assert (again.jobs, [piece.task_id for piece in again.copies]) == ((), ["97_1", "97_2", "97_3"])
        assert {job[0] for job in fake_slurm.jobs(late) if job[2] == "CANCELLED"} == {"97"}
        assert is_all_active(wanted, Disk(), Cluster())
    else:
        assert len(cancel(tmp_path / "out", Cluster())) == 12
        assert {job[2] for job in fake_slurm.jobs(late)} == {"CANCELLED"}


def test_what_slurm_refuses_is_its_own_words_and_is_not_recorded(slurm: Path, send: Send, tmp_path: Path) -> None:
    (slurm / "deny").touch()
    with pytest.raises(RefusedError, match="Batch job submission failed: Invalid account"):
        send()
    record = read_submission(tmp_path / "out")
    assert record is not None
    assert record.jobs == ()
    assert [job.name for job in send().jobs] == IN_ORDER


def test_only_the_student_that_failed_is_sent_again_with_a_new_report(slurm: Path, send: Send, tmp_path: Path) -> None:
    send()
    fake_slurm.set_state(slurm, "COMPLETED")
    fake_slurm.set_state(slurm, "FAILED", "9_2")
    done = [member for member in members_of(load(Path("run.toml"))) if member.name != "a_lr-0.0001"]
    disk = Disk(complete=frozenset({Path("cache")}), finished=frozenset(member.name for member in done))
    again = send(disk=disk)
    assert [[task.step for task in job.tasks] for job in again.jobs] == [["train/a_lr-0.0001"], ["report"]]
    assert dependencies(slurm)[-2:] == ["", "afterany:12"]


def test_a_student_that_failed_while_others_run_gets_a_report_after_all_of_them(slurm: Path, send: Send) -> None:
    send()
    fake_slurm.set_state(slurm, "COMPLETED", "7", "8")
    fake_slurm.set_state(slurm, "RUNNING", "9", "10")
    fake_slurm.set_state(slurm, "FAILED", "9_2")
    again = send(disk=Disk(complete=frozenset({Path("cache")})))
    assert [[task.step for task in job.tasks] for job in again.jobs] == [["train/a_lr-0.0001"], ["report"]]
    # The report of before waited for less: it is ended, and the new one waits for the old tasks too.
    assert {job[0]: job[2] for job in fake_slurm.jobs(slurm)}["11"] == "CANCELLED"
    assert dependencies(slurm)[-1].split(":")[0] == "afterany"
    assert sorted(dependencies(slurm)[-1].split(":")[1:]) == ["10", "12", "9_1"]


def test_the_extraction_that_failed_for_good_is_sent_again_with_all_that_waited_for_it(slurm: Path, send: Send) -> None:
    send()
    fake_slurm.set_state(slurm, "FAILED", "7_2")
    again = send()  # its dependents are not ended by Slurm yet
    assert [job.name for job in again.jobs] == IN_ORDER
    assert [task.part for task in again.jobs[0].tasks] == [2]
    assert {job[0] for job in fake_slurm.jobs(slurm) if job[2] == "CANCELLED"} == {"8", "9", "10", "11"}
    assert dependencies(slurm)[6] == "afterok:7_1:7_3:12"


def test_a_changed_run_file_is_refused_while_jobs_read_the_old_one(slurm: Path, send: Send, tmp_path: Path) -> None:
    send()
    fake_slurm.set_state(slurm, "COMPLETED", "7")
    fake_slurm.set_state(slurm, "FAILED", "8")
    (tmp_path / "run.toml").write_text(RUN + "qos = 'x'\n")
    with pytest.raises(ConfigError, match=r"jobs of another version .* kdpipe cancel"):
        send(disk=Disk(finished=frozenset({"b_lr-0.001"})))
    fake_slurm.set_state(slurm, "CANCELLED")
    assert [job.name for job in send().jobs] == IN_ORDER
    assert "#SBATCH --qos=x" in (tmp_path / "out/submit/train.sbatch").read_text()


def test_another_set_is_refused_though_all_that_is_left_waits(slurm: Path, send: Send, tmp_path: Path) -> None:
    send()
    sets = ("train.epochs=2",)
    config = tmp_path / "run.toml"
    wanted = Wanted(config=config, run=load(config, sets), sets=sets, folder=tmp_path)
    with pytest.raises(ConfigError, match="with another --set"):
        is_all_active(wanted, Disk(), Cluster())
    with pytest.raises(ConfigError, match="with another --set"):
        send(*sets)
    assert is_all_active(replace(wanted, sets=(), run=load(config)), Disk(), Cluster())


def test_a_second_submit_at_once_is_refused(send: Send, tmp_path: Path) -> None:
    (tmp_path / "out" / "submit").mkdir(parents=True)
    with alone_in(tmp_path / "out" / "submit"), pytest.raises(BusyError):
        send()


def test_cancel_ends_exactly_the_jobs_of_its_submission(slurm: Path, send: Send, tmp_path: Path) -> None:
    send()
    with open(slurm / "jobs.txt", "a") as file:
        file.write("99|N/A|RUNNING|None|of somebody else|other\n")
    fake_slurm.set_state(slurm, "COMPLETED", "7_1")
    ended = cancel(tmp_path / "out", Cluster())
    assert len(ended) == 8
    assert {job[0] for job in fake_slurm.jobs(slurm) if job[2] == "CANCELLED"} == {"7", "8", "9", "10", "11"}
    assert [job[2] for job in fake_slurm.jobs(slurm) if job[0] == "99"] == ["RUNNING"]
    first, second = fake_slurm.calls(slurm, "scancel")
    assert first == ["--quiet", "--state=PENDING", *second[1:]]
    assert cancel(tmp_path / "out", Cluster()) == []


def test_a_number_that_is_another_job_by_now_is_not_cancelled(slurm: Path, send: Send, tmp_path: Path) -> None:
    send()
    (slurm / "jobs.txt").write_text("7|1|RUNNING|None|of somebody else|other\n")
    assert cancel(tmp_path / "out", Cluster()) == []
    assert fake_slurm.calls(slurm, "scancel") == []


@pytest.fixture
def models(slurm: Path, bench: Bench, tmp_path: Path) -> None:
    """What the run file names is there: the command looks for it before it submits."""
    (tmp_path / "teacher").symlink_to(bench.teacher)
    (tmp_path / "student").symlink_to(bench.student)
    (tmp_path / "data.jsonl").touch()


@pytest.mark.usefixtures("models")
def test_the_command_submits_and_says_what(slurm: Path, main: Main) -> None:
    code, out, err = main("submit", "run.toml", "--json")
    assert code == 0, err
    assert [job["name"] for job in json.loads(out)["jobs"]] == IN_ORDER
    code, out, _ = main("submit", "run.toml")
    assert code == 0
    assert "all that is left waits or runs" in out
    code, out, _ = main("cancel", "out", "--json")
    assert (code, len(json.loads(out)["cancelled"])) == (0, 9)
    code, out, _ = main("cancel", "run.toml")
    assert (code, "no job of it waits or runs" in out) == (0, True)


def test_a_finished_sweep_submits_nothing(slurm: Path, main: Main) -> None:
    for member in members_of(load(Path("run.toml"))):
        write_record(member, metrics={"heldout_kl": 0.5})
    Path("out/report.html").touch()
    code, out, err = main("submit", "run.toml")
    assert (code, out.strip()) == (0, "jobs  none: every student is finished"), err
    assert fake_slurm.calls(slurm, "sbatch") == []


def test_a_dry_run_prints_the_scripts_and_needs_no_slurm(
    main: Main, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "/nowhere")
    Path("run.toml").write_text(RUN)
    code, out, _ = main("submit", "run.toml", "--dry-run")
    assert code == 0
    assert out.count("#!/bin/bash") == len(IN_ORDER)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run.toml"]
    code, _, err = main("submit", "run.toml")
    assert (code, "no sbatch on this machine" in err) == (4, True)


@pytest.mark.parametrize(
    ("sets", "says"),
    [
        (["slurm.partition=mian"], "there is no partition 'mian'; did you mean 'main'?"),
        (["slurm.partition=short", "slurm.time=2:00:00"], "2:00:00 is longer than partition short allows, 01:00:00"),
        (["slurm.partition=short", "slurm.nodes=3"], "3: partition short gives a job 2 at most"),
        (["slurm.extract_tasks=11"], "task 11 of an array; this cluster has 10 at most (MaxArraySize)"),
        (["sweep.command=stream", "slurm.nodes=2"], "kdpipe stream runs on one node"),
        (["teacher.path=nobody"], "E-INPUT nobody: teacher.path of extract: there is no such"),
        (["data.paths=['nothing.jsonl', 'data.jsonl']"], "data.paths of extract: there is no such"),
        (["cache.path=[]", "data.paths=['none', 'data.jsonl']"], "data.paths of train/a_lr-0.001: there is no such"),
        (["student.path=data.jsonl"], "student.path of train/a_lr-0.001: expected a model's folder"),
        (["loss.divergence=nothing"], "run a_lr-0.001: "),
    ],
)
@pytest.mark.usefixtures("models")
def test_what_cannot_work_is_refused_before_a_job_is_sent(
    slurm: Path, main: Main, tmp_path: Path, sets: list[str], says: str
) -> None:
    code, _, err = main("submit", "run.toml", "--set", *sets)
    assert code == 4
    *warnings, last = err.splitlines()
    assert last.startswith("E-")
    assert says in last
    assert all(line.startswith("warning: ") for line in warnings)
    assert [words for words in fake_slurm.calls(slurm, "sbatch") if words != ["--version"]] == []
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("models")
def test_a_partition_that_cancels_what_it_preempts_is_warned_of(slurm: Path, tmp_path: Path) -> None:
    sets = ("slurm.partition=scavenge", "slurm.time=1")
    run = load(Path("run.toml"), sets)
    wanted = Wanted(config=Path("run.toml"), run=run, sets=sets, folder=tmp_path)
    down, cancels, soon, place = islice(preflight(wanted, wanted.steps(Disk()), Cluster()), 4)
    assert "partition scavenge is down" in down
    assert "PreemptMode=CANCEL" in cancels
    assert "asked to save 120 s before a limit of 60 s" in soon
    assert "lies on a disk of this machine" in place
