"""Feeding: the same samples in a step whatever the number of ranks, every sample once an epoch, packed as they lie."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.caches import fill_shard, grow_plan, make_cache, make_plan, make_samples

from kdpipe.manifests.cache import Cache
from kdpipe.manifests.errors import CacheError, ConfigError, IncompleteError
from kdpipe.manifests.row_source import CacheRows
from kdpipe.manifests.sample import row_positions
from kdpipe.manifests.shard import Shard
from kdpipe.stages.feed.batches import PlannedBatches
from kdpipe.stages.feed.dataset import Dataset, of_caches
from kdpipe.stages.feed.lengths import num_steps, planned_steps
from kdpipe.stages.feed.order import cut_steps, deal, shuffle
from kdpipe.stages.feed.packing import PackedBatch, Packer

indices = st.lists(st.integers(0, 10**9), min_size=1, max_size=80, unique=True).map(lambda some: np.array(some))
lengths = st.lists(st.integers(1, 70), min_size=1, max_size=80).map(lambda some: np.array(some, dtype=np.int64))


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    return make_cache(tmp_path_factory.mktemp("feed") / "c", num_samples=43)


@pytest.fixture(scope="module")
def rows(cache: Cache) -> Dataset:
    return of_caches([cache])


@given(indices, st.integers(-(2**63), 2**64), st.integers(0, 1000))
def test_a_shuffle_is_a_permutation(some: np.ndarray, seed: int, epoch: int) -> None:
    assert sorted(shuffle(some, seed, epoch)) == sorted(some)


@given(indices, st.integers(0, 2**32), st.integers(0, 50), st.data())
def test_two_samples_keep_their_order_whatever_else_is_there(
    some: np.ndarray, seed: int, epoch: int, data: st.DataObject
) -> None:
    kept = np.array(data.draw(st.lists(st.booleans(), min_size=len(some), max_size=len(some))))
    whole = shuffle(some, seed, epoch)
    assert shuffle(some[kept], seed, epoch).tolist() == [index for index in whole if index in some[kept]]
    assert shuffle(some[::-1], seed, epoch).tolist() == whole.tolist()


def test_seeds_and_epochs_give_orders_of_their_own() -> None:
    some = np.arange(50)
    orders = [tuple(shuffle(some, seed, epoch)) for seed in range(5) for epoch in range(5)]
    assert len(set(orders)) == 25
    assert np.corrcoef(some, orders[0])[0, 1] < 0.5


def test_the_order_never_changes() -> None:
    """Written down once: a run resumed under a later version must see the same samples."""
    assert shuffle(np.arange(12), 3, 1).tolist() == [5, 1, 4, 6, 0, 10, 11, 3, 9, 2, 7, 8]


@given(lengths, st.integers(1, 400))
def test_steps_are_never_empty_and_keep_the_order(num_tokens: np.ndarray, batch_tokens: int) -> None:
    order = np.arange(len(num_tokens))[::-1]
    steps = cut_steps(order, num_tokens, batch_tokens)
    assert len(steps) == num_steps(num_tokens, batch_tokens)
    assert all(len(step) for step in steps)
    assert np.concatenate(steps).tolist() == order.tolist()


@pytest.mark.parametrize(
    ("epochs", "most", "expected"), [(1, None, 4), (2.5, None, 10), (0.1, None, 1), (3, 5, 5), (1, 9, 4)]
)
def test_a_run_has_the_steps_of_its_epochs_or_as_many_as_it_may(epochs: float, most: int | None, expected: int) -> None:
    assert planned_steps(num_steps(np.full(20, 10), 50), epochs=epochs, max_steps=most) == expected


def test_a_subset_is_of_the_training_samples_alone_and_a_smaller_one_within_a_larger(rows: Dataset) -> None:
    trained, heldout = rows.split(0.3)
    before: set[int] = set()
    for share in (0.1, 0.5, 0.9, 1.0):
        some, same = rows.split(0.3, share)
        assert (same.tolist(), before <= set(some), set(some) <= set(trained)) == (heldout.tolist(), True, True)
        before = set(some.tolist())
    assert (len(before), 0 < len(rows.split(0.3, 0.5)[0]) < len(trained)) == (len(trained), True)


@given(lengths, st.integers(1, 400))
def test_steps_are_of_nearly_equal_tokens(num_tokens: np.ndarray, batch_tokens: int) -> None:
    steps = cut_steps(np.arange(len(num_tokens)), num_tokens, batch_tokens)
    mean, longest = num_tokens.sum() / len(steps), num_tokens.max()
    assert mean <= batch_tokens or len(steps) == len(num_tokens)
    if longest <= mean:  # no step had to be filled or emptied
        for step in steps:
            assert abs(num_tokens[step].sum() - mean) <= longest


def test_the_example_of_the_docstring() -> None:
    steps = cut_steps(np.arange(4), np.array([4, 4, 4, 4]), 7)
    assert [len(step) for step in steps] == [1, 2, 1]


@given(lengths, st.integers(1, 9))
def test_dealing_covers_every_sample_once_and_balances(num_tokens: np.ndarray, num_bins: int) -> None:
    samples = np.arange(len(num_tokens)) * 7
    bins = deal(samples, num_tokens, num_bins)
    assert len(bins) == num_bins
    assert sorted(np.concatenate(bins)) == sorted(samples)
    loads = [num_tokens[members // 7].sum() for members in bins]
    assert max(loads) - min(loads) <= num_tokens.max()


def test_the_longest_are_dealt_first() -> None:
    bins = deal(np.arange(5), np.array([1, 1, 1, 1, 4]), 2)
    assert [members.tolist() for members in bins] == [[4], [0, 1, 2, 3]]


def test_rows_run_through_all_caches(cache: Cache, tmp_path: Path) -> None:
    other = make_cache(tmp_path, num_samples=9, seed=5)
    both = of_caches([cache, other])
    for index in (0, 42, 43, 51):
        which, within = (cache, index) if index < 43 else (other, index - 43)
        source, view = both.teachers[0].rows, which[within]
        source.want(np.array([index]))
        assert source.rows(index).tobytes() == view.rows.tobytes()
        assert [part.tobytes() for part in both.tokens(index)[:2]] == [
            view.token_ids.tobytes(),
            view.supervised.tobytes(),
        ]
    assert both.num_tokens.tolist() == [*cache.num_tokens(), *other.num_tokens()]
    assert both.num_supervised.tolist() == [*cache.num_supervised(), *other.num_supervised()]
    training, heldout = both.split(0.4)
    assert sorted([*training, *heldout]) == list(range(52))
    assert heldout.tolist() == [*np.flatnonzero(cache.heldout(0.4)), *(43 + np.flatnonzero(other.heldout(0.4)))]


def test_caches_of_another_teacher_or_dtype_are_refused(cache: Cache, tmp_path: Path) -> None:
    with pytest.raises(CacheError, match=r"its teacher is other, that of .* is teacher"):
        of_caches([cache, make_cache(tmp_path / "teacher", teacher="other")])
    with pytest.raises(CacheError, match=r"its dtype is float32, that of .* is bfloat16"):
        of_caches([cache, make_cache(tmp_path / "dtype", dtype="float32")])


@pytest.mark.parametrize("kind", ["itself", "link", "copy", "grown", "of one parent"])
def test_the_same_samples_twice_are_refused(kind: str, tmp_path: Path) -> None:
    first, second = make_cache(tmp_path / "first"), tmp_path / "second"
    if kind == "itself":
        second = first.path
    elif kind == "link":
        second.symlink_to(first.path)
    else:
        shutil.copytree(first.path, second)
    for number, folder in enumerate([second] * (kind == "grown") + [first.path, second] * (kind == "of one parent")):
        grow_plan(folder, make_samples(3, seed=50 + number))
        fill_shard(folder, len(Cache.open(folder).plan.shards) - 1)
    with pytest.raises(CacheError, match=r"second|first") as caught:
        of_caches([Cache.open(first.path), Cache.open(second)])
    assert "name each cache once" in str(caught.value)


def test_one_fraction_is_held_out_of_all_caches(tmp_path: Path) -> None:
    """The same texts in two caches: what the first holds out is not trained on through the second."""
    half, little = (
        make_cache(tmp_path / str(share), heldout_fraction=share, samples=make_samples(40)) for share in (0.5, 0.05)
    )
    for caches in ([half, little], [little, half]):
        rows = of_caches(caches)
        assert rows.heldout_fraction == 0.5
        training, heldout = (set(some % 40) for some in rows.split(None))
        assert training & heldout == set()
        assert heldout == set(np.flatnonzero(half.heldout(0.5)))


def test_an_unfinished_cache_is_refused(tmp_path: Path) -> None:
    make_plan(tmp_path, make_samples(5))
    with pytest.raises(IncompleteError):
        of_caches([Cache.open(tmp_path)])


def test_a_packed_batch_is_its_samples_end_to_end(cache: Cache, rows: Dataset) -> None:
    members = [5, 12, 0, 3, 40]
    batch = Packer(rows).pack(members)
    views = [cache[member] for member in members]
    assert batch.seq_lens.tolist() == [len(view.token_ids) for view in views]
    assert batch.input_ids.tolist() == [[int(token) for view in views for token in view.token_ids]]
    assert batch.position_ids.tolist() == [[t for view in views for t in range(len(view.token_ids))]]
    assert batch.attention_mask is None
    starts = np.cumsum([0, *(len(view.token_ids) for view in views)])
    expected = [(start + t) for view, start in zip(views, starts, strict=False) for t in row_positions(view.supervised)]
    assert batch.row_positions.tolist() == expected
    labels = [int(view.token_ids[t + 1]) for view in views for t in row_positions(view.supervised)]
    assert batch.labels.tolist() == labels
    written = b"".join(view.rows.tobytes() for view in views)
    assert batch.teacher_rows[0].view(torch.int16).numpy().tobytes() == written
    assert batch.teacher_rows[0].dtype == torch.bfloat16


def test_labels_are_the_next_tokens_of_the_input(rows: Dataset) -> None:
    batch = Packer(rows).pack(range(43))
    assert torch.equal(batch.labels, batch.input_ids.reshape(-1)[batch.row_positions + 1])
    assert torch.equal(
        batch.position_ids.reshape(-1)[batch.row_positions + 1], batch.position_ids.reshape(-1)[batch.row_positions] + 1
    )
    assert len(batch.row_positions) == len(batch.teacher_rows[0]) == rows.num_supervised.sum()


def test_padded_and_packed_say_the_same(rows: Dataset) -> None:
    members = [7, 1, 30, 13, 22]
    packed, padded = (Packer(rows, padded=flag).pack(members) for flag in (False, True))
    assert padded.attention_mask is not None
    assert padded.input_ids.shape == (5, int(packed.seq_lens.max()))
    for name in ("input_ids", "position_ids"):
        inside = getattr(padded, name)[padded.attention_mask]
        assert torch.equal(inside, getattr(packed, name)[0])
        assert not getattr(padded, name)[~padded.attention_mask].any()
    assert torch.equal(padded.attention_mask.sum(1).int(), packed.seq_lens)
    assert torch.equal(padded.input_ids.reshape(-1)[padded.row_positions], packed.input_ids[0, packed.row_positions])
    assert torch.equal(padded.labels, packed.labels)
    assert torch.equal(padded.teacher_rows[0], packed.teacher_rows[0])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_teacher_rows_keep_the_dtype_and_the_bits(tmp_path: Path, dtype: str) -> None:
    cache = make_cache(tmp_path, dtype=dtype)  # type: ignore[arg-type]
    rows = Packer(of_caches([cache])).pack([3, 2]).teacher_rows[0]
    assert rows.dtype == getattr(torch, dtype)
    assert rows.view(torch.uint8).numpy().tobytes() == cache[3].rows.tobytes() + cache[2].rows.tobytes()


def test_the_row_buffer_is_used_again(rows: Dataset) -> None:
    packer, members = Packer(rows), [range(20), [4], range(43), [7, 4], range(43)]
    found = [packer.pack(some).teacher_rows[0] for some in members]
    assert found[0].data_ptr() == found[1].data_ptr() != found[2].data_ptr()
    assert found[2].data_ptr() == found[3].data_ptr() == found[4].data_ptr()
    for some in members:
        expected = torch.cat([Packer(rows).pack([member]).teacher_rows[0] for member in some])
        assert torch.equal(packer.pack(some).teacher_rows[0], expected)


def test_a_batch_without_samples_is_one_token_and_no_row(rows: Dataset) -> None:
    for padded in (False, True):
        batch = Packer(rows, padded=padded).empty()
        assert batch.input_ids.shape == batch.position_ids.shape == (1, 1)
        assert (len(batch.row_positions), len(batch.labels), tuple(batch.teacher_rows[0].shape)) == (0, 0, (0, 19))
        assert (batch.attention_mask is not None) == padded


def test_a_batch_of_samples_without_rows_packs(cache: Cache, rows: Dataset) -> None:
    bare = [index for index, view in enumerate(cache) if not len(view.rows)]
    assert len(bare) > 1
    batch = Packer(rows).pack(bare)
    assert (len(batch.row_positions), len(batch.teacher_rows[0]), len(batch.seq_lens)) == (0, 0, len(bare))


def test_moving_a_batch_moves_every_tensor(rows: Dataset) -> None:
    batch = Packer(rows, padded=True).pack([1, 2]).to(torch.device("meta"))
    values = [getattr(batch, name) for name in PackedBatch.__dataclass_fields__]
    assert {value.device.type for value in values if isinstance(value, torch.Tensor)} == {"meta"}
    assert [rows.device.type for rows in batch.teacher_rows] == ["meta"]
    assert [value for value in values if not isinstance(value, torch.Tensor | tuple)] == []


def test_bounds_say_on_the_cpu_where_packed_samples_lie(rows: Dataset) -> None:
    batch = Packer(rows).pack([5, 12, 0]).to(torch.device("meta"))
    assert batch.bounds == (0, *np.cumsum(rows.num_tokens[[5, 12, 0]]))
    assert Packer(rows).empty().bounds == (0, 1)


def test_without_teachers_a_batch_is_the_same_and_no_row_is_read(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Packer(of_caches([cache])).pack(range(43))
    monkeypatch.setattr(Shard, "rows", lambda *_: pytest.fail("a row was read"))
    bare = Packer(of_caches([Cache.open(cache.path)]).without_teachers()).pack(range(43))
    for name in ("input_ids", "position_ids", "seq_lens", "row_positions", "labels", "keys"):
        assert torch.equal(getattr(bare, name), getattr(whole, name)), name
    assert bare.teacher_rows == ()


def test_keys_are_a_samples_number_and_its_rows(cache: Cache, rows: Dataset) -> None:
    members = [31, 4, 17]
    expected = [member * 2**32 + row for member in members for row in range(len(cache[member].rows))]
    assert Packer(rows).pack(members).keys.tolist() == expected


def test_the_next_steps_rows_are_wanted_before_this_ones_are_packed(
    rows: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[str, int]] = []
    want, read = CacheRows.want, CacheRows.rows
    monkeypatch.setattr(
        CacheRows, "want", lambda self, samples: (seen.extend(("want", each) for each in samples), want(self, samples))
    )
    monkeypatch.setattr(CacheRows, "rows", lambda self, sample: (seen.append(("read", sample)), read(self, sample))[1])
    feeds = [
        PlannedBatches(rows, np.arange(43), seed=0, batch_tokens=200, epochs=2, rank=rank, world_size=2)
        for rank in range(2)
    ]
    steps = range(feeds[0].steps_per_epoch - 1, feeds[0].steps_per_epoch + 1)  # into the second epoch
    for step in steps:
        asked = [step, step + 1] if step == steps[0] else [step + 1]
        before = len(seen)
        for feed in feeds:
            at = len(seen)
            list(feed.step(step))
            kinds = [kind for kind, _ in seen[at:]]
            assert kinds == sorted(kinds, reverse=True), "what is read ahead is asked for first"
        wanted, taken = ([sample for kind, sample in seen[before:] if kind == each] for each in ("want", "read"))
        assert sorted(wanted) == sorted(sample for each in asked for sample in feeds[0].samples(each))
        assert sorted(taken) == sorted(feeds[0].samples(step))


def test_tokens_before_a_step_are_those_of_the_steps_before_it(rows: Dataset) -> None:
    feed = PlannedBatches(rows, np.arange(3, 43), seed=5, batch_tokens=200)
    taken = 0
    for step in range(2 * feed.steps_per_epoch + 2):
        assert feed.num_tokens(0, step) == taken
        taken += int(rows.num_tokens[feed.samples(step)].sum())


def ids_of(batch: PackedBatch) -> tuple[tuple[int, ...], ...]:
    """The token ids of each sample of a packed batch: what it is known by here. () where the batch is empty."""
    if not len(batch.row_positions) and batch.input_ids.numel() == 1 and batch.input_ids.item() == 0:
        return ()
    parts = batch.input_ids[0].split(batch.seq_lens.tolist())
    return tuple(tuple(part.tolist()) for part in parts)


@pytest.mark.parametrize("grad_accum", [1, 2])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_a_step_takes_the_same_samples_on_any_number_of_ranks(
    cache: Cache, rows: Dataset, world_size: int, grad_accum: int
) -> None:
    members = rows.split(None)[0]
    feeds = [
        PlannedBatches(rows, members, seed=3, batch_tokens=250, world_size=world_size, rank=rank, grad_accum=grad_accum)
        for rank in range(world_size)
    ]
    alone = PlannedBatches(rows, members, seed=3, batch_tokens=250)
    assert alone.steps_per_epoch > 3
    for step in range(alone.steps_per_epoch + 2):
        batches = [[ids_of(batch) for batch in feed.step(step)] for feed in feeds]
        assert all(len(mine) == grad_accum for mine in batches)
        assert all(feed.num_supervised(step) == alone.num_supervised(step) for feed in feeds)
        expected = [tuple(cache[int(member)].token_ids.tolist()) for member in alone.samples(step)]
        assert sorted(ids for mine in batches for batch in mine for ids in batch) == sorted(expected)


def test_an_epoch_takes_every_sample_once_and_the_next_in_another_order(rows: Dataset) -> None:
    feed = PlannedBatches(rows, np.arange(43), seed=0, batch_tokens=200)
    epochs = [
        np.concatenate([feed.samples(epoch * feed.steps_per_epoch + step) for step in range(feed.steps_per_epoch)])
        for epoch in range(2)
    ]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(43))
    assert epochs[0].tolist() != epochs[1].tolist()


def test_a_step_does_not_depend_on_the_steps_before(rows: Dataset) -> None:
    resumed, whole = (PlannedBatches(rows, np.arange(43), seed=9, batch_tokens=200) for _ in range(2))
    steps = [whole.samples(step).tolist() for step in range(2 * whole.steps_per_epoch)]
    for step in reversed(range(len(steps))):
        assert resumed.samples(step).tolist() == steps[step]


def test_the_tokens_of_a_run_are_known_before_it_to_the_last_one(rows: Dataset) -> None:
    feed = PlannedBatches(rows, np.arange(43), seed=9, batch_tokens=200)
    steps = 2 * feed.steps_per_epoch + 2
    taken = [int(rows.num_tokens[feed.samples(step)].sum()) for step in range(steps)]
    for first in (0, 3):
        assert [feed.num_tokens(first, step) for step in range(first, steps + 1)] == [
            sum(taken[first:step]) for step in range(first, steps + 1)
        ]


def test_ranks_without_samples_in_a_step_get_an_empty_batch(rows: Dataset) -> None:
    feeds = [PlannedBatches(rows, np.arange(4), seed=0, batch_tokens=1, world_size=4, rank=rank) for rank in range(4)]
    batches = [batch for feed in feeds for batch in feed.step(0)]
    assert len(batches) == 4
    assert sum(len(batch.teacher_rows[0]) for batch in batches) == feeds[0].num_supervised(0)
    assert [batch.input_ids.numel() for batch in batches[1:]] == [1, 1, 1]


def test_more_ranks_than_samples_is_a_usage_error(rows: Dataset) -> None:
    with pytest.raises(ConfigError, match="4 ranks for 3 training samples; use at most --nproc 3"):
        PlannedBatches(rows, np.arange(3), seed=0, batch_tokens=100, world_size=4)
    with pytest.raises(ConfigError, match="1 ranks for 0 training samples; use at most --nproc 1"):
        PlannedBatches(rows, np.arange(0), seed=0, batch_tokens=100)
