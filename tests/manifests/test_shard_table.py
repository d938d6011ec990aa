"""The shard table: what is written comes back as columns, and no other file passes for it."""

import hashlib
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.caches import fill_shard, grow_plan, make_cache, make_plan, make_samples

from kdpipe.manifests import shard_table
from kdpipe.manifests.cache import Cache
from kdpipe.manifests.errors import CorruptError, KdpipeError, LayoutError
from kdpipe.manifests.plan import plan_folder, read_plan
from kdpipe.manifests.shard_table import NO_SHARDS, SHARDS_FILE, ShardPlan, ShardTable, read_shards, write_shards


@given(st.lists(st.integers(1, 5), min_size=1, max_size=40), st.sampled_from([0, shard_table.SHORT]))
def test_a_sample_is_found_in_the_shard_that_holds_it(sizes: list[int], short: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shard_table, "SHORT", short)
        table = ShardTable.of(sizes, sizes, sizes)
    assert isinstance(table.starts, list) == (short > 0)
    held = [number for number, size in enumerate(sizes) for _ in range(size)]
    assert [table.find(sample) for sample in range(sum(sizes))] == held
    assert [table.starts[number] for number in range(len(table))] == [held.index(n) for n in range(len(sizes))]


def test_a_shard_is_read_as_plain_numbers() -> None:
    table = ShardTable.of([2, 3], [20, 30], [5, 0], first=7)
    assert list(table) == [ShardPlan(7, 2, 20, 5), ShardPlan(9, 3, 30, 0)]
    assert all(type(value) is int for value in table[-1])
    with pytest.raises(IndexError):
        table[2]


def test_tables_are_equal_where_all_their_columns_are() -> None:
    table = ShardTable.of([2, 3], [20, 30], [5, 0])
    first = ShardTable.of([2], [20], [5])
    assert table == ShardTable.joined([table.since(0)]) == ShardTable.joined([first, table.since(1)])
    assert table == pickle.loads(pickle.dumps(table))
    assert table.since(2) == NO_SHARDS
    for other in (([2, 4], [20, 30], [5, 0]), ([2, 3], [20, 31], [5, 0]), ([2, 3], [20, 30], [5, 1]), ([2], [20], [5])):
        assert table != ShardTable.of(*other)
    assert table != ShardTable.of([2, 3], [20, 30], [5, 0], first=1)


@pytest.mark.parametrize("num_shards", [0, 1, 1000])
def test_what_is_written_comes_back(num_shards: int, tmp_path: Path) -> None:
    sizes = np.random.default_rng(0).integers(0, 1 << 40, (3, num_shards))
    table = ShardTable.of(*sizes.tolist(), first=11)
    digest = write_shards(tmp_path / SHARDS_FILE, table)
    found = read_shards(tmp_path / SHARDS_FILE, digest=digest, num_shards=num_shards, plan=Path("PLAN.json"))
    assert found == table


def test_each_generation_has_a_file_of_what_it_brought(tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "c")
    before = (tmp_path / "c" / SHARDS_FILE).read_bytes()
    for seed in (2, 3):
        grow_plan(cache.path, make_samples(9, seed=seed))
    plan = read_plan(cache.path)
    assert (tmp_path / "c" / SHARDS_FILE).read_bytes() == before
    for generation, numbers in enumerate(plan.brought()):
        reader = pa.ipc.open_file((plan_folder(cache.path, generation) / SHARDS_FILE).read_bytes())
        assert reader.read_all().to_pylist() == [plan.shards[number]._asdict() for number in numbers]
    assert len(plan.shards) == plan.num_shards == plan.brought()[-1].stop
    assert [shard.first_sample for shard in plan.shards] == [*np.cumsum([0, *plan.shards.num_samples[:-1]])]
    assert read_plan(cache.path, 0).shards == cache.plan.shards
    fill_shard(cache.path, len(cache.plan.shards))
    opened = Cache.open(cache.path)
    assert opened[len(cache)].token_ids.tolist() == make_samples(9, seed=2)[0].token_ids.tolist()


def lost(path: Path) -> None:
    path.unlink()


def torn(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def flipped(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def of_another_cache(path: Path) -> None:
    """As many shards, and a whole file by itself."""
    make_plan(path.parent / "tmp" / "other", make_samples(21, seed=7))
    shutil.copy(path.parent / "tmp" / "other" / SHARDS_FILE, path)


def a_link(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to("elsewhere")


def huge(path: Path) -> None:
    with open(path, "r+b") as file:
        file.truncate(10 << 30)


@pytest.mark.parametrize(
    ("damage", "error", "says"),
    [
        (lost, LayoutError, "it is missing"),
        (torn, CorruptError, "sha256"),
        (emptied, CorruptError, "sha256"),
        (flipped, CorruptError, "sha256"),
        (of_another_cache, CorruptError, r"PLAN\.json says"),
        (a_link, LayoutError, "a link"),
        (huge, LayoutError, "at most"),
    ],
)
def test_no_other_file_passes_for_the_table(
    damage: Callable[[Path], None], error: type[KdpipeError], says: str, tmp_path: Path
) -> None:
    make_cache(tmp_path / "c")
    damage(tmp_path / "c" / SHARDS_FILE)
    with pytest.raises(error, match=says) as caught:
        Cache.open(tmp_path / "c")
    assert caught.value.where == str(tmp_path / "c" / SHARDS_FILE)


def test_a_table_that_was_not_written_by_kdpipe_is_refused(tmp_path: Path) -> None:
    """Its digest is right: whoever wrote the plan wrote another table."""
    path = tmp_path / SHARDS_FILE
    table = ShardTable.of([2], [20], [5])
    digest = write_shards(path, table)
    with pytest.raises(LayoutError, match="not 2 shards with first_sample"):
        read_shards(path, digest=digest, num_shards=2, plan=Path("PLAN.json"))
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, pa.schema([("a", pa.int64())])):
        pass
    for content, says in ((path.read_bytes(), "not 1 shards with"), (b"ARROW1", "not readable as Arrow")):
        path.write_bytes(content)
        digest = hashlib.sha256(content).hexdigest()
        with pytest.raises(LayoutError, match=says):
            read_shards(path, digest=digest, num_shards=1, plan=Path("PLAN.json"))
