"""Ranks end together, and a rank's error reaches the user as if there were one process."""

import importlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from kdpipe.manifests.errors import CorruptError, DataError, InternalError, TemporaryError
from kdpipe.pipeline.launch import _threads, launch

pytestmark = pytest.mark.timeout(120)
HERE = Path(__file__).parent
TYPING = HERE.parent.parent / "tools" / "typing"
Launch = Callable[[str], object]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Launch:
    """Launch a function of rank_functions.py in two ranks from this process."""
    for key in ("RANK", "WORLD_SIZE", "OMP_NUM_THREADS"):
        monkeypatch.delenv(key, raising=False)
    monkeypatch.syspath_prepend(HERE)
    functions = importlib.import_module("rank_functions")
    return lambda name: launch(getattr(functions, name), str(tmp_path), nproc=2)


def assert_no_rank_left(folder: Path) -> None:
    ranks = [int(path.read_text()) for path in folder.glob("*.pid")]
    assert len(ranks) == 2
    deadline = time.monotonic() + 10
    while left := [pid for pid in ranks if alive(pid)]:
        assert time.monotonic() < deadline, f"still running: {left}"
        time.sleep(0.05)


def alive(pid: int) -> bool:
    try:
        return " Z " not in Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False


def test_two_ranks_meet_and_rank_zero_answers(run: Launch, tmp_path: Path) -> None:
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    threads = max(len(os.sched_getaffinity(0)) // 2, 1)
    assert run("meet") == f"rank 0 of 2, sum 2, {threads} threads"
    assert_no_rank_left(tmp_path)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert "OMP_NUM_THREADS" not in os.environ


def test_the_users_thread_count_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    with _threads(2):
        assert os.environ["OMP_NUM_THREADS"] == "3"
    assert os.environ["OMP_NUM_THREADS"] == "3"


def test_an_error_of_ours_is_raised_as_it_was_and_not_the_lost_peer(
    run: Launch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(DataError) as caught:
        run("refuse")
    assert str(caught.value) == "E-DATA chat.jsonl:3: expected a list of messages, got 7"
    assert capfd.readouterr().err == ""
    assert_no_rank_left(tmp_path)


def test_a_killed_rank_is_named_with_its_signal(run: Launch, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(TemporaryError, match=r"E-TEMPORARY rank 1: killed by SIGKILL"):
        run("die")
    assert capfd.readouterr().err == ""
    assert_no_rank_left(tmp_path)


def test_a_mapped_file_cut_under_a_rank_is_named(run: Launch, tmp_path: Path) -> None:
    with pytest.raises(CorruptError, match="cut to 0 bytes") as caught:
        run("read_what_shrank")
    assert caught.value.where == str(tmp_path / "rows")


def test_a_bug_in_a_rank_leaves_its_traceback_in_one_file(
    run: Launch, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    with pytest.raises(InternalError, match="rank 0: ZeroDivisionError: the loss of nothing"):
        run("bug")
    assert capfd.readouterr().err == ""
    (report,) = (tmp_path / "tmp").glob("kdpipe-crash-*.txt")
    assert "in bug\n" in report.read_text()
    assert_no_rank_left(tmp_path)


def launched(folder: Path, name: str) -> subprocess.Popen[str]:
    """A launcher of two ranks in a process of its own, its ranks signed in."""
    env = {key: value for key, value in os.environ.items() if key not in {"RANK", "WORLD_SIZE"}}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(HERE), str(TYPING), env.get("PYTHONPATH", "")]))
    command = [sys.executable, str(HERE / "rank_functions.py"), str(folder), name]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=env, start_new_session=True)
    await_files(folder, "*.pid", 2)
    return process


def await_files(folder: Path, pattern: str, count: int) -> None:
    deadline = time.monotonic() + 60
    while len(list(folder.glob(pattern))) < count:
        assert time.monotonic() < deadline, f"no {pattern}"
        time.sleep(0.02)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)])
def test_a_signal_to_the_launcher_ends_every_rank(tmp_path: Path, number: signal.Signals, code: int) -> None:
    with launched(tmp_path, "sleep") as process:
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
    assert process.returncode == code
    if number == signal.SIGINT:
        assert err == f"E-INTERRUPTED {tmp_path}: stopped by SIGINT; step 3 is kept; run the same command again\n"
    assert_no_rank_left(tmp_path)


INTERRUPTED, TEMPORARY = (130, "INTERRUPTED"), (75, "TEMPORARY")


@pytest.mark.parametrize(
    ("number", "group", "code", "word"),
    [
        pytest.param(signal.SIGINT, False, *INTERRUPTED, marks=pytest.mark.slow),
        (signal.SIGINT, True, *INTERRUPTED),
        (signal.SIGTERM, False, *TEMPORARY),
        pytest.param(signal.SIGTERM, True, *TEMPORARY, marks=pytest.mark.slow),
        (signal.SIGHUP, True, *TEMPORARY),  # defect: multiprocessing's own helper died of it, and printed tracebacks
    ],
)
def test_what_ranks_say_they_saved_is_what_the_launcher_says(
    number: signal.Signals, group: bool, code: int, word: str, tmp_path: Path
) -> None:
    with launched(tmp_path, "save_when_asked") as process:
        if group:  # as a terminal and some schedulers send it
            os.killpg(process.pid, number)
        else:
            process.send_signal(number)
        _, err = process.communicate(timeout=60)
    said = f"stopped by {number.name}; its state after step 6 is saved; run the same command again"
    assert (process.returncode, err) == (code, f"E-{word} {tmp_path}: {said}\n")
    assert_no_rank_left(tmp_path)


def test_the_second_signal_ends_ranks_that_stay(tmp_path: Path) -> None:
    with launched(tmp_path, "stay") as process:
        process.send_signal(signal.SIGINT)
        await_files(tmp_path, "*.asked", 2)
        assert process.poll() is None
        began = time.monotonic()
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert time.monotonic() - began < 30
    said = f"E-INTERRUPTED {tmp_path}: stopped by SIGINT; step 3 is kept; run the same command again\n"
    assert (process.returncode, err) == (130, said)
    assert_no_rank_left(tmp_path)
