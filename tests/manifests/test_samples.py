"""samples.arrow: what is written of a sample, in which batches and shards, and what is refused."""

import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.caches import make_plan, make_samples

from kdpipe.manifests.errors import KdpipeError, LayoutError
from kdpipe.manifests.plan import SAMPLES_FILE
from kdpipe.manifests.sample import Sample, row_positions
from kdpipe.manifests.samples import Samples, SamplesWriter, cut_batches


@given(st.lists(st.integers(1, 50), min_size=1, max_size=60), st.integers(1, 120))
def test_batches_stay_within_the_budget_unless_one_sample_alone_exceeds_it(lengths: list[int], budget: int) -> None:
    batches = cut_batches(lengths, budget)
    for batch in range(int(batches.max()) + 1):
        members = np.asarray(lengths)[batches == batch]
        assert len(members) >= 1
        assert len(members) == 1 or len(members) * members.max() <= budget


@given(st.lists(st.integers(1, 50), min_size=1, max_size=60), st.integers(1, 120))
def test_no_two_neighbouring_batches_would_have_fitted_in_one(lengths: list[int], budget: int) -> None:
    batches, sizes = cut_batches(lengths, budget), np.asarray(lengths)
    for batch in range(int(batches.max())):
        count, next_shortest = (batches == batch).sum(), sizes[batches == batch + 1].min()
        assert next_shortest >= sizes[batches == batch].max()
        assert (count + 1) * next_shortest > budget


def test_no_budget_puts_every_sample_alone_in_order() -> None:
    assert cut_batches([5, 3, 9], 0).tolist() == [0, 1, 2]


def test_samples_of_one_length_are_batched_in_order() -> None:
    assert cut_batches([5] * 40, 10).tolist() == [index // 2 for index in range(40)]
    assert cut_batches([7, 5] * 20, 14).tolist() == [
        10 + index // 4 if index % 2 == 0 else index // 4 for index in range(40)
    ]


@pytest.mark.parametrize("rows", ["supervised", "all"])
def test_samples_arrow_holds_the_samples_and_where_their_rows_go(tmp_path: Path, rows: str) -> None:
    samples = make_samples(40)
    plan = make_plan(tmp_path / "c", samples, rows=rows, batch_tokens=100, shard_tokens=150)  # type: ignore[arg-type]
    table = Samples(tmp_path / "c", plan)
    assert len(plan.shards) > 3
    index = 0
    for number, shard in enumerate(plan.shards):
        batch, row = table.shard(number), 0
        assert (shard.first_sample, shard.num_samples) == (index, batch.num_rows)
        assert shard.num_tokens <= 150 or shard.num_samples == 1
        for record in batch.to_pylist():
            sample = samples[index]
            count = len(row_positions(sample.supervised, every=rows == "all"))
            assert record["token_ids"] == sample.token_ids.tolist()
            assert record["supervised"] == sample.supervised.tolist()
            assert (record["content_id"], record["source"], record["line"]) == (
                sample.content_id, "data.jsonl", index + 1,
            )  # fmt: skip
            assert (record["shard"], record["first_row"], record["num_rows"]) == (number, row, count)
            assert record["num_supervised"] == len(row_positions(sample.supervised))
            assert record["num_tokens"] == len(sample.token_ids)
            row, index = row + count, index + 1
        assert shard.num_rows == row
        assert batch.column("batch").to_pylist() == cut_batches(batch.column("num_tokens").to_pylist(), 100).tolist()
    assert index == plan.num_samples == 40


def test_a_column_spans_all_shards(tmp_path: Path) -> None:
    samples = make_samples(40)
    table = Samples(tmp_path / "c", make_plan(tmp_path / "c", samples, shard_tokens=150))
    assert table.column("num_tokens").tolist() == [len(sample.token_ids) for sample in samples]
    assert [row.tobytes() for row in table.column("content_id")] == [sample.content_id for sample in samples]


def test_samples_that_fill_a_shard_exactly_stay_together(tmp_path: Path) -> None:
    samples = make_samples(6)
    size = sum(len(sample.token_ids) for sample in samples[:3])
    plan = make_plan(tmp_path / "exact", samples[:3], shard_tokens=size)
    assert [shard.num_samples for shard in plan.shards] == [3]
    plan = make_plan(tmp_path / "less", samples[:3], shard_tokens=size - 1)
    assert [shard.num_samples for shard in plan.shards] == [2, 1]


def test_a_sample_longer_than_a_shard_has_one_of_its_own(tmp_path: Path) -> None:
    plan = make_plan(tmp_path / "c", make_samples(20), shard_tokens=1)
    assert [shard.num_samples for shard in plan.shards] == [1] * 20


def digest_of(folder: Path, *samples: tuple[list[int], list[bool]]) -> str:
    folder.mkdir()
    writer = SamplesWriter(folder / SAMPLES_FILE, shard_tokens=200, batch_tokens=0, every_row=False)
    for ids, mask in samples:
        sample = Sample(
            content_id=bytes(16), source="a", line=1, token_ids=np.array(ids, np.int32), supervised=np.array(mask)
        )
        writer.add(sample)
    writer.close()
    return writer.data_digest()


def test_the_data_digest_tells_ids_masks_lengths_and_order_apart(tmp_path: Path) -> None:
    a, b = ([1, 2], [False, True]), ([3], [True])
    variants = [(a, b), (b, a), (a,), (([1, 2], [True, True]), b), (([1, 3], [False, True]), b), (([1], [False]), b)]
    variants.append((a, ([3], [True]), ([3], [True])))
    assert len({digest_of(tmp_path / str(i), *samples) for i, samples in enumerate(variants)}) == len(variants)


def test_one_sample_made_to_look_like_two_has_a_digest_of_its_own(tmp_path: Path) -> None:
    two = ([7, 8], [True, False]), ([1, 2, 3], [True, False, False])
    # The bytes of both, one after the other, cut anew as 9 ids and their mask.
    stream = b"".join(np.array(ids, "<i4").tobytes() + np.packbits(mask).tobytes() + bytes(16) for ids, mask in two)
    ids = np.frombuffer(stream[:36], "<i4").tolist()
    mask = np.unpackbits(np.frombuffer(stream[36:38], np.uint8))[:9].astype(bool).tolist()
    assert digest_of(tmp_path / "one", (ids, mask)) != digest_of(tmp_path / "two", *two)


def test_samples_arrow_of_another_plan_or_no_arrow_at_all_is_refused(tmp_path: Path) -> None:
    plan = make_plan(tmp_path / "c", make_samples(40))
    make_plan(tmp_path / "other", make_samples(3))
    path = tmp_path / "c" / SAMPLES_FILE
    shutil.copy(tmp_path / "other" / SAMPLES_FILE, path)
    with pytest.raises(LayoutError, match=r"1 record batches, PLAN\.json says"):
        Samples(tmp_path / "c", plan)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, pa.schema([("a", pa.int64())])):
        pass
    with pytest.raises(LayoutError, match="its columns are not content_id, source"):
        Samples(tmp_path / "c", plan)
    for content in (b"", b"ARROW1", bytes(1000)):
        path.write_bytes(content)
        with pytest.raises(KdpipeError, match="not readable as Arrow"):
            Samples(tmp_path / "c", plan)
    path.unlink()
    with pytest.raises(LayoutError, match="not readable as Arrow"):
        Samples(tmp_path / "c", plan)
