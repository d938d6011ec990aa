"""Verify finds and names every damage there is; repair puts it aside and nothing else; gc removes what no one needs."""

import os
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tests.caches import fill_shard, grow_plan, make_cache, make_samples, random_rows, verified

from kdpipe.manifests import durable
from kdpipe.manifests import samples as samples_module
from kdpipe.manifests.cache import HEAD_FILE, Cache
from kdpipe.manifests.durable import QUARANTINE, hold
from kdpipe.manifests.errors import CheckFailed, CorruptError, IncompleteError, LayoutError
from kdpipe.manifests.fitted import CODEC_FILE
from kdpipe.manifests.plan import PLAN_FILE, SAMPLES_FILE, Plan, plan_folder, read_plan
from kdpipe.manifests.shard import BLOCK, commit_path, shard_path
from kdpipe.manifests.verify import Level, check, collect_garbage, examine, put_aside, repair

SOAK = [pytest.mark.slow, pytest.mark.timeout(7200)]


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    make_cache(tmp_path / "c")
    return tmp_path / "c"


@pytest.fixture
def coded(tmp_path: Path) -> Path:
    """One whose rows have exceptions."""
    opened = make_cache(tmp_path / "coded", codec="fisher kl=0.01")
    assert opened.shard(1).layout.tensors["exception_places"].shape[0] > 2
    return opened.path


def flip(path: Path, at: int, bit: int = 1) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= bit
    path.write_bytes(data)


def damaged(folder: Path, level: Level = "full") -> list[str | int]:
    return [finding.part for finding in examine(Cache.open(folder), level) if finding.damaged]


def test_all_damage_is_told_not_the_first(cache: Path) -> None:
    flip(shard_path(cache, 1), -9)
    flip(shard_path(cache, 3), 5000)
    flip(cache / "teacher" / HEAD_FILE, -1)
    flip(cache / SAMPLES_FILE, 900)
    commit_path(cache, 2).unlink()
    findings = {finding.part: finding.error for finding in examine(Cache.open(cache))}
    assert list(findings) == ["samples", "head", "tokenizer", 0, 1, 2, 3]
    assert findings[0] is None
    assert isinstance(findings[2], IncompleteError)
    assert all(isinstance(findings[part], CorruptError) for part in ("samples", "head", 1, 3))


@pytest.mark.parametrize("name", ["header", "size", "row_offsets", "sample_ids", "crc32c table's end"])
def test_a_quick_look_finds(name: str, cache: Path) -> None:
    path = shard_path(cache, 1)
    tensors = Cache.open(cache).shard(1).layout.tensors
    if name == "size":
        path.write_bytes(path.read_bytes()[:-1])
    else:
        at = {"header": 70, "crc32c table's end": -1}
        flip(path, at[name] if name in at else tensors[name].begin)
    assert damaged(cache, "quick") == [1]


@pytest.mark.parametrize(("at", "found"), [(0, [0]), (BLOCK - 1, [0]), (BLOCK, [])])
def test_a_quick_look_finds_damage_in_the_first_rows_and_not_in_the_next(
    at: int, found: list[int], tmp_path: Path
) -> None:
    """Rows of 40 KB: the shard has several blocks, and the tables that are read on opening are in the last."""
    cache = make_cache(tmp_path / "c", num_samples=8, hidden_size=20_011, vocab_size=1).path
    flip(shard_path(cache, 0), Cache.open(cache).shard(0).layout.body + at)
    assert (damaged(cache, "quick"), damaged(cache, "full")) == (found, [0])


def test_a_quick_look_finds_samples_of_another_cache(cache: Path, tmp_path: Path) -> None:
    """As many shards, and a whole file by itself."""
    other = make_cache(tmp_path / "other", samples=make_samples(21, seed=5))
    assert len(other.plan.shards) == len(Cache.open(cache).plan.shards)
    shutil.copy(tmp_path / "other" / SAMPLES_FILE, cache / SAMPLES_FILE)
    assert damaged(cache, "quick") == ["samples"]


