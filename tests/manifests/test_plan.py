"""The plan: decided once, the same bytes every time, never edited."""

import hashlib
import json
import shlex
from pathlib import Path

import pytest
from tests.caches import make_plan, make_samples

from kdpipe.manifests.errors import CacheError, LayoutError
from kdpipe.manifests.made_with import made_with
from kdpipe.manifests.plan import PLAN_FILE, SAMPLES_FILE, read_plan
from kdpipe.manifests.shard_table import SHARDS_FILE


def refused(folder: Path) -> str:
    with pytest.raises(LayoutError) as caught:
        read_plan(folder)
    return str(caught.value)


def test_planning_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    plans = [make_plan(tmp_path / name, make_samples(30), batch_tokens=90) for name in ("one", "two")]
    assert plans[0].digest == plans[1].digest
    for name in (PLAN_FILE, SAMPLES_FILE, SHARDS_FILE):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_a_plan_on_disk_is_the_plan_that_was_made(tmp_path: Path) -> None:
    plan = make_plan(tmp_path / "c", make_samples(30))
    assert read_plan(tmp_path / "c") == plan
    assert read_plan(tmp_path / "c").digest == plan.digest


def test_a_plan_says_nothing_of_where_and_when_it_was_made(tmp_path: Path) -> None:
    make_plan(tmp_path / "somewhere", make_samples(3))
    assert b"somewhere" not in (tmp_path / "somewhere" / PLAN_FILE).read_bytes()


def test_no_plan_no_cache(tmp_path: Path) -> None:
    with pytest.raises(CacheError, match="no cache here"):
        read_plan(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(CacheError, match="this is a file, a cache is a folder"):
        read_plan(tmp_path / "file")


def test_a_plan_we_cannot_read_names_the_field(tmp_path: Path) -> None:
    make_plan(tmp_path, make_samples(3))
    path = tmp_path / PLAN_FILE
    good = json.loads(path.read_bytes())
    path.write_text(json.dumps({**good, "format_version": "two"}))
    assert "'format_version'" in refused(tmp_path)
    path.write_text(json.dumps({**good, "shards": []}))
    assert "'shards'" in refused(tmp_path)
    path.write_text(json.dumps({**good, "colour": "red"}))
    assert "'colour'" in refused(tmp_path)
    path.write_text(json.dumps({**good, "num_rows": -1}))
    assert "'num_rows'" in refused(tmp_path)
    path.write_text(json.dumps({**good, "num_shards": 1 << 64}))
    assert "'num_shards'" in refused(tmp_path)
    for name in ("softcap", "scale"):
        changed = json.dumps(good | {"head": good["head"] | {name: -1.5}}).replace("-1.5", "1e999")
        path.write_text(changed)
        assert f"'head.{name}'" in refused(tmp_path)
    path.write_bytes(b"\xff\x00")
    assert str(path) in refused(tmp_path)
    path.write_text(json.dumps(good))
    assert "edited after it was written" in refused(tmp_path)


@pytest.mark.parametrize("known", [False, True])
def test_a_cache_of_another_format_says_which_and_to_extract_again(known: bool, tmp_path: Path) -> None:
    cache = tmp_path / "c"
    make_plan(cache, make_samples(3))
    plan = json.loads((cache / PLAN_FILE).read_bytes())
    plan["shards"] = [{"first_sample": 0, "num_samples": 3, "num_tokens": 9, "num_rows": 4}] * 100
    (cache / PLAN_FILE).write_text(json.dumps({**plan, "format_version": 1}))
    if known:
        made = made_with(("kdpipe", "extract", "--data", "d.jsonl", "--cache", str(cache)), cache=cache)
        event = {"command": "extract", "made_with": made.model_dump(mode="json")}
        (cache / "runs" / "20260101T000000Z-1.jsonl").write_text(json.dumps(event) + "\n")
    said = refused(cache)
    assert "format version 1, this kdpipe reads version 2; extract again into another folder" in said
    again = f"kdpipe extract --data d.jsonl --cache {shlex.quote(str(cache))}-2"
    assert said.endswith(f"folder: {again}" if known else "folder")


def test_totals_that_are_not_those_of_the_shards_are_refused(tmp_path: Path) -> None:
    plan = make_plan(tmp_path, make_samples(30))
    for name in ("num_samples", "num_tokens", "num_rows"):
        other = plan.model_copy(update={name: 7})
        (tmp_path / PLAN_FILE).write_bytes(other.to_bytes())
        assert f"'{name}' is 7, its shards have {getattr(plan, name):,} together" in refused(tmp_path)


def test_a_plan_does_not_grow_with_its_shards(tmp_path: Path) -> None:
    sizes = []
    for name, shard_tokens in (("few", 10**6), ("many", 1)):
        plan = make_plan(tmp_path / name, make_samples(300), shard_tokens=shard_tokens)
        sizes.append((plan.num_shards, (tmp_path / name / PLAN_FILE).stat().st_size))
    assert [num_shards for num_shards, _ in sizes] == [1, 300]
    assert abs(sizes[1][1] - sizes[0][1]) < 20  # digits of two settings


def test_a_changed_plan_has_a_digest_of_its_own(tmp_path: Path) -> None:
    plan = make_plan(tmp_path, make_samples(5))
    before = plan.digest
    other = plan.changed(teacher_files={"a": "b"})
    assert (other.teacher_files, other.shards, plan.digest) == ({"a": "b"}, plan.shards, before)
    assert other.digest == hashlib.sha256(other.to_bytes()).hexdigest() != before
