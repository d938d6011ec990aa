"""A session: a child process, everything it starts, and everything they leave in /dev/shm.

An engine is a tree of processes that outlive each other and leave named shared memory behind when they are killed.
Invariant: after `end`, no process of the session lives and no shared memory that one of them made is left.
Linux only: members are found by their session id in /proc, their shared memory by their own maps, and semaphores, which
nobody need have mapped, by the name that `name_semaphores` gives them.
"""

import contextlib
import multiprocessing
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

SHARED_MEMORY = Path("/dev/shm")
OWN_NAMES = ("sgl_", "sglang_", "psm_", "torch_")
"""Names that Python's multiprocessing, SGLang and torch give; anything else that is mapped belongs to somebody else."""
END_S = 20.0


class Session:
    """A command running in a session of its own; its output goes to `log`."""

    def __init__(
        self, command: Sequence[str], *, env: Mapping[str, str], log: Path, pass_fds: Sequence[int] = ()
    ) -> None:
        with open(log, "ab") as output:
            self._leader = subprocess.Popen(
                command,
                env=dict(env),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                pass_fds=tuple(pass_fds),
            )
        self._shared: set[Path] = set()

    @property
    def exit_status(self) -> int | None:
        """Of the command; None while it runs."""
        return self._leader.poll()

    def look(self) -> None:
        """Remember the shared memory in use now, so that it is found when its users are dead."""
        self._shared |= shared_memory(members(self._leader.pid))

    def end(self) -> None:
        """Kill what lives, reap the command, remove the shared memory. Running it twice is fine."""
        end_session(self._leader.pid, self._shared)
        self._leader.wait()


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
    """Called by the leader of a session: multiprocessing's semaphores, here and in all it starts, bear its name."""
    # The only way in: SemLock makes names of it, and a child process takes its parent's _config over.
    multiprocessing.current_process()._config["semprefix"] = f"/{semaphore_prefix(os.getpid())}"  # type: ignore[attr-defined]


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
