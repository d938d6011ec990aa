"""A session and its end: children of children, those that will not listen, and what they leave in /dev/shm."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from kdpipe.stages.sglang.session import LOOK_S, SHARED_MEMORY, Session, members, semaphore_prefix

# The leader starts a child that ignores signals and makes a semaphore and a mapping, and then a grandchild.
LEADER = """
import mmap, multiprocessing, os, signal, subprocess, sys, time
from kdpipe.stages.sglang.session import name_semaphores

def child(lock, name):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    with open(name, "w+b") as file:
        file.truncate(4096)
        kept = mmap.mmap(file.fileno(), 4096)
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    print("up", flush=True)
    time.sleep(600)

if __name__ == "__main__":
    name_semaphores()
    context = multiprocessing.get_context("spawn")
    lock = context.Lock()
    context.Process(target=child, args=(lock, sys.argv[1])).start()
    time.sleep(600)
"""


def wait_for(condition: Callable[[], object]) -> None:
    until = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.05)


def test_everything_a_session_started_ends_with_it_and_its_shared_memory_too(tmp_path: Path) -> None:
    script, folder = tmp_path / "leader.py", tmp_path / "own"
    folder.mkdir()
    script.write_text(LEADER)
    own = SHARED_MEMORY / f"sgl_test_{tmp_path.name}_{time.monotonic_ns()}"
    strange = SHARED_MEMORY / f"somebody_elses_{time.monotonic_ns()}"
    strange.touch()
    try:
        session = Session([sys.executable, str(script), str(own)], env={}, folder=folder)
        leader = session.id
        wait_for(lambda: "up" in (folder / "log").read_text())
        wait_for(lambda: len(members(leader)) >= 5)  # guard, command, tracker, child, grandchild
        semaphores = list(SHARED_MEMORY.glob(f"sem.{semaphore_prefix(leader)}-*"))
        assert len(semaphores) == 1
        assert session.exit_status is None
        session.end()
        session.end()
        assert members(leader) == []
        assert session.exit_status is not None
        assert not own.exists()
        assert not folder.exists()
        assert not semaphores[0].exists()
        assert strange.exists()
    finally:
        strange.unlink()


def test_a_command_that_is_killed_leaves_nothing_but_its_folder(tmp_path: Path) -> None:
    script, folder = tmp_path / "leader.py", tmp_path / "own"
    folder.mkdir()
    script.write_text(LEADER)
    own = SHARED_MEMORY / f"sgl_test_{tmp_path.name}_{time.monotonic_ns()}"
    session = Session([sys.executable, str(script), str(own)], env={}, folder=folder)
    wait_for(lambda: "up" in (folder / "log").read_text())
    time.sleep(2 * LOOK_S / 20)  # the guard's next look at so young a session
    for pid in members(session.id):
        if pid != session.id:
            os.kill(pid, signal.SIGKILL)
    wait_for(lambda: session.exit_status is not None)
    assert members(session.id) == []
    assert not own.exists()
    assert not list(SHARED_MEMORY.glob(f"sem.{semaphore_prefix(session.id)}-*"))
    assert (folder / "log").exists()
    session.end()


def test_a_session_ends_with_the_process_that_started_it(tmp_path: Path) -> None:
    script, folder = tmp_path / "leader.py", tmp_path / "own"
    folder.mkdir()
    script.write_text(LEADER)
    own = SHARED_MEMORY / f"sgl_test_{tmp_path.name}_{time.monotonic_ns()}"
    code = (
        "import sys, time; from pathlib import Path; from kdpipe.stages.sglang.session import Session\n"
        f"session = Session([sys.executable, {str(script)!r}, {str(own)!r}], env={{}}, folder=Path({str(folder)!r}))\n"
        "print(session.id, flush=True); time.sleep(600)"
    )
    starter = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert starter.stdout is not None
    leader = int(starter.stdout.readline())
    wait_for(lambda: "up" in (folder / "log").read_text())
    starter.kill()
    starter.wait()
    wait_for(lambda: not members(leader))
    assert not own.exists()
    assert not folder.exists()
    assert not list(SHARED_MEMORY.glob(f"sem.{semaphore_prefix(leader)}-*"))
