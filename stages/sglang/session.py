"""A session: a child process, everything it starts, and everything they leave in /dev/shm.

    this process --pipe--> guard --> command --> whatever it starts

An engine is a tree of processes that outlive each other and leave named shared memory behind when they are killed. A
guard of ours leads the session: it ends it when the command ends, and when the process that started it is gone, however
that went (the pipe closes). It imports nothing of the engine's, so no handler of an engine's can end it first.
Invariant: after `end`, no process of the session lives and no shared memory that one of them made is left.
Linux only: members are found by their session id in /proc, their shared memory by their own maps, and semaphores, which
nobody need have mapped, by the name that `name_semaphores` gives them.
"""

import contextlib
import multiprocessing
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

SHARED_MEMORY = Path("/dev/shm")
OWN_NAMES = ("sgl_", "sglang_", "psm_", "torch_")
"""Names that Python's multiprocessing, SGLang and torch give; anything else that is mapped belongs to somebody else."""
END_S = 20.0


GUARD = "from kdpipe.stages.sglang.session import guard; import sys; sys.exit(guard(sys.argv[1:]))"
LOOK_S = 10.0
"""Longest time between two looks of the guard at the session's shared memory; most of it is made at the start."""


class Session:
    """A command running in a session of its own, with a folder of its own that goes with it; output in its `log`."""

    def __init__(
        self, command: Sequence[str], *, env: Mapping[str, str], folder: Path, pass_fds: Sequence[int] = ()
    ) -> None:
        ours, theirs = os.pipe()
        self._line: int | None = theirs
        given = ",".join(map(str, pass_fds))
        with open(folder / "log", "ab") as output:
            self._guard = subprocess.Popen(
                [sys.executable, "-c", GUARD, str(ours), given, str(folder), *command],
                env=dict(env),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                pass_fds=(ours, *pass_fds),
            )
        os.close(ours)

    @property
    def id(self) -> int:
        """By which `members` finds its processes."""
        return self._guard.pid

    @property
    def exit_status(self) -> int | None:
        """Of the command; None while it runs."""
        return self._guard.poll()

    def end(self) -> None:
        """End the command and all it started; remove their shared memory and the folder. Running it twice is fine."""
        if self._line is not None:
            os.close(self._line)
            self._line = None
        self._guard.wait()
        end_session(self.id, set())  # nothing is left to do, unless somebody killed the guard


def guard(arguments: Sequence[str]) -> int:
    """Run a command until it ends or the line to the starting process closes; leave nothing of it. Its exit status."""
    line, given, folder = int(arguments[0]), arguments[1], Path(arguments[2])
    command = subprocess.Popen(arguments[3:], pass_fds=[int(number) for number in given.split(",") if number])
    for number in given.split(","):
        if number:
            os.close(int(number))
    ended, started, shared = os.pidfd_open(command.pid), time.monotonic(), set[Path]()
    ready: list[int] = []
    while not ready:
        pause = min(LOOK_S, 0.1 + (time.monotonic() - started) / 20)
        ready = select.select([line, ended], [], [], pause)[0]
        shared |= shared_memory(members(os.getpid()))
    end_session(os.getpid(), shared, spare=os.getpid())
    if line in ready:
        shutil.rmtree(folder, ignore_errors=True)
    return command.wait()


def end_session(leader: int, shared: set[Path], *, spare: int | None = None) -> None:
    """Kill the members of the session that `leader` leads, all but `spare`; remove what they have in /dev/shm.

    Python's resource trackers go last and by themselves: alone, they unlink what they were told of.
    """
    until = time.monotonic() + END_S
    # A member may have started another while its siblings were being listed.
    while (alive := [pid for pid in members(leader) if pid != spare]) and time.monotonic() < until:
        shared |= shared_memory(alive)
        patient = time.monotonic() < until - END_S / 2
        for pid in alive:
            if not (patient and is_resource_tracker(pid)):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)
    for path in {*shared, *SHARED_MEMORY.glob(f"sem.{semaphore_prefix(leader)}-*")}:
        with contextlib.suppress(OSError):
            path.unlink()


def name_semaphores() -> None:
    """Called by the command of a session: multiprocessing's semaphores, here and in all it starts, bear its name."""
    # The only way in: SemLock makes names of it, and a child process takes its parent's _config over.
    multiprocessing.current_process()._config["semprefix"] = f"/{semaphore_prefix(os.getsid(0))}"  # type: ignore[attr-defined]


def semaphore_prefix(leader: int) -> str:
    return f"kdpipe-{leader}"


def is_resource_tracker(pid: int) -> bool:
    """Whether a process is the one that multiprocessing starts to clean up after others."""
    with contextlib.suppress(OSError):
        return b"multiprocessing.resource_tracker" in Path(f"/proc/{pid}/cmdline").read_bytes()
    return False


def members(leader: int) -> list[int]:
    """Living processes of the session that `leader` leads or led."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdecimal():
            continue
        with contextlib.suppress(OSError):
            # "pid (name) state ppid pgrp session ...": the name may hold spaces and brackets.
            state, _, _, session = (entry / "stat").read_text().rpartition(")")[2].split()[:4]
            if int(session) == leader and state not in "ZX":
                found.append(int(entry.name))
    return found


def shared_memory(pids: Sequence[int]) -> set[Path]:
    """Files in /dev/shm with a name of OWN_NAMES that one of the processes has mapped."""
    found = set()
    for pid in pids:
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
                name = line.partition(f"{SHARED_MEMORY}/")[2]
                if name.startswith(OWN_NAMES) and not name.endswith(" (deleted)"):
                    found.add(SHARED_MEMORY / name)
    return found
