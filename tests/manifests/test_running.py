"""One run at a time in an output: the second is told at once by whom; what a dead one left is in nobody's way."""

import errno
import fcntl
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from kdpipe.manifests.errors import BusyError, KdpipeError
from kdpipe.manifests.running import RUNNING_FILE, SILENT_S, alone_in, require_nobody_in

HOLD = """
import sys, time
from pathlib import Path
from kdpipe.manifests.running import alone_in
with alone_in(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds tmp_path."""
    with subprocess.Popen([sys.executable, "-c", HOLD, tmp_path], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


@pytest.fixture(params=[errno.ENOLCK, errno.EOPNOTSUPP])
def no_locks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system without flock."""

    def flock(descriptor: int, operation: int) -> None:
        raise OSError(request.param, "no locks")

    monkeypatch.setattr(fcntl, "flock", flock)


def test_the_second_is_refused_at_once_with_who_it_is(holder: subprocess.Popen[str], tmp_path: Path) -> None:
    before = time.monotonic()
    for look in (lambda: require_nobody_in(tmp_path), lambda: alone_in(tmp_path).__enter__()):
        with pytest.raises(BusyError, match=rf"pid {holder.pid} on {os.uname().nodename}, since 20..-") as caught:
            look()
        assert (caught.value.exit_code, caught.value.where) == (75, str(tmp_path))
    assert time.monotonic() - before < 5
    assert json.loads((tmp_path / RUNNING_FILE).read_text())["pid"] == holder.pid


def test_a_killed_run_holds_nothing_and_leaves_nothing_to_clean(holder: subprocess.Popen[str], tmp_path: Path) -> None:
    holder.kill()
    holder.wait()
    assert (tmp_path / RUNNING_FILE).exists()
    require_nobody_in(tmp_path)
    with alone_in(tmp_path):
        assert json.loads((tmp_path / RUNNING_FILE).read_text())["pid"] == os.getpid()
    assert list(tmp_path.iterdir()) == []


def test_one_after_the_other_and_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="the work"), alone_in(tmp_path):
        raise RuntimeError("the work")
    with alone_in(tmp_path), pytest.raises(BusyError), alone_in(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


def test_looking_writes_nothing(tmp_path: Path) -> None:
    require_nobody_in(tmp_path / "not there yet")
    require_nobody_in(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_link_in_its_place_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("a note")
    (tmp_path / RUNNING_FILE).symlink_to(tmp_path / "precious")
    with pytest.raises(KdpipeError, match=RUNNING_FILE), alone_in(tmp_path):
        pass
    assert (tmp_path / "precious").read_text() == "a note"


def test_an_output_that_cannot_be_written_is_one_line() -> None:
    with pytest.raises(KdpipeError, match=r"^E-IO /proc/self/task/\.running: "), alone_in(Path("/proc/self/task")):
        pass


@pytest.mark.usefixtures("no_locks")
@pytest.mark.parametrize(
    ("holder", "age", "held"),
    [
        ({"host": os.uname().nodename, "pid": os.getppid(), "since": 1.0}, 0.0, True),
        ({"host": os.uname().nodename, "pid": 2**22 + 1, "since": 1.0}, 0.0, False),
        ({"host": "elsewhere", "pid": 1, "since": 1.0}, 0.0, True),
        ({"host": "elsewhere", "pid": 1, "since": 1.0}, SILENT_S + 60, False),
        ({}, SILENT_S + 60, False),
    ],
)
def test_without_locks_the_holder_counts_while_it_lives(
    holder: dict[str, object], age: float, held: bool, tmp_path: Path
) -> None:
    path = tmp_path / RUNNING_FILE
    path.write_text(json.dumps(holder))
    os.utime(path, (time.time() - age, time.time() - age))
    if held:
        for look in (lambda: require_nobody_in(tmp_path), lambda: alone_in(tmp_path).__enter__()):
            with pytest.raises(BusyError):
                look()
    else:
        require_nobody_in(tmp_path)
        with alone_in(tmp_path), pytest.raises(BusyError):
            require_nobody_in(tmp_path)


@pytest.mark.usefixtures("no_locks")
def test_without_locks_a_living_run_keeps_its_file_young(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kdpipe.manifests.running.KEEP_S", -1.0)
    with alone_in(tmp_path) as keep:
        os.utime(tmp_path / RUNNING_FILE, (0, 0))
        keep()
        assert time.time() - (tmp_path / RUNNING_FILE).stat().st_mtime < 60
