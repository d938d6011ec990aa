"""Local: real commands as children of this process; what they need, what they are given, how they and it end."""

import contextlib
import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from kdpipe.manifests.cores import Cores, given_cores
from kdpipe.manifests.run import LOG
from kdpipe.manifests.running import alone_in
from kdpipe.manifests.specs import Member, RunFile
from kdpipe.pipeline.local import Outcome, run_steps, share_out
from kdpipe.pipeline.roles import Share
from kdpipe.pipeline.steps import Step

GOOD, BAD = ("--version",), ("cache", "info", "none")
"""A command that ends well in no time, and one that is refused."""


def step(name: str, argv: tuple[str, ...], *needs: str, output: Path | None = None, whatever: bool = False) -> Step:
    """output: of a student, else it is none"""
    member = None if output is None else Member(name=name, overrides={}, run=RunFile())
    return Step(name=name, argv=argv, needs=needs, output=output or Path(), whatever=whatever, member=member)


@dataclass
class Seen:
    """What a watcher was told, and what it does when it looks."""

    look_at: Callable[[Collection[Step]], None] = lambda at_work: None
    wait_for: Callable[[Step], None] = lambda step: None
    told: list[str] = field(default_factory=list)

    def started(self, step: Step, log: Path | None) -> None:
        self.told.append(f"started {step.name}")

    def ended(self, outcome: Outcome) -> None:
        self.told.append(f"ended {outcome.step.name}")

    def waits(self, step: Step) -> None:
        self.told.append(f"waits for {step.name}")
        self.wait_for(step)

    def look(self, at_work: Collection[Step]) -> None:
        self.look_at(at_work)


@pytest.fixture(autouse=True)
def of_other_tests() -> Iterator[None]:
    """What runs here before: a fork server of other tests."""
    before = children()
    OTHERS.extend(before)
    yield
    OTHERS.clear()


OTHERS: list[int] = []


def children() -> list[int]:
    """Processes that this one has started in the test and that run."""
    pids = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    return [int(pid) for pid in pids if int(pid) not in OTHERS]


@dataclass
class Fifo:
    """A run file that is not written yet: a command that reads it waits until it is released."""

    path: Path
    held: int

    @property
    def argv(self) -> tuple[str, ...]:
        return ("train", "--config", str(self.path))

    def num_readers(self) -> int:
        """Children that wait for it."""
        return sum(any(os.readlink(one) == str(self.path) for one in opened(pid)) for pid in children())

    def release(self) -> None:
        if self.held >= 0:
            os.close(self.held)
        self.held = -1


def opened(pid: int) -> list[Path]:
    with contextlib.suppress(OSError):
        return [link for link in Path(f"/proc/{pid}/fd").iterdir() if link.is_symlink()]
    return []


@pytest.fixture
def fifo(tmp_path: Path) -> Iterator[Fifo]:
    os.mkfifo(tmp_path / "run.toml")
    made = Fifo(tmp_path / "run.toml", os.open(tmp_path / "run.toml", os.O_RDWR))
    yield made
    made.release()


def test_the_machine_is_dealt_out_to_the_jobs_at_a_time() -> None:
    cores = Cores(count=4, numbers=(2, 3, 5, 7))
    assert [share.cores.numbers for share in share_out(3, cores, []) if share.cores] == [(2,), (3,), (5, 7)]
    assert share_out(1, cores, ["0", "1"]) == [Share(cores=cores, gpus=("0", "1"))]
    assert [share.gpus for share in share_out(2, cores, ["4", "5", "6"])] == [("4",), ("5", "6")]
    assert [share.gpus for share in share_out(3, cores, ["4", "5"])] == [("4",), ("4",), ("5",)], "one is shared"
    assert [share.cores for share in share_out(2, Cores(count=1), [])] == [Cores(count=1)] * 2


def test_a_step_waits_for_those_it_needs_and_a_failed_one_stops_no_other(tmp_path: Path) -> None:
    out = tmp_path / "bad"
    out.mkdir()
    (out / LOG).write_text("E-OLD: of another day\n")
    (tmp_path / "file").touch()
    steps = [
        step("last", GOOD, "bad", "second", whatever=True),
        step("second", GOOD, "first"),
        step("first", GOOD, "done before"),
        step("bad", BAD, output=out),
        step("vain", GOOD, "bad"),
        step("vainer", GOOD, "vain"),
        step("nowhere", GOOD, output=tmp_path / "file" / "below"),
    ]
    seen = Seen()
    outcomes, asked = run_steps(steps, share_out(2, given_cores(), []), seen)
    by_name = {outcome.step.name: outcome for outcome in outcomes}
    codes = {name: outcome.exit_code for name, outcome in by_name.items()}
    assert (asked, [outcome.step for outcome in outcomes]) == (None, steps)
    assert codes == {"last": 0, "second": 0, "first": 0, "bad": 4, "vain": None, "vainer": None, "nowhere": 4}
    assert seen.told.index("ended first") < seen.told.index("started second")
    assert seen.told.index("started last") > max(seen.told.index("ended second"), seen.told.index("ended bad"))
    assert str(by_name["bad"].error).startswith("E-CACHE none: ")
    assert by_name["vain"].error == "not started, as bad did not end well"
    assert (by_name["bad"].log, (out / LOG).read_text().startswith("E-OLD")) == (out / LOG, True), "it is added to"
    assert str(by_name["nowhere"].error).startswith("E-INPUT ")


