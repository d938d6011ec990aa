"""Caches in a report: what they hold as their plan says it, and the teacher's cost from the logs of extractions."""

import json
from pathlib import Path

from tests.caches import make_cache

from kdpipe.pipeline.report.caches import read_cache


def log(cache: Path, name: str, events: list[dict[str, object]], *, torn: str = "") -> None:
    (cache / "runs").mkdir(exist_ok=True)
    (cache / "runs" / name).write_text("".join(json.dumps(event) + "\n" for event in events) + torn)


def test_the_teachers_time_is_that_of_all_its_processes(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    make_cache(cache, num_samples=9)
    run = {"kind": "run", "command": "extract", "host": "node7", "pid": 1}
    shard = {"kind": "shard", "num_tokens": 100, "seconds": 2.0}
    log(
        cache,
        "20260101T000000Z-1.jsonl",
        [{"time": 10.0} | run, {"time": 14.0} | shard, {"time": 15.0, "kind": "finished"}],
    )
    log(cache, "20260101T000000Z-2.jsonl", [{"time": 10.0} | run, {"time": 13.0} | shard], torn='{"time": 9')
    log(cache, "prepare.jsonl", [{"time": 1.0, "kind": "run"}, {"time": 99.0, "kind": "finished"}])
    teacher = read_cache(cache).teacher
    assert (teacher.num_runs, teacher.num_failed, teacher.seconds) == (2, 1, 8.0)
    assert (teacher.num_tokens, teacher.rate) == (200, 50.0)


def test_a_cache_is_described_as_its_own_info_does(tmp_path: Path) -> None:
    info = make_cache(tmp_path / "cache").info()
    found = read_cache(tmp_path / "cache").info
    assert found is not None
    assert (found.num_rows, found.num_tokens, found.num_bytes) == (
        info["num_rows"],
        info["num_tokens"],
        info["num_bytes"],
    )
    assert (found.num_shards, found.is_complete, found.fingerprint) == (info["shards"], True, info["fingerprint"])


def test_a_folder_that_is_no_cache_any_more_is_said_to_be_none(tmp_path: Path) -> None:
    found = read_cache(tmp_path / "gone")
    assert found.info is None
    assert "E-CACHE" in found.error
    assert found.teacher.num_runs == 0
