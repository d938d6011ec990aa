"""A power cut at every flush of an extraction: no committed shard is lost, and the next run ends with the same bytes.

Every flush of the protocol is needed: without any one of them a cut would lose something, and this test would fail.
"""

import os
import shutil
import signal
from pathlib import Path

import pytest
from tests.conftest import Apart
from tests.faults.powercut import LostError, Place, PowerCut, left_after_a_rename
from tests.stages.extracting import (
    coded_spec,
    committed_are_whole,
    extract_small,
    files,
    require_exceptions,
    small_spec,
)

from kdpipe.manifests.cache import HEAD_FILE, Cache
from kdpipe.manifests.errors import KdpipeError
from kdpipe.manifests.fitted import CODEC_FILE
from kdpipe.manifests.plan import PLAN_FILE
from kdpipe.manifests.shard import Commit, ShardWriter, commit_path, shard_path
from kdpipe.stages.extract import ExtractSpec

FLUSHES: list[Place] = [
    ("fsync_tree", "files"),
    ("fsync_tree", "folders"),
    ("Staged.publish", "new"),
    ("Staged.publish", "live"),
    ("write_once", "tmp"),
    ("ScratchFile.flush", "tmp"),
    ("publish", "shards"),
    ("publish", "commits"),
]
"""Every flush of an extraction into a cache whose parent folder is new as well."""


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> ExtractSpec:
    return small_spec(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def coded(spec: ExtractSpec) -> ExtractSpec:
    """The same with a codec that is fitted before the first shard."""
    return coded_spec(spec)


class Promises:
    """What extraction has said is safe: shards whose commit() returned, and the cache once it is published."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, disk: PowerCut, scratch: Path) -> None:
        self.disk, self.scratch, self.count = disk, scratch, 0
        own = ShardWriter.commit

        def commit(writer: ShardWriter) -> Commit:
            record = own(writer)
            self.count += 1
            self.check()
            return record

        monkeypatch.setattr(ShardWriter, "commit", commit)

    def check(self) -> None:
        """After a cut right now, every promised shard is there and whole."""
        shutil.rmtree(self.scratch, ignore_errors=True)
        self.disk.restore(self.scratch)
        cache = self.scratch / "new" / "cache"
        if not (cache / PLAN_FILE).exists():
            raise LostError("the cache")
        opened = Cache.open(cache)
        opened.samples.verify()
        opened.head()
        opened.check_teacher_files()
        if (kept := committed_are_whole(cache)) < self.count:
            raise LostError(f"{self.count - kept} of {self.count} shards")


@pytest.mark.slow
def test_no_cut_loses_a_coded_shard_its_codec_or_the_way_on(
    coded: ExtractSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lose_nothing(coded, tmp_path, monkeypatch)
    require_exceptions(tmp_path / "whole" / "cache")


def test_no_cut_loses_a_committed_shard_or_the_way_on(
    spec: ExtractSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lose_nothing(spec, tmp_path, monkeypatch)


def lose_nothing(spec: ExtractSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cut at every flush of an extraction, and after every commit."""
    (tmp_path / "live").mkdir()
    extract_small(spec, tmp_path / "whole" / "cache")
    whole = files(tmp_path / "whole" / "cache")
    cuts = []

    def cut(disk: PowerCut) -> None:
        left = tmp_path / f"cut{len(cuts)}"
        disk.restore(left)
        cuts.append(left)

    with PowerCut(tmp_path / "live", after_flush=cut) as disk:
        promises = Promises(monkeypatch, disk, tmp_path / "now")
        extract_small(spec, tmp_path / "live" / "new" / "cache")
        promises.check()
    monkeypatch.undo()
    assert promises.count > 4
    assert len(cuts) > 30
    for left in cuts:
        cache = left / "new" / "cache"
        if (cache / PLAN_FILE).exists():
            committed_are_whole(cache)
        extract_small(spec, cache)
        assert files(cache) == whole, left.name
        shutil.rmtree(left)


def test_a_shard_adopted_after_a_kill_survives_a_cut(spec: ExtractSpec, tmp_path: Path) -> None:
    """A kill came after the shard was linked and before its name was flushed; the next run commits it."""
    cache = tmp_path / "live" / "cache"
    extract_small(spec, cache)
    commit_path(cache, 1).unlink()
    shard = shard_path(cache, 1)
    os.link(shard, tmp_path / "aside")
    shard.unlink()
    with PowerCut(tmp_path / "live") as disk:
        disk.contents[(tmp_path / "aside").stat().st_ino] = (tmp_path / "aside").read_bytes()  # flushed before the link
        os.link(tmp_path / "aside", shard)
        extract_small(spec, cache)
        disk.restore(tmp_path / "left")
    assert committed_are_whole(tmp_path / "left" / "cache") == committed_are_whole(cache)


def test_a_plan_put_in_place_before_a_kill_survives_a_cut(spec: ExtractSpec, apart: Apart, tmp_path: Path) -> None:
    """The kill came after the cache had its name and before that was on the disk; the next run fills it."""
    cache = tmp_path / "live" / "cache"
    cache.parent.mkdir()
    assert apart(extract_small, spec, cache, "plan:renamed") == -signal.SIGKILL
    left = left_after_a_rename(cache, tmp_path, lambda named: extract_small(spec, named))
    assert committed_are_whole(left) == committed_are_whole(cache)


@pytest.mark.parametrize("skipped", [None, ("publish", "teacher")])
def test_a_codec_fitted_again_survives_a_cut(skipped: Place | None, coded: ExtractSpec, tmp_path: Path) -> None:
    cache = tmp_path / "live" / "cache"
    extract_small(coded, cache)
    whole = files(cache)
    (cache / "teacher" / CODEC_FILE).unlink()
    with PowerCut(tmp_path / "live", skip=[] if skipped is None else [skipped]) as disk:
        extract_small(coded, cache)
        disk.restore(tmp_path / "left")
    assert (files(tmp_path / "left" / "cache") == whole) == (skipped is None)


@pytest.mark.parametrize("skipped", [None, ("fsync_tree", "files"), ("publish", "teacher")])
def test_what_is_made_again_of_the_teachers_survives_a_cut(
    skipped: Place | None, spec: ExtractSpec, tmp_path: Path
) -> None:
    cache = tmp_path / "live" / "cache"
    extract_small(spec, cache)
    whole = files(cache)
    for name in ("tokenizer.json", HEAD_FILE):
        (cache / "teacher" / name).unlink()
    with PowerCut(tmp_path / "live", skip=[] if skipped is None else [skipped]) as disk:
        extract_small(spec, cache)
        disk.restore(tmp_path / "left")
    assert (files(tmp_path / "left" / "cache") == whole) == (skipped is None)


CODED_FLUSHES: list[list[Place]] = [
    *([place] for place in FLUSHES if place != ("Staged.publish", "new")),
    # Its plan is in place before it looks which shards are missing.
    [("Staged.publish", "new"), ("_flush_name", "new")],
]


@pytest.mark.parametrize("places", CODED_FLUSHES, ids=str)
def test_every_flush_is_needed_by_a_coded_cache_too(
    places: list[Place], coded: ExtractSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lose_something(places, coded, tmp_path, monkeypatch)


@pytest.mark.parametrize("place", FLUSHES, ids="-".join)
def test_every_flush_is_needed(
    place: Place, spec: ExtractSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lose_something([place], spec, tmp_path, monkeypatch)


def lose_something(places: list[Place], spec: ExtractSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An extraction without these flushes, cut after every commit."""
    (tmp_path / "live").mkdir()

    def extract_and_check() -> None:
        with PowerCut(tmp_path / "live", skip=places) as disk:
            promises = Promises(monkeypatch, disk, tmp_path / "now")
            extract_small(spec, tmp_path / "live" / "new" / "cache")
            promises.check()

    with pytest.raises((LostError, KdpipeError)):
        extract_and_check()


def test_the_list_of_flushes_is_whole(spec: ExtractSpec, tmp_path: Path) -> None:
    (tmp_path / "live").mkdir()
    with PowerCut(tmp_path / "live") as disk:
        extract_small(spec, tmp_path / "live" / "new" / "cache")
    assert sorted(disk.places) == sorted(FLUSHES)
