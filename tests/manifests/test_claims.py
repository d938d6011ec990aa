"""Claims: one writer at a time on a shard, until it is silent for too long or known to be dead."""

import json
import os
import platform
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from tests.caches import make_cache

from kdpipe.manifests.claims import Claims, sweep_claims
from kdpipe.manifests.shard import commit_path


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    make_cache(tmp_path / "c")
    for number in range(3):
        commit_path(tmp_path / "c", number).unlink()
    return tmp_path / "c"


def backdate(path: Path, seconds: float) -> None:
    then = time.time() - seconds
    os.utime(path, (then, then))


@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_a_claim_that_is_a_link_or_a_pipe_is_neither_written_through_nor_waited_for(kind: str, tmp_path: Path) -> None:
    claims = Claims(tmp_path)
    (tmp_path / "precious").write_text("precious")
    if kind == "link":
        claims.path(0).symlink_to(tmp_path / "precious")
    else:
        os.mkfifo(claims.path(0))
    assert not claims.held_by_another(0)
    assert claims.take(0)
    assert (tmp_path / "precious").read_text() == "precious"
    claims.close()


def test_a_claimed_shard_is_another_writers(cache: Path) -> None:
    one, two = Claims(cache), Claims(cache)
    assert one.take(1)
    assert one.take(1)
    assert two.held_by_another(1)
    assert not two.take(1)
    assert two.take(0)
    one.drop(1)
    assert two.take(1)


def test_a_silent_writers_claim_is_taken_over_and_a_living_ones_is_not(cache: Path) -> None:
    one, two = Claims(cache, seconds=100.0), Claims(cache, seconds=100.0)
    one.take(1)
    backdate(one.path(1), 90)
    assert not two.take(1)
    backdate(one.path(1), 110)
    assert two.take(1)
    backdate(two.path(1), 110)
    two._touched -= 10
    two.keep()
    assert not Claims(cache, seconds=100.0).take(1)


@pytest.mark.parametrize("ahead", [3600.0, -3600.0])
def test_a_clock_unlike_that_of_the_file_system_does_not_age_a_claim(
    ahead: float, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The files of a server have its times: a machine whose clock is an hour off still sees who is at work."""
    one, own = Claims(cache, seconds=100.0), time.time
    one.take(1)
    monkeypatch.setattr(time, "time", lambda: own() + ahead)
    assert not Claims(cache, seconds=100.0).take(1)
    monkeypatch.undo()
    backdate(one.path(1), 110)
    monkeypatch.setattr(time, "time", lambda: own() + ahead)
    assert Claims(cache, seconds=100.0).take(1)


def test_a_claim_of_the_far_future_holds_nothing(cache: Path) -> None:
    """A copied folder, a clock that was wrong: it would never be old enough to be taken over."""
    claims = Claims(cache)
    claims.path(0).write_text('{"host": "elsewhere", "pid": 1}')
    backdate(claims.path(0), -30.0)
    assert claims.held_by_another(0)
    backdate(claims.path(0), -1e9)
    assert not claims.held_by_another(0)


def test_a_dead_process_of_this_machine_holds_nothing(cache: Path) -> None:
    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait()
    claims = Claims(cache)
    for host, free in ((platform.node(), True), ("elsewhere", False)):
        claims.path(2).write_text(json.dumps({"host": host, "pid": done.pid}))
        assert claims.held_by_another(2) != free


@pytest.mark.parametrize(("content", "counts"), [("{", False), ("\0", False), ("[1]", True), ('{"host": 1}', True)])
def test_a_claim_that_names_nobody_counts_by_its_age_and_what_is_no_claim_not_at_all(
    cache: Path, content: str, counts: bool
) -> None:
    claims = Claims(cache, seconds=100.0)
    claims.path(0).write_text(content)
    assert claims.held_by_another(0) == counts
    backdate(claims.path(0), 200)
    assert claims.take(0)


def test_an_empty_claim_is_being_written_and_after_a_moment_a_power_cut_has_left_it(cache: Path) -> None:
    claims = Claims(cache, seconds=100.0)
    claims.path(0).touch()
    assert not claims.take(0)
    backdate(claims.path(0), 6)
    assert claims.take(0)


def test_of_several_that_claim_at_once_one_has_the_shard(tmp_path: Path) -> None:
    writers = [Claims(tmp_path) for _ in range(4)]
    start = threading.Barrier(len(writers))

    def taken(claims: Claims) -> list[bool]:
        found = []
        for number in range(200):
            start.wait(30)
            found.append(claims.take(number))
        return found

    with ThreadPoolExecutor(len(writers)) as pool:
        found = list(pool.map(taken, writers))
    assert [sum(took) for took in zip(*found, strict=True)] == [1] * 200


def test_claims_of_committed_shards_are_swept_and_ones_own_when_it_closes(cache: Path) -> None:
    claims = Claims(cache)
    claims.take(0)
    claims.path(3).write_text("{}")  # shard 3 is committed: its writer was killed a moment later
    sweep_claims(cache)
    other = Claims(cache)
    assert not claims.path(3).exists()
    assert other.held_by_another(0)
    claims.close()
    other.close()
    assert list((cache / "claims").iterdir()) == []