def test_a_head_of_another_teacher_is_found_whole_as_it_is(cache: Path, tmp_path: Path) -> None:
    """Same architecture and size: every logit would be wrong, and nothing else would tell."""
    make_cache(tmp_path / "other", seed=1)
    shutil.copy(tmp_path / "other" / "teacher" / HEAD_FILE, cache / "teacher" / HEAD_FILE)
    with pytest.raises(CorruptError, match=r"PLAN\.json says"):
        Cache.open(cache).head()
    assert damaged(cache, "quick") == ["head"]


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def replaced_by_a_link(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to(path.with_name("elsewhere"))


@pytest.mark.parametrize("damage", [lambda path: flip(path, 9), emptied, replaced_by_a_link])
def test_a_file_beside_the_head_that_changed_is_found_and_put_aside(
    damage: Callable[[Path], None], cache: Path
) -> None:
    path = cache / "teacher" / "head.json"
    damage(path)
    (finding,) = [each for each in examine(Cache.open(cache), "quick") if each.damaged]
    assert (finding.part, finding.error.where if finding.error else None) == ("tokenizer", str(path))
    assert [each.part for each in repair(Cache.open(cache))] == ["tokenizer"]
    assert not path.exists()
    (finding,) = [each for each in examine(Cache.open(cache), "quick") if each.error]
    assert isinstance(finding.error, IncompleteError)


def as_folder(path: Path) -> None:
    path.unlink()
    (path / "in it").mkdir(parents=True)


def as_link(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to("elsewhere")


def as_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize("name", [HEAD_FILE, CODEC_FILE, "head.json"])
@pytest.mark.parametrize("becomes", [as_folder, as_link, as_pipe])
def test_what_is_no_file_in_the_place_of_one_of_the_teachers_is_told_with_the_way_out(
    becomes: Callable[[Path], None], name: str, tmp_path: Path
) -> None:
    cache = make_cache(tmp_path / "a cache", num_samples=80, codec="int8")
    place = cache.teacher_folder / name
    becomes(place)
    looks = {HEAD_FILE: cache.head, CODEC_FILE: cache.info, "head.json": cache.check_teacher_files}
    for look in (looks[name], *([] if name == HEAD_FILE else [cache.check_teacher_files])):
        with pytest.raises(
            LayoutError, match=r"not a regular file.*; put it aside with: kdpipe cache repair '.*cache'"
        ):
            look()
    assert len(repair(cache)) == 1
    assert not os.path.lexists(place)
    assert os.path.lexists(cache.path / QUARANTINE / name)


def test_files_nobody_wrote_beside_the_head_are_left_alone(cache: Path) -> None:
    (cache / "teacher" / "notes.txt").write_text("a note")
    assert damaged(cache, "deep") == []


def test_a_deep_look_finds_rows_that_are_not_finite(tmp_path: Path) -> None:
    def rows(plan: Plan, index: int) -> np.ndarray:
        made = random_rows(plan, index)
        if index == 2:
            made[-1, -1] = np.inf
        return made

    make_cache(tmp_path / "c")
    for path in (commit_path(tmp_path / "c", 2), shard_path(tmp_path / "c", 2)):
        path.unlink()
    fill_shard(tmp_path / "c", 2, rows=rows)
    assert (damaged(tmp_path / "c", "full"), damaged(tmp_path / "c", "deep")) == ([], [2])


def test_a_deep_look_finds_rows_that_the_mask_does_not_ask_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planned by a kdpipe that counted otherwise: samples.arrow and the shard agree, and the mask has other rows."""
    own = samples_module.num_rows
    monkeypatch.setattr(samples_module, "num_rows", lambda mask, every=False: max(own(mask, every=every) - 1, 0))
    make_cache(tmp_path / "c")
    monkeypatch.undo()
    assert damaged(tmp_path / "c", "full") == []
    assert damaged(tmp_path / "c", "deep") == [*range(len(Cache.open(tmp_path / "c").plan.shards))]
    errors = [finding.error for finding in examine(Cache.open(tmp_path / "c"), "deep") if finding.damaged]
    assert all(re.search(r"sample \d+ of it has \d+ rows, its mask \d+", str(error)) for error in errors)


def test_a_repair_that_is_killed_leaves_no_commit_record_without_its_shard(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flip(shard_path(cache, 1), -9)
    own, moved = durable.fsync_folder, []

    def flush(folder: Path) -> None:
        own(folder)
        moved.append(folder)
        raise KeyboardInterrupt

    monkeypatch.setattr(durable, "fsync_folder", flush)
    with pytest.raises(KeyboardInterrupt):
        repair(Cache.open(cache))
    assert moved == [cache / "commits"]
    assert not commit_path(cache, 1).exists()
    assert shard_path(cache, 1).exists()


def test_repair_puts_the_damaged_aside_and_touches_nothing_else(cache: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in cache.rglob("*") if path.is_file()}
    bad = {shard_path(cache, 1), commit_path(cache, 1), cache / "teacher" / HEAD_FILE}
    good_bytes = {path: path.read_bytes() for path in bad}
    flip(shard_path(cache, 1), -9)
    flip(cache / "teacher" / HEAD_FILE, -1)
    assert [finding.part for finding in repair(Cache.open(cache))] == ["head", 1]
    for path, changed in before.items():
        assert path.exists() == (path not in bad)
        if path.exists():
            assert path.stat().st_mtime_ns == changed
    assert {path.name for path in (cache / "quarantine").iterdir()} == {path.name for path in bad}
    with pytest.raises(IncompleteError):
        verified(cache)
    shutil.copy(cache / "quarantine" / HEAD_FILE, cache / "teacher" / HEAD_FILE)
    flip(cache / "teacher" / HEAD_FILE, -1)
    fill_shard(cache, 1)
    assert all(path.read_bytes() == data for path, data in good_bytes.items())
    assert repair(Cache.open(cache)) == []


def test_a_part_damaged_again_does_not_replace_what_was_put_aside(cache: Path) -> None:
    for _ in range(3):
        flip(shard_path(cache, 0), -9)
        repair(Cache.open(cache))
        fill_shard(cache, 0)
    assert len(list((cache / "quarantine").iterdir())) == 6
    assert verified(cache)


def test_a_cache_without_its_table_of_samples_cannot_be_repaired(cache: Path) -> None:
    flip(cache / SAMPLES_FILE, 900)
    flip(shard_path(cache, 1), -9)
    with pytest.raises(CorruptError, match="extract into another folder"):
        repair(Cache.open(cache))
    assert shard_path(cache, 1).exists()


@pytest.mark.parametrize("grown", [False, True])
def test_a_plan_that_changed_is_named_and_no_shard_is_put_aside_for_it(grown: bool, cache: Path) -> None:
    """A digit of PLAN.json was changed and it still reads: every shard contradicts it, and not the other way round."""
    if grown:
        plan = grow_plan(cache, make_samples(9, seed=3))
        for number in plan.brought()[1]:
            fill_shard(cache, number)
        assert verified(cache, "deep") == [*range(len(plan.shards))]
    path = plan_folder(cache, int(grown)) / PLAN_FILE
    path.write_bytes(path.read_bytes().replace(b'"seed": 0', b'"seed": 4'))
    assert "plan" in damaged(cache, "quick")
    with pytest.raises(CorruptError, match="changed after they were made") as caught:
        repair(Cache.open(cache))
    assert caught.value.where == str(path)
    assert not (cache / "quarantine").exists()


def test_one_commit_record_that_changed_is_not_taken_for_the_plan(cache: Path) -> None:
    path = commit_path(cache, 1)
    path.write_bytes(path.read_bytes().replace(read_plan(cache).digest.encode(), b"0" * 64))
    assert damaged(cache) == [1]


def test_garbage_is_what_was_put_aside_and_what_nobody_holds(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(durable, "MOMENT_S", 0.0)
    before = {path: path.read_bytes() for path in cache.rglob("*") if path.is_file()}
    put_aside(cache, shard_path(cache, 1))
    taken = sum(path.stat().st_size for path in (cache / "quarantine").iterdir())
    (cache / "tmp" / "000009.safetensors.1-a").write_bytes(b"x" * 1000)
    with open(cache / "tmp" / "000010.safetensors.2-b", "wb") as living:
        hold(living.fileno())
        assert collect_garbage(cache) == taken + 1000
        assert [path.name for path in (cache / "tmp").iterdir()] == ["000010.safetensors.2-b"]
    assert not (cache / "quarantine").exists()
    assert all(path.read_bytes() == data for path, data in before.items() if path != shard_path(cache, 1))


@pytest.mark.parametrize(
    ("of", "bits", "bursts"),
    [
        ("cache", 1500, 300),
        ("coded", 150, 50),
        pytest.param("cache", 10_000, 1000, marks=SOAK),
        pytest.param("coded", 10_000, 1000, marks=SOAK),
    ],
)
def test_flipped_bits_and_bursts_are_all_found_and_located(
    of: str, bits: int, bursts: int, request: pytest.FixtureRequest
) -> None:
    """Every bit of header, tables, exceptions and checksums, random ones of rows: the damaged shard and no other."""
    cache = request.getfixturevalue(of)
    path, draw = shard_path(cache, 1), random.Random(bits)
    good, layout = path.read_bytes(), Cache.open(cache).shard(1).layout
    text_ends = good.index(b"}}", 8) + 2
    rows = range(layout.body, layout.tensors["row_offsets"].begin)
    places = [*range(text_ends), *range(rows.stop, len(good))]
    flips = [[(at, 1 << bit)] for at in places for bit in range(8)]
    if len(flips) > 20 * bits:
        flips = draw.sample(flips, 20 * bits)
    flips += [[(draw.choice(rows), 1 << draw.randrange(8))] for _ in range(bits)]
    for _ in range(bursts):
        first = draw.randrange(len(good))
        flips.append(
            [(at, draw.randrange(1, 256)) for at in range(first, min(first + draw.randrange(2, 64), len(good)))]
        )
    opened = Cache.open(cache)
    for flipped in flips:
        data = bytearray(good)
        for at, bit in flipped:
            data[at] ^= bit
        path.write_bytes(data)
        error = check(opened, 1, "full").error
        assert isinstance(error, CheckFailed), flipped
        assert error.where == str(path)
    path.write_bytes(good)
    assert verified(cache)
