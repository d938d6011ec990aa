"""A cache that grows: the teacher runs on the new samples only, and no byte that was there is written again."""

import dataclasses
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tests.caches import verified
from tests.chats import write_chats
from tests.conftest import Apart, Main
from tests.faults.powercut import LostError, PowerCut
from tests.stages.extracting import coded_spec, committed_are_whole, extract_small, files, small_spec

from kdpipe.manifests.cache import Cache
from kdpipe.manifests.errors import CacheError, CheckFailed, CorruptError, KdpipeError, TemporaryError
from kdpipe.manifests.plan import PLAN_FILE, SAMPLES_FILE, plan_folder
from kdpipe.manifests.progress import Silent
from kdpipe.manifests.shard import commit_path
from kdpipe.manifests.shard_table import SHARDS_FILE
from kdpipe.stages.extract import ExtractSpec, staging


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> ExtractSpec:
    folder = tmp_path_factory.mktemp("inputs")
    small = small_spec(folder)
    write_chats(folder / "more.jsonl", 9, seed=7, longest=60)
    write_chats(folder / "most.jsonl", 5, seed=8, longest=60)
    return small


def of_data(spec: ExtractSpec, *names: str, grow: bool = False) -> ExtractSpec:
    return dataclasses.replace(spec, grow=grow, data=tuple(spec.data[0].with_name(f"{name}.jsonl") for name in names))


@pytest.fixture(scope="module")
def small(spec: ExtractSpec, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of the first data file, to copy."""
    cache = tmp_path_factory.mktemp("small") / "cache"
    extract_small(spec, cache)
    return cache


@pytest.fixture(scope="module")
def grown(spec: ExtractSpec, small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, grown once, with all its data named."""
    cache = shutil.copytree(small, tmp_path_factory.mktemp("grown") / "cache")
    extract_small(of_data(spec, "data", "more"), cache)
    return cache


def sample_keys(cache: Cache) -> list[bytes]:
    return [*cache.samples.identities()]


@pytest.mark.parametrize("names", [("more",), ("data", "more"), ("more", "data")], ids="+".join)
def test_only_new_samples_run_and_nothing_is_written_again(
    names: tuple[str, ...], spec: ExtractSpec, small: Path, grown: Path, tmp_path: Path
) -> None:
    cache, told = shutil.copytree(small, tmp_path / "cache"), tmp_path / "told"
    before, there = files(cache), len(Cache.open(cache).plan.shards)
    extract_small(of_data(spec, *names, grow="data" not in names), cache, told=told)
    opened = Cache.open(cache)
    ran = [int(number) for number in told.read_text().split()]
    assert ran == [*range(there, len(opened.plan.shards))]
    assert sum(opened.plan.shards[number].num_samples for number in ran) == 9
    after = files(cache)
    assert {name: after[name] for name in before} == before
    assert (len(opened), opened.complete, opened.info()["times_grown"]) == (21, True, 1)
    assert verified(cache, "deep") == [*range(len(opened.plan.shards))]
    told_apart = {"PLAN.json"}  # how many were read differs with what was named
    named = {name: data for name, data in after.items() if Path(name).name not in told_apart}
    if names == ("data", "more"):
        assert after == files(grown)
    assert named.keys() == {name for name in files(grown) if Path(name).name not in told_apart}


def test_grown_is_what_one_extraction_of_everything_gives(spec: ExtractSpec, grown: Path, tmp_path: Path) -> None:
    extract_small(of_data(spec, "data", "more"), tmp_path / "cache")
    ours, theirs = Cache.open(grown), Cache.open(tmp_path / "cache")
    assert ours.plan.fingerprint == theirs.plan.fingerprint
    assert sample_keys(ours) == sample_keys(theirs)
    assert np.array_equal(ours.heldout(), theirs.heldout())
    for one, other in zip(ours, theirs, strict=True):
        assert np.array_equal(one.rows, other.rows)


def test_grows_again_and_again_and_is_left_alone_where_nothing_is_new(
    spec: ExtractSpec, grown: Path, tmp_path: Path
) -> None:
    cache = shutil.copytree(grown, tmp_path / "cache")
    for names in (("data",), ("more", "data"), ("data", "more")):
        before = files(cache)
        extract_small(of_data(spec, *names), cache)
        assert files(cache) == before
    extract_small(of_data(spec, "most", "more", grow=True), cache)
    opened = Cache.open(cache)
    assert (len(opened), opened.plan.generation) == (26, 2)
    assert [*map(len, opened.plan.brought())] == [
        len(Cache.open(grown).plan.brought()[0]),
        len(Cache.open(grown).plan.brought()[1]),
        len(opened.plan.shards) - len(Cache.open(grown).plan.shards),
    ]
    verified(cache, "deep")


@pytest.mark.parametrize("names", [("more",), ("most", "more")], ids="+".join)
def test_data_that_lacks_what_is_there_is_refused(
    names: tuple[str, ...], spec: ExtractSpec, grown: Path, tmp_path: Path
) -> None:
    """A wrong file name must not become part of a cache for ever."""
    cache = shutil.copytree(grown, tmp_path / "cache")
    with pytest.raises(CacheError, match=r"12 of its 21 samples are not in this data.*--grow"):
        extract_small(of_data(spec, *names), cache)
    assert files(cache) == files(grown)
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]


