"""What the launcher makes of signals and of what its ranks left; test_launch.py has real ranks, slow to start."""

import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from dataclasses import asdict
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing import SignalException

from kdpipe.manifests.errors import DataError, KdpipeError, PeerError, StoppedError, TemporaryError, fields_of, stopped
from kdpipe.pipeline.last_net import crash_of
from kdpipe.pipeline.launch import _leave, _signals, _verdict


def stop(name: str) -> KdpipeError:
    return stopped(name, where="out", kept="its state is saved")


STOPPING = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR2]


@pytest.mark.parametrize("number", STOPPING)
def test_every_signal_to_stop_is_caught_and_given_back(number: signal.Signals) -> None:
    missed: list[int] = []
    own = signal.signal(number, lambda number, _: missed.append(number))
    try:
        before = signal.getsignal(number)
        with pytest.raises(SignalException), _signals() as asked:  # with no rank to wait for it ends the launch
            os.kill(os.getpid(), number)
        assert (asked, missed) == ([number], [])
        assert signal.getsignal(number) == before
    finally:
        signal.signal(number, own)


def rank(ready: Connection, asked: Callable[[], None]) -> None:
    """A process that the launcher has, as a rank is one: it answers SIGTERM in its own way."""
    signal.signal(signal.SIGTERM, lambda *_: asked())
    ready.send(None)
    while True:
        time.sleep(1)


def started(asked: Callable[[], None]) -> multiprocessing.process.BaseProcess:
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=rank, args=(theirs, asked), daemon=True)
    process.start()
    ours.recv()
    return process


def test_the_first_signal_is_passed_on_and_a_rank_ends_by_itself() -> None:
    with _signals() as asked:
        process = started(lambda: os._exit(7))
        os.kill(os.getpid(), signal.SIGTERM)
        process.join(20)
    assert (asked, process.exitcode) == ([signal.SIGTERM], 7)


def test_the_second_signal_kills_a_rank_that_stays() -> None:
    process = started(lambda: None)
    with _signals() as asked:
        os.kill(os.getpid(), signal.SIGTERM)
        assert process.is_alive()
        with pytest.raises(SignalException, match="stopped by SIGTERM"):
            os.kill(os.getpid(), signal.SIGTERM)
    process.join(20)
    assert (asked, process.exitcode) == ([signal.SIGTERM] * 2, -signal.SIGKILL)


def test_an_ignored_signal_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with _signals() as asked:
            os.kill(os.getpid(), signal.SIGHUP)
        assert asked == []
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("number", STOPPING)
def test_ranks_that_a_signal_ended_without_a_word_are_a_stop_by_that_signal(
    number: signal.Signals, tmp_path: Path
) -> None:
    found = _verdict(tmp_path, 0, -number, [number], stop)
    assert found.exit_code == (130 if number == signal.SIGINT else 75)
    assert isinstance(found, StoppedError if number == signal.SIGINT else TemporaryError)
    assert str(found).endswith(f"stopped by {number.name}; its state is saved; run the same command again")


def leave(folder: Path, rank: int, err: KdpipeError, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", str(rank))
    _leave(folder, fields_of(err))


def test_a_ranks_own_error_counts_more_than_that_another_was_killed_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave(tmp_path, 1, TemporaryError("a peer is gone"), monkeypatch)
    found = _verdict(tmp_path, 0, -signal.SIGKILL, [], stop)
    assert str(found).startswith("E-TEMPORARY rank 0: killed by SIGKILL (out of memory?)")
    leave(tmp_path, 2, DataError("expected a list, got 7", where="chat.jsonl:3"), monkeypatch)
    found = _verdict(tmp_path, 0, -signal.SIGKILL, [], stop)
    assert (type(found), str(found)) == (DataError, "E-DATA chat.jsonl:3: expected a list, got 7")


def test_the_first_error_counts_and_a_lost_peer_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for rank, err in enumerate([TemporaryError("a peer is gone"), DataError("the first"), DataError("the second")]):
        leave(tmp_path, rank, err, monkeypatch)
        word = json.loads((tmp_path / f"{rank}.json").read_text())
        (tmp_path / f"{rank}.json").write_text(json.dumps(word | {"time": 100.0 + rank}))
    assert str(_verdict(tmp_path, 0, 75, [], stop)) == "E-DATA: the first"


@pytest.mark.parametrize("cause", [ZeroDivisionError("of nothing"), TemporaryError("no room on the network")])
def test_a_rank_that_knows_only_that_another_failed_says_nothing(
    cause: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave(tmp_path, 0, PeerError("another rank failed"), monkeypatch)
    assert str(_verdict(tmp_path, 0, 75, [], stop)) == "E-PEER: another rank failed"
    if isinstance(cause, KdpipeError):
        leave(tmp_path, 1, cause, monkeypatch)
    else:
        monkeypatch.setenv("RANK", "1")
        _leave(tmp_path, {"crash": asdict(crash_of(cause))})
    assert str(cause) in str(_verdict(tmp_path, 0, 75, [], stop))
