"""Codecs: one that is not known is refused by name; rows stored in another way survive all that raw ones do."""

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from tests.caches import fill_shard, make_plan, make_samples, random_rows, verified

from kdpipe.manifests.cache import Cache
from kdpipe.manifests.codec import CODECS, TensorSpec, as_stored, num_bytes
from kdpipe.manifests.durable import sweep
from kdpipe.manifests.errors import ConfigError, CorruptError
from kdpipe.manifests.plan import PLAN_FILE, read_plan
from kdpipe.manifests.samples import Samples
from kdpipe.manifests.shard import ShardWriter, adopt, commit_path, shard_path
from kdpipe.manifests.specs import Dtype, Io


class Halves:
    """Stores a row's first half and second half apart, the second one negated; nothing is lost."""

    def tensors(self, num_rows: int, width: int, dtype: Dtype) -> list[TensorSpec]:
        half = width // 2
        return [
            ("flag", "U8", (num_rows,)),
            ("first", "F32", (num_rows, half)),
            ("rest", "F32", (num_rows, width - half)),
        ]

    def encode(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        first, rest = np.split(rows.astype(np.float32), [rows.shape[1] // 2], axis=1)
        return {"flag": np.full(len(rows), 7, np.uint8), "first": first, "rest": -rest}

    def decode(self, parts: Mapping[str, np.ndarray], out: np.ndarray) -> None:
        assert (parts["flag"] == 7).all()
        out[...] = np.concatenate([parts["first"], -parts["rest"]], axis=1)


@pytest.fixture
def halves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A planned cache of the codec above, no shard filled."""
    monkeypatch.setitem(CODECS, "halves", Halves())
    plan = make_plan(tmp_path / "c", make_samples(21))
    plan = plan.changed(settings=plan.settings.model_copy(update={"codec": "halves"}))
    (tmp_path / "c" / PLAN_FILE).write_bytes(plan.to_bytes())
    return tmp_path / "c"


def writer(cache: Path, number: int) -> ShardWriter:
    plan = read_plan(cache)
    return ShardWriter(cache, plan, number, Samples(cache, plan).shard(number))


@pytest.mark.parametrize("io", ["mmap", "pread"])
def test_rows_come_back_through_a_codec(io: Io, halves: Path) -> None:
    plan = read_plan(halves)
    for number in range(len(plan.shards)):
        fill_shard(halves, number)
    assert verified(halves, "deep", io=io) == [*range(len(plan.shards))]
    cache = Cache.open(halves, io=io)
    written = np.concatenate([random_rows(plan, number) for number in range(len(plan.shards))])
    read = np.concatenate([view.rows for view in cache])
    assert read.dtype == written.dtype
    assert read.tobytes() == written.tobytes()
    for index in (3, 0, 20):
        cache.prefetch(index)
    assert list((halves / "tmp").iterdir()) == []


def test_rows_lie_in_a_file_of_their_own_until_they_are_stored(halves: Path) -> None:
    """An engine in another process writes by path and offset."""
    values = random_rows(read_plan(halves), 0)
    with writer(halves, 0) as shard:
        for row in range(len(values))[::-1]:
            _, offset = shard.rows(row, 1)
            with open(shard.path, "r+b") as file:
                file.seek(offset)
                file.write(values[row].tobytes())
        assert np.array_equal(shard.hidden.view(np.uint16), values.view(np.uint16))
        assert len(list((halves / "tmp").iterdir())) == 2
        sweep((halves / "tmp").iterdir())
        assert len(list((halves / "tmp").iterdir())) == 2, "swept while their process is at work"
        shard.commit()
    assert list((halves / "tmp").iterdir()) == []
    assert np.array_equal(Cache.open(halves).shard(0).rows(0, len(values)).view(np.uint16), values.view(np.uint16))


def test_a_writer_that_gives_up_leaves_nothing(halves: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    with writer(halves, 0):
        pass
    assert list((halves / "tmp").iterdir()) == list((halves / "shards").iterdir()) == []
    assert len(os.listdir("/proc/self/fd")) == before


def test_every_damaged_byte_of_a_stored_part_is_found_on_first_touch(halves: Path) -> None:
    fill_shard(halves, 0)
    layout = Cache.open(halves).shard(0).layout
    for name in ("flag", "first", "rest"):
        path, at = shard_path(halves, 0), layout.tensors[name].begin + 3
        good = path.read_bytes()
        path.write_bytes(good[:at] + bytes([good[at] ^ 2]) + good[at + 1 :])
        with pytest.raises(CorruptError, match="do not match their checksum"):
            Cache.open(halves)[0]
        path.write_bytes(good)


def test_a_second_copy_of_the_same_rows_is_fine_and_a_lost_record_is_adopted(halves: Path) -> None:
    assert fill_shard(halves, 0) == fill_shard(halves, 0)
    commit_path(halves, 0).unlink()
    assert adopt(halves, read_plan(halves), 0)
    assert verified_rows(halves) == random_rows(read_plan(halves), 0).tobytes()


def verified_rows(cache: Path) -> bytes:
    shard = Cache.open(cache).shard(0)
    return shard.rows(0, shard.num_rows).tobytes()


def test_rows_are_encoded_in_pieces_with_the_same_result(halves: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = fill_shard(halves, 0)
    for path in (commit_path, shard_path):
        path(halves, 0).unlink()
    monkeypatch.setattr("kdpipe.manifests.shard.ENCODED_ROWS", 3)
    assert fill_shard(halves, 0) == whole


def test_a_codec_that_is_not_known_is_refused_by_name(halves: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(CODECS, "halves")
    with pytest.raises(
        ConfigError, match=r"no codec 'halves' here \(known: fisher, int8, raw\); one of your own is added"
    ) as caught:
        Cache.open(halves)
    assert caught.value.where == str(halves)


def test_the_size_of_rows_is_that_of_their_tensors() -> None:
    assert num_bytes(CODECS["raw"], 7, 5, "bfloat16") == 70
    assert num_bytes(CODECS["raw"], 7, 5, "float32") == 140
    assert num_bytes(Halves(), 7, 5, "bfloat16") == 7 + 140


def test_rows_as_stored_are_what_a_reader_sees() -> None:
    rows = np.arange(10, dtype=np.float32).reshape(2, 5)
    assert as_stored(CODECS["raw"], rows) is rows
    assert np.array_equal(as_stored(Halves(), rows), rows)
