"""SGLang engines of a test: that they end with it, and the plugin that makes them fail."""

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from kdpipe.stages.sglang.host import SWITCH
from kdpipe.stages.sglang.session import SHARED_MEMORY

FAULTS = Path(__file__).parent / "faults"
"""On PYTHONPATH it is a plugin of SGLang's; KDPIPE_FAULT names the file that says what goes wrong."""
MARK = "KDPIPE_TESTED_BY"
"""In the environment of the engines that this process starts: those of another worker are not its business."""


@contextlib.contextmanager
def engines_end() -> Iterator[None]:
    """Of the engines that are started inside no process is left afterwards, and nothing in /dev/shm."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(MARK, str(os.getpid()))
        before = abandoned()
        yield
        assert hosts() == []
        until = time.monotonic() + 20
        while abandoned() - before and time.monotonic() < until:  # another test's file, not mapped yet or not any more
            time.sleep(0.2)
        assert abandoned() <= before


def hosts() -> list[str]:
    """Processes of engines that this process started, by the switch and the mark in their environment."""
    found = []
    for entry in processes():
        with contextlib.suppress(OSError):
            environment = (entry / "environ").read_bytes().split(b"\0")
            ours = f"{SWITCH}=1".encode() in environment and f"{MARK}={os.getpid()}".encode() in environment
            if ours and (entry / "stat").read_text().rpartition(")")[2].split()[0] not in "ZX":
                found.append(entry.name)
    return found


def abandoned() -> set[Path]:
    """What lies in /dev/shm and no living process has mapped: what another test is at work with is not left behind."""
    mapped, left = set[int](), set[Path]()
    for entry in processes():
        with contextlib.suppress(OSError):
            # "address perms offset dev inode path": a semaphore is mapped under the name it had before its own.
            lines = (entry / "maps").read_text().splitlines()
            mapped |= {int(line.split()[4]) for line in lines if f"{SHARED_MEMORY}/" in line}
    for path in SHARED_MEMORY.iterdir():
        with contextlib.suppress(OSError):
            if path.stat().st_ino not in mapped:
                left.add(path)
    return left


def processes() -> list[Path]:
    return [entry for entry in Path("/proc").iterdir() if entry.name.isdecimal()]