def test_a_sample_is_there_as_often_as_the_data_has_it(spec: ExtractSpec, small: Path, tmp_path: Path) -> None:
    cache = shutil.copytree(small, tmp_path / "cache")
    lines = spec.data[0].read_text().splitlines()
    twice = tmp_path / "twice.jsonl"
    twice.write_text("\n".join([*lines, lines[3], lines[3]]) + "\n")
    changed = dataclasses.replace(spec, data=(twice,))
    extract_small(changed, cache)
    opened = Cache.open(cache)
    assert len(opened) == 14
    for added in (12, 13):
        assert np.array_equal(opened[added].token_ids, opened[3].token_ids)
        assert np.array_equal(opened[added].rows, opened[3].rows)
    before = files(cache)
    extract_small(changed, cache)
    assert files(cache) == before


@pytest.mark.parametrize(
    "place", ["plan:written", "plan:flushed", "plan:renamed", "plan:published", "shards:linked", "commits:published#2"]
)
def test_killed_while_growing(
    place: str, spec: ExtractSpec, small: Path, grown: Path, apart: Apart, tmp_path: Path
) -> None:
    cache = shutil.copytree(small, tmp_path / "a" / "cache")
    more = of_data(spec, "data", "more")
    assert apart(extract_small, more, cache, place) == -signal.SIGKILL
    committed_are_whole(cache)
    assert apart(extract_small, more, cache) == 0
    assert files(cache) == files(grown)
    assert [path.name for path in cache.parent.iterdir()] == [cache.name]