def test_each_run_has_its_own_cores_and_threads(fifo: Fifo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    given: list[tuple[set[int], str]] = []

    def look(at_work: Collection[Step]) -> None:
        if fifo.num_readers() == 2 and not given:
            for pid in children():
                words = dict(
                    word.split("=", 1) for word in Path(f"/proc/{pid}/environ").read_text().split("\0") if word
                )
                given.append((os.sched_getaffinity(pid), f"{words['OMP_NUM_THREADS']} {words['CUDA_VISIBLE_DEVICES']}"))
            fifo.release()

    cores = sorted(os.sched_getaffinity(0))[:2]
    if len(cores) < 2:
        pytest.skip("one core cannot be dealt out")
    slots = [
        Share(cores=Cores(count=1, numbers=(core,)), gpus=(str(gpu),)) for core, gpu in zip(cores, "57", strict=True)
    ]
    steps = [step(name, fifo.argv, output=tmp_path / name) for name in "ab"]
    outcomes, _ = run_steps(steps, slots, Seen(look_at=look))
    assert sorted(given, key=lambda each: each[1]) == [({cores[0]}, "1 5"), ({cores[1]}, "1 7")]
    assert [outcome.exit_code for outcome in outcomes] == [4, 4], "an empty run file names no student"
    assert set(cores) <= os.sched_getaffinity(0), "this process keeps its own"


def test_a_signal_is_passed_on_and_no_more_is_started(fifo: Fifo, tmp_path: Path) -> None:
    def look(at_work: Collection[Step]) -> None:
        if fifo.num_readers() == 2:
            os.kill(os.getpid(), signal.SIGUSR2)

    before = signal.getsignal(signal.SIGUSR2)
    steps = [step(name, fifo.argv, output=tmp_path / name) for name in "abc"]
    outcomes, asked = run_steps(steps, share_out(2, given_cores(), []), Seen(look_at=look))
    assert asked is signal.SIGUSR2
    assert [(outcome.step.name, outcome.exit_code) for outcome in outcomes] == [("a", 75), ("b", 75)]
    assert all("stopped by SIGUSR2" in str(outcome.error) for outcome in outcomes)
    assert children() == []
    assert signal.getsignal(signal.SIGUSR2) == before, "the handlers are as they were"


def test_a_second_signal_kills_what_does_not_end(fifo: Fifo, tmp_path: Path) -> None:
    def look(at_work: Collection[Step]) -> None:
        if fifo.num_readers() == 1:
            (pid,) = children()
            os.kill(pid, signal.SIGSTOP)
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)

    outcomes, asked = run_steps([step("a", fifo.argv, output=tmp_path / "a")], [Share()], Seen(look_at=look))
    assert (asked, outcomes[0].exit_code) == (signal.SIGTERM, 75)
    assert "killed by SIGKILL" in str(outcomes[0].error)


def test_an_error_of_ours_leaves_no_child(fifo: Fifo, tmp_path: Path) -> None:
    def look(at_work: Collection[Step]) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_steps([step("a", fifo.argv, output=tmp_path / "a")], [Share()], Seen(look_at=look))
    assert children() == []


def test_an_output_in_which_another_run_is_at_work_comes_last(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with contextlib.ExitStack() as stack:
        stack.enter_context(alone_in(tmp_path / "a"))
        steps = [step(name, GOOD, output=tmp_path / name) for name in "ab"]
        seen = Seen(wait_for=lambda step: stack.close())
        outcomes, _ = run_steps(steps, [Share()], seen)
    assert seen.told == ["started b", "ended b", "waits for a", "started a", "ended a"]
    assert [outcome.exit_code for outcome in outcomes] == [0, 0]


LEADER = """
import sys
from pathlib import Path
from tests.pipeline.test_local import Seen, step
from kdpipe.pipeline.local import run_steps
from kdpipe.pipeline.roles import Share
run_steps([step("a", ("train", "--config", sys.argv[1]), output=Path(sys.argv[2]))], [Share()], Seen())
"""


def test_a_leader_that_is_killed_leaves_no_child(tmp_path: Path) -> None:
    root, fifo = Path(__file__).parents[2], tmp_path / "run.toml"
    os.mkfifo(fifo)
    leader = subprocess.Popen([sys.executable, "-c", LEADER, str(fifo), str(tmp_path / "a")], cwd=root)
    writer = os.open(fifo, os.O_WRONLY)  # returns when the child reads it
    try:
        (child,) = Path(f"/proc/{leader.pid}/task/{leader.pid}/children").read_text().split()
        watched = os.pidfd_open(int(child))
        leader.kill()
        leader.wait()
        assert select.select([watched], [], [], 20)[0], "it lives on"
        os.close(watched)
    finally:
        os.close(writer)
    assert "stopped by SIGTERM" in (tmp_path / "a" / LOG).read_text()
