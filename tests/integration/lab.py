"""A real Slurm for tests: tools/slurm_lab started in a folder of its own, and what is asked of it."""

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

TOOLS = Path(__file__).parents[2] / "tools" / "slurm_lab"
PREFIX = "kdpipe-slurm-"
UNABLE = 77
"""Exit code of start.sh where a machine cannot have a Slurm."""


class Lab:
    """Slurm with two nodes, n1 and n2, while it is up; `env` is what its commands need."""

    def __init__(self, folder: Path, settings: dict[str, str]) -> None:
        self.folder, self.settings = folder, settings
        self.env = {"SLURM_CONF": str(folder / "etc" / "slurm.conf")}

    def ask(self, *words: str) -> str:
        """What one of Slurm's commands prints."""
        env = os.environ | self.env
        return subprocess.run(words, capture_output=True, text=True, timeout=60, env=env, check=True).stdout

    def states(self) -> dict[str, str]:
        """Of every job and task that Slurm remembers: {"3_1": "RUNNING", "4": "PENDING"}."""
        out = self.ask("squeue", "--noheader", "--array", "--states=all", "--format=%F|%K|%T")
        rows = (line.split("|") for line in out.splitlines())
        return {number if index == "N/A" else f"{number}_{index}": state for number, index, state in rows}

    def nodes(self, number: str) -> set[str]:
        """Where a job, or the tasks of an array, ran."""
        out = self.ask("squeue", "--noheader", "--states=all", f"--jobs={number}", "--format=%N")
        return set(self.ask("scontrol", "show", "hostnames", ",".join(out.split())).split())

    def wait(self, what: Callable[[], object], timeout_s: float = 240.0) -> None:
        """Until something holds."""
        until = time.monotonic() + timeout_s
        while not what():
            assert time.monotonic() < until, f"it did not come; {self.states()}"
            time.sleep(0.3)

    def wait_for_the_end(self, timeout_s: float = 240.0) -> dict[str, str]:
        """Until nothing waits or runs; the states."""
        self.wait(lambda: not self.ask("squeue", "--noheader").strip(), timeout_s)
        return self.states()

    def kill_node(self, node: str) -> None:
        """Kill a node's daemon as a crash would; its jobs' processes live on."""
        os.kill(int((self.folder / "run" / f"slurmd-{node}.pid").read_text()), 9)

    def start(self) -> None:
        """Start whatever does not run. Skips the test where this machine cannot have a Slurm."""
        done = subprocess.run(
            [TOOLS / "start.sh"],
            env=os.environ | self.settings,
            capture_output=True,
            text=True,
            timeout=280,
            check=False,
        )
        if done.returncode == UNABLE:
            pytest.skip(f"no Slurm here: {done.stderr.strip().splitlines()[-1]}")
        assert done.returncode == 0, done.stderr

    def stop(self) -> None:
        subprocess.run([TOOLS / "stop.sh", "--wipe"], env=os.environ | self.settings, capture_output=True, check=True)


def end_orphans() -> None:
    """End the labs of test runs that were killed."""
    for owner in Path(tempfile.gettempdir()).glob(f"{PREFIX}*/owner"):
        if not Path(f"/proc/{owner.read_text()}").exists():
            Lab(owner.parent, {"LAB": str(owner.parent)}).stop()


@pytest.fixture(scope="session")
def lab() -> Iterator[Lab]:
    """Started once for all tests of a process; ended, with all it has written, after the last."""
    end_orphans()
    folder = Path(tempfile.mkdtemp(prefix=PREFIX))  # sockets want a short path
    (folder / "owner").write_text(str(os.getpid()))
    port = 17000 + os.getpid() % 1000 * 10  # two test runs on one machine do not meet
    lab = Lab(folder, {"LAB": str(folder), "PORT": str(port), "SILENCE": "10"})
    try:
        lab.start()
        yield lab
    finally:
        lab.stop()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def on_lab(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> Lab:
    """The lab is the Slurm that commands of this process talk to."""
    for name, value in lab.env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PATH", f"{os.environ['PATH']}:/usr/sbin:/sbin")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return lab