@pytest.fixture(scope="module")
def coded(spec: ExtractSpec, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A cache of coded rows, to copy, and the same grown."""
    folder = tmp_path_factory.mktemp("coded")
    extract_small(coded_spec(spec), folder / "small")
    shutil.copytree(folder / "small", folder / "grown")
    extract_small(coded_spec(of_data(spec, "data", "more")), folder / "grown")
    return folder / "small", folder / "grown"


@pytest.mark.parametrize("place", ["plan:flushed", "plan:renamed", "shard:digested#2", "commits:published#2"])
def test_killed_while_a_coded_cache_grows(
    place: str, spec: ExtractSpec, coded: tuple[Path, Path], apart: Apart, tmp_path: Path
) -> None:
    cache = shutil.copytree(coded[0], tmp_path / "a" / "cache")
    more = coded_spec(of_data(spec, "data", "more"))
    assert apart(extract_small, more, cache, place) == -signal.SIGKILL
    committed_are_whole(cache)
    assert apart(extract_small, more, cache) == 0
    assert files(cache) == files(coded[1])
    assert [path.name for path in cache.parent.iterdir()] == [cache.name]


def test_an_unfinished_cache_grows_and_both_are_finished(
    spec: ExtractSpec, grown: Path, apart: Apart, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    assert apart(extract_small, spec, cache, "commits:published#2") == -signal.SIGKILL
    assert apart(extract_small, of_data(spec, "data", "more"), cache) == 0
    assert files(cache) == files(grown)


def test_parts_share_out_what_is_new(spec: ExtractSpec, small: Path, grown: Path, tmp_path: Path) -> None:
    cache, more = shutil.copytree(small, tmp_path / "cache"), of_data(spec, "data", "more")
    for part in ((2, 2), (1, 2)):
        told = tmp_path / f"told{part[0]}"
        extract_small(more, cache, part=part, told=told)
        assert told.read_text()
    assert files(cache) == files(grown)


def test_two_writers_that_add_other_things_at_once(spec: ExtractSpec, small: Path, grown: Path, tmp_path: Path) -> None:
    """The one that comes later to put its plan in place is told to run again, and then adds its own."""
    cache = shutil.copytree(small, tmp_path / "cache")
    with staging.staged(of_data(spec, "most", grow=True), cache, Silent()) as late:
        extract_small(of_data(spec, "data", "more"), cache)
        with pytest.raises(TemporaryError, match="run it again"):
            late.publish()
    assert files(cache) == files(grown)
    extract_small(of_data(spec, "most", grow=True), cache)
    assert len(Cache.open(cache)) == 26


def test_what_was_before_is_opened_by_its_fingerprint(small: Path, grown: Path) -> None:
    before = Cache.open(small)
    opened = Cache.open(grown, fingerprint=before.plan.fingerprint.overall())
    assert (len(opened), opened.plan, opened.complete) == (12, before.plan, True)
    assert np.array_equal(opened[11].rows, before[11].rows)
    assert len(Cache.open(grown, fingerprint="of nothing")) == 21


@pytest.mark.parametrize("name", [PLAN_FILE, SAMPLES_FILE, SHARDS_FILE])
@pytest.mark.parametrize("generation", [0, 1])
def test_damage_in_any_generation_is_found(name: str, generation: int, grown: Path, tmp_path: Path) -> None:
    cache = shutil.copytree(grown, tmp_path / "cache")
    path = plan_folder(cache, generation) / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckFailed) as caught:
        verified(cache)
    assert caught.value.where == str(path)


def test_a_cache_with_damaged_samples_neither_goes_on_nor_grows(spec: ExtractSpec, small: Path, tmp_path: Path) -> None:
    cache = shutil.copytree(small, tmp_path / "cache")
    commit_path(cache, 1).unlink()
    path = cache / SAMPLES_FILE
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    before = files(cache)
    for names in (("data",), ("data", "more")):
        with pytest.raises(CorruptError, match="sha256") as caught:
            extract_small(of_data(spec, *names), cache)
        assert caught.value.where == str(path)
        assert files(cache) == before


def lose_the_newest(cache: Path) -> None:
    shutil.rmtree(cache / "grown" / "000001")


def lose_all(cache: Path) -> None:
    shutil.rmtree(cache / "grown")


def lose_the_first_plan(cache: Path) -> None:
    (cache / PLAN_FILE).unlink()


def lose_the_newest_plan(cache: Path) -> None:
    (cache / "grown" / "000001" / PLAN_FILE).unlink()


def add_an_empty_one(cache: Path) -> None:
    (cache / "grown" / "000002").mkdir()


@pytest.mark.parametrize(
    "lose", [lose_the_newest, lose_all, lose_the_first_plan, lose_the_newest_plan, add_an_empty_one]
)
def test_a_lost_plan_is_damage_and_nothing_is_put_in_its_place(
    lose: Callable[[Path], None], spec: ExtractSpec, grown: Path, main: Main, tmp_path: Path
) -> None:
    cache = shutil.copytree(grown, tmp_path / "cache")
    lose(cache)
    before = files(cache)
    for words in (["verify", "--quick"], ["verify"], ["repair"], ["info"]):
        code, _, err = main("cache", *words, cache)
        assert code == 1, words
        assert "put it back from a copy" in err
        assert "Traceback" not in err
    for changes in ({}, {"grow": True}):
        with pytest.raises(KdpipeError):
            extract_small(dataclasses.replace(of_data(spec, "data", "most"), **changes), cache)
    assert files(cache) == before


def test_a_copy_without_its_empty_folders_grows(spec: ExtractSpec, small: Path, grown: Path, tmp_path: Path) -> None:
    cache = shutil.copytree(small, tmp_path / "cache")
    for folder in ("tmp", "claims"):
        shutil.rmtree(cache / folder)
    extract_small(of_data(spec, "data", "more"), cache)
    assert files(cache) == files(grown)


FLUSHES = [("fsync_tree", "files"), ("fsync_tree", "folders"), ("Staged.publish", "grown"), ("Staged.publish", "cache")]


def test_no_cut_loses_what_is_added(spec: ExtractSpec, small: Path, grown: Path, tmp_path: Path) -> None:
    lose_nothing(of_data(spec, "data", "more"), small, grown, tmp_path)


@pytest.mark.slow
def test_no_cut_loses_what_is_added_to_a_coded_cache(
    spec: ExtractSpec, coded: tuple[Path, Path], tmp_path: Path
) -> None:
    lose_nothing(coded_spec(of_data(spec, "data", "more")), *coded, tmp_path)


def lose_nothing(more: ExtractSpec, small: Path, grown: Path, tmp_path: Path) -> None:
    """A cut at every flush of growing from one to the other."""
    cache = shutil.copytree(small, tmp_path / "live" / "cache")
    left = []

    def cut(disk: PowerCut) -> None:
        left.append(tmp_path / f"cut{len(left)}")
        disk.restore(left[-1])

    with PowerCut(tmp_path / "live", after_flush=cut) as disk:
        extract_small(more, cache)
        disk.restore(tmp_path / "last")
    assert files(tmp_path / "last" / "cache") == files(grown)
    assert len(left) > 15
    for each in left:
        committed_are_whole(each / "cache")
        extract_small(more, each / "cache")
        assert files(each / "cache") == files(grown), each.name
        shutil.rmtree(each)


@pytest.mark.parametrize("place", FLUSHES, ids="-".join)
def test_every_flush_of_growing_is_needed(
    place: tuple[str, str], spec: ExtractSpec, small: Path, grown: Path, tmp_path: Path
) -> None:
    cache, more = shutil.copytree(small, tmp_path / "live" / "cache"), of_data(spec, "data", "more")

    def extract_and_check() -> None:
        with PowerCut(tmp_path / "live", skip=[place]) as disk:
            extract_small(more, cache)
            disk.restore(tmp_path / "left")
        if (kept := committed_are_whole(tmp_path / "left" / "cache")) != committed_are_whole(grown):
            raise LostError(f"all but {kept} shards")

    with pytest.raises((LostError, KdpipeError)):
        extract_and_check()
