"""A shard is written once, sealed last, and any byte of it that changes is found."""

import gc
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import crc32c
import ml_dtypes
import numpy as np
import pyarrow as pa
import pytest
import safetensors.torch
import torch
import xxhash
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.caches import fill_shard, make_plan, make_samples, random_rows, verified

from kdpipe.manifests.durable import canonical
from kdpipe.manifests.errors import CorruptError, DriftError, IncompleteError, KdpipeError, LayoutError, SpaceError
from kdpipe.manifests.plan import read_plan
from kdpipe.manifests.samples import Samples
from kdpipe.manifests.shard import BLOCK, Shard, ShardWriter, commit_path, shard_layout, shard_path

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture
def golden(tmp_path: Path) -> Path:
    """A copy of the golden cache: 3 samples of 4, 1 and 6 tokens, 5 columns of bfloat16; row j holds j, j+1/8, ..."""
    copy = shutil.copytree(GOLDEN, tmp_path / "golden")
    (copy / "tmp").mkdir()
    return copy


def golden_rows(count: int) -> np.ndarray:
    return (np.arange(count)[:, None] + np.arange(5) / 8).astype(ml_dtypes.bfloat16)


def open_shard(folder: Path, index: int = 0) -> Shard:
    plan = read_plan(folder)
    return Shard(folder, plan, index)


def writer(folder: Path, index: int = 0) -> ShardWriter:
    plan = read_plan(folder)
    return ShardWriter(folder, plan, index, Samples(folder, plan).shard(index))


def patch(path: Path, at: int, change: Callable[[int], int]) -> None:
    with open(path, "r+b") as file:
        file.seek(at)
        value = file.read(1)[0]
        file.seek(at)
        file.write(bytes([change(value)]))


def count_descriptors() -> int:
    gc.collect()  # a mapping keeps a descriptor of its own for as long as it lives
    return len(os.listdir("/proc/self/fd"))


def test_the_golden_shard_reads_as_it_was_written() -> None:
    shard = open_shard(GOLDEN)
    assert shard.row_offsets.tolist() == [0, 2, 2, 7]
    assert shard.token_ids.tolist() == [10, 11, 12, 13, 20, 30, 31, 32, 33, 34, 35]
    for index, (first, after) in enumerate(((0, 2), (2, 2), (2, 7))):
        np.testing.assert_array_equal(shard.sample(index).rows, golden_rows(7)[first:after])
    assert verified(GOLDEN) == [0]


def test_the_same_rows_are_written_as_the_golden_bytes(golden: Path) -> None:
    for path in (shard_path(golden, 0), commit_path(golden, 0)):
        path.unlink()
    fill_shard(golden, 0, rows=lambda plan, index: golden_rows(7))
    for path in (shard_path, commit_path):
        assert path(golden, 0).read_bytes() == path(GOLDEN, 0).read_bytes()


def test_the_golden_bytes_are_what_the_format_says() -> None:
    """By hand, from FORMAT.md alone."""
    data = shard_path(GOLDEN, 0).read_bytes()
    (length,) = struct.unpack_from("<Q", data)
    assert length == 4096 - 8
    assert data[8:4096].rstrip(b" ").endswith(b"}")
    assert np.frombuffer(data, ml_dtypes.bfloat16, 35, 4096).tolist() == golden_rows(7).reshape(-1).tolist()
    tables = 4096 + 70
    assert struct.unpack_from("<4q4q11i", data, tables)[:8] == (0, 2, 2, 7, 0, 4, 5, 11)
    end = tables + 64 + 44 + 11 + 48
    assert struct.unpack_from("<I", data, end) == (crc32c.crc32c(data[4096:end]),)
    assert len(data) == end + 4
    assert xxhash.xxh3_128_hexdigest(data[4096:]).encode() in data[:4096]


def test_the_safetensors_library_reads_the_golden_shard_equal() -> None:
    shard, theirs = open_shard(GOLDEN), safetensors.torch.load_file(shard_path(GOLDEN, 0))
    assert torch.equal(
        theirs["hidden"].view(torch.int16), torch.from_numpy(shard.rows(0, shard.num_rows).view(np.int16).copy())
    )
    for name in ("row_offsets", "token_offsets", "token_ids", "sample_ids"):
        assert theirs[name].tolist() == getattr(shard, name).tolist()
    assert theirs["supervised"].bool().tolist() == shard.supervised.tolist()


def truncated(folder: Path) -> None:
    os.truncate(shard_path(folder, 0), 4100)


def grown(folder: Path) -> None:
    with open(shard_path(folder, 0), "ab") as file:
        file.write(b"\0")


def emptied(folder: Path) -> None:
    os.truncate(shard_path(folder, 0), 0)


def removed(folder: Path) -> None:
    shard_path(folder, 0).unlink()


def header_edited(folder: Path) -> None:
    path = shard_path(folder, 0)
    path.write_bytes(path.read_bytes().replace(b'"version":"1"', b'"version":"2"'))


def padding_edited(folder: Path) -> None:
    patch(shard_path(folder, 0), 4095, lambda byte: 9)


def row_bit_flipped(folder: Path) -> None:
    patch(shard_path(folder, 0), 4096 + 33, lambda byte: byte ^ 4)


def table_bit_flipped(folder: Path) -> None:
    patch(shard_path(folder, 0), 4096 + 70 + 8, lambda byte: byte ^ 1)


def checksum_bit_flipped(folder: Path) -> None:
    patch(shard_path(folder, 0), shard_path(folder, 0).stat().st_size - 1, lambda byte: byte ^ 128)


def commit_of_another_plan(folder: Path) -> None:
    path = commit_path(folder, 0)
    path.write_bytes(path.read_bytes().replace(read_plan(folder).digest.encode(), b"0" * 64))


def commit_of_another_shard(folder: Path) -> None:
    path = commit_path(folder, 0)
    path.write_bytes(path.read_bytes().replace(b'"shard": 0', b'"shard": 7'))


def commit_of_another_size(folder: Path) -> None:
    path = commit_path(folder, 0)
    path.write_bytes(path.read_bytes().replace(b'"num_bytes": 4', b'"num_bytes": 5'))


def commit_of_other_bytes(folder: Path) -> None:
    path = commit_path(folder, 0)
    path.write_bytes(path.read_bytes().replace(open_shard(folder).digest.encode(), b"0" * 32))


def commit_cut(folder: Path) -> None:
    os.truncate(commit_path(folder, 0), 20)


def commit_removed(folder: Path) -> None:
    commit_path(folder, 0).unlink()


@pytest.mark.parametrize(
    ("damage", "error", "says"),
    [
        (truncated, LayoutError, "4100 bytes, the plan says 43"),
        (grown, LayoutError, "bytes, the plan says 43"),
        (emptied, LayoutError, "0 bytes, the plan says 43"),
        (removed, CorruptError, "the file is gone"),
        (header_edited, CorruptError, "header differs"),
        (padding_edited, CorruptError, "at byte 4095"),
        (row_bit_flipped, CorruptError, "do not match their checksum"),
        (table_bit_flipped, CorruptError, "do not match their checksum"),
        (checksum_bit_flipped, CorruptError, "do not match their checksum"),
        (commit_of_another_plan, LayoutError, "it is for shard 0 of plan 0000000000000000"),
        (commit_of_another_shard, LayoutError, "it is for shard 7"),
        (commit_of_another_size, LayoutError, "the plan says 43"),
        (commit_of_other_bytes, CorruptError, "header differs"),
        (commit_cut, LayoutError, "not a commit record"),
        (commit_removed, IncompleteError, "not extracted yet"),
    ],
)
def test_a_broken_golden_shard_is_refused_by_name(
    golden: Path, damage: Callable[[Path], None], error: type[KdpipeError], says: str
) -> None:
    damage(golden)
    with pytest.raises(error) as caught:
        open_shard(golden).sample(0)
    assert says in str(caught.value)
    assert str(golden) in str(caught.value)
    with pytest.raises(error):
        verified(golden)


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 1000), count=st.integers(1, 12), width=st.integers(1, 40),
    dtype=st.sampled_from(["bfloat16", "float16", "float32"]), rows=st.sampled_from(["supervised", "all"]),
)  # fmt: skip
def test_rows_come_back_as_they_were_written(
    tmp_path_factory: pytest.TempPathFactory, seed: int, count: int, width: int, dtype: str, rows: str
) -> None:
    folder, samples = tmp_path_factory.mktemp("round") / "c", make_samples(count, seed=seed)
    plan = make_plan(folder, samples, hidden_size=width, dtype=dtype, rows=rows)  # type: ignore[arg-type]
    index = 0
    for number, bounds in enumerate(plan.shards):
        fill_shard(folder, number, seed=seed)
        shard, written = open_shard(folder, number), random_rows(plan, number, seed=seed)
        for within in range(bounds.num_samples):
            view, (first, after) = shard.sample(within), shard.row_offsets[within : within + 2]
            assert view.rows.tobytes() == written[first:after].tobytes()
            assert view.token_ids.tolist() == samples[index].token_ids.tolist()
            assert view.supervised.tolist() == samples[index].supervised.tolist()
            index += 1


def test_rows_land_in_any_order_and_give_the_same_bytes(tmp_path: Path) -> None:
    contents = []
    for name, step in (("forward", 1), ("backward", -1)):
        plan = make_plan(tmp_path / name, make_samples(21))
        values = random_rows(plan, 0)
        with writer(tmp_path / name) as shard:
            for row in range(len(values))[::step]:
                view, offset = shard.rows(row, 1)
                if row % 2:
                    view[:] = values[row]
                else:  # an engine in another process writes to the file
                    with open(shard.path, "r+b") as file:
                        file.seek(offset)
                        file.write(values[row].tobytes())
            shard.commit()
        contents.append(shard_path(tmp_path / name, 0).read_bytes() + commit_path(tmp_path / name, 0).read_bytes())
    assert contents[0] == contents[1]


def test_every_size_is_known_before_the_teacher_runs(tmp_path: Path) -> None:
    plan = make_plan(tmp_path, make_samples(21))
    before = shard_layout(plan, 1, "0" * 32).num_bytes
    assert fill_shard(tmp_path, 1).num_bytes == before == shard_path(tmp_path, 1).stat().st_size


def test_a_second_writer_with_equal_bytes_is_fine(tmp_path: Path) -> None:
    make_plan(tmp_path, make_samples(21))
    assert fill_shard(tmp_path, 0) == fill_shard(tmp_path, 0)
    assert list((tmp_path / "tmp").iterdir()) == []


def test_a_run_killed_between_shard_and_commit_record_is_finished_by_the_next(tmp_path: Path) -> None:
    make_plan(tmp_path, make_samples(21))
    first = fill_shard(tmp_path, 0)
    commit_path(tmp_path, 0).unlink()
    with pytest.raises(IncompleteError):
        open_shard(tmp_path)
    assert fill_shard(tmp_path, 0) == first
    open_shard(tmp_path)


@pytest.mark.parametrize("killed", [False, True])
def test_a_second_writer_with_other_bytes_is_drift_and_the_first_stays(tmp_path: Path, killed: bool) -> None:
    make_plan(tmp_path, make_samples(21))
    fill_shard(tmp_path, 0)
    if killed:
        commit_path(tmp_path, 0).unlink()
    before = shard_path(tmp_path, 0).read_bytes()
    for _ in range(2):
        with pytest.raises(DriftError, match="the first one stays, the other is quarantine/000000"):
            fill_shard(tmp_path, 0, seed=1)
    assert shard_path(tmp_path, 0).read_bytes() == before
    assert list((tmp_path / "tmp").iterdir()) == []
    first, second = (tmp_path / "quarantine").iterdir()
    assert first.read_bytes() == second.read_bytes() != before


def test_a_commit_record_without_its_shard_is_drift_for_other_bytes(tmp_path: Path) -> None:
    make_plan(tmp_path, make_samples(21))
    fill_shard(tmp_path, 0)
    shard_path(tmp_path, 0).unlink()
    with pytest.raises(DriftError, match="committed with digest"):
        fill_shard(tmp_path, 0, seed=1)
    assert not shard_path(tmp_path, 0).exists()
    assert len(list((tmp_path / "quarantine").iterdir())) == 1


def test_leaving_without_commit_leaves_nothing(tmp_path: Path) -> None:
    make_plan(tmp_path, make_samples(21))
    before = sorted(tmp_path.rglob("*"))
    descriptors = count_descriptors()
    with writer(tmp_path) as shard:
        shard.hidden[:] = 1
    with pytest.raises(ValueError, match="broadcast"), writer(tmp_path) as shard:
        shard.hidden[:] = np.ones(3)
    assert sorted(tmp_path.rglob("*")) == before
    del shard
    assert count_descriptors() <= descriptors


def test_others_may_read_what_the_umask_lets_them(tmp_path: Path) -> None:
    make_plan(tmp_path, make_samples(21))
    before = os.umask(0o022)
    try:
        fill_shard(tmp_path, 0)
    finally:
        os.umask(before)
    assert shard_path(tmp_path, 0).stat().st_mode & 0o777 == 0o644


def test_a_full_disk_is_said_before_the_first_row_and_leaves_nothing(tmpfs: Callable[[str], Path]) -> None:
    full_disk = tmpfs("512k")
    make_plan(full_disk / "c", make_samples(21), hidden_size=9000, vocab_size=1)
    descriptors = count_descriptors()
    with pytest.raises(SpaceError, match="no space left on device; free some room"):
        writer(full_disk / "c")
    assert list((full_disk / "c" / "tmp").iterdir()) == []
    assert list((full_disk / "c" / "shards").iterdir()) == []
    assert count_descriptors() <= descriptors


def test_a_file_size_limit_is_a_space_error_that_leaves_nothing(tmp_path: Path) -> None:
    make_plan(tmp_path, make_samples(21))
    code = f"""
import resource, pathlib
resource.setrlimit(resource.RLIMIT_FSIZE, (5000, {2**40}))
from kdpipe.manifests.errors import SpaceError
from kdpipe.manifests.plan import read_plan
from kdpipe.manifests.samples import Samples
from kdpipe.manifests.shard import ShardWriter
folder = pathlib.Path({str(tmp_path)!r})
plan = read_plan(folder)
try:
    ShardWriter(folder, plan, 0, Samples(folder, plan).shard(0))
except SpaceError as err:
    print(err)
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout.startswith(f"E-SPACE {shard_path(tmp_path, 0)}: file too large")
    assert list((tmp_path / "tmp").iterdir()) == []


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A shard of several checksum blocks: rows of 40 KB."""
    folder = tmp_path_factory.mktemp("wide") / "c"
    make_plan(folder, make_samples(21), hidden_size=20_011, shard_tokens=400)
    fill_shard(folder, 0)
    return folder


def test_first_touch_finds_a_flipped_bit_in_the_touched_block_only(wide: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(wide, tmp_path / "c")
    shard = open_shard(folder)
    begin, stride = shard.layout.body, shard.rows(0, 1).strides[0]
    bad = 2
    patch(shard_path(folder, 0), begin + bad * BLOCK + 12345, lambda byte: byte ^ 16)
    shard, refused = open_shard(folder), 0
    assert len(shard.layout.tensors["crc32c"].shape) == 1
    assert shard.layout.tensors["crc32c"].shape[0] >= 5
    for index in range(len(shard.row_offsets) - 1):
        first, after = (int(row) * stride for row in shard.row_offsets[index : index + 2])
        touches = first < after and first // BLOCK <= bad <= (after - 1) // BLOCK
        if touches:
            refused += 1
            for _ in range(2):  # a block found bad stays bad
                with pytest.raises(CorruptError, match=f"bytes {begin + bad * BLOCK}-{begin + (bad + 1) * BLOCK - 1} "):
                    shard.sample(index)
        else:
            shard.sample(index)
    assert 0 < refused < len(shard.row_offsets) - 1


def test_verify_finds_every_flipped_bit_anywhere(wide: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(wide, tmp_path / "c")
    path, rng = shard_path(folder, 0), np.random.default_rng(5)
    size, samples = path.stat().st_size, Samples(folder, read_plan(folder)).shard(0)
    open_shard(folder).verify(samples)
    # Anywhere, and more often where the bytes are few: header, tables, checksums.
    places = [*rng.integers(0, size, 40), *rng.integers(0, 4096, 20), *rng.integers(size - 3000, size, 20)]
    for at in (int(place) for place in places):
        bit = 1 << int(rng.integers(8))
        patch(path, at, lambda byte, bit=bit: byte ^ bit)  # type: ignore[misc]
        with pytest.raises(CorruptError):
            open_shard(folder).verify(samples)
        patch(path, at, lambda byte, bit=bit: byte ^ bit)  # type: ignore[misc]
    open_shard(folder).verify(samples)


def test_verify_finds_a_bit_that_flipped_after_its_block_was_read(golden: Path) -> None:
    shard, samples = open_shard(golden), Samples(golden, read_plan(golden)).shard(0)
    shard.verify(samples)
    row_bit_flipped(golden)
    with pytest.raises(CorruptError):
        shard.verify(samples)


def test_verify_finds_a_block_whose_checksum_was_made_to_match(golden: Path) -> None:
    row_bit_flipped(golden)
    path = shard_path(golden, 0)
    data = path.read_bytes()
    path.write_bytes(data[:-4] + struct.pack("<I", crc32c.crc32c(data[4096:-4])))
    shard = open_shard(golden)
    shard.sample(0)
    with pytest.raises(CorruptError, match="the commit record says"):
        shard.verify(Samples(golden, read_plan(golden)).shard(0))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("token_ids", lambda ids: [[*ids[0][:-1], ids[0][-1] ^ 1], *ids[1:]]),
        ("supervised", lambda masks: [[*masks[0][:-1], not masks[0][-1]], *masks[1:]]),
        ("num_rows", lambda counts: [counts[1], counts[0], *counts[2:]]),
        ("content_id", lambda ids: [*ids[:-1], bytes(16)]),
    ],
)
def test_verify_compares_every_table_with_samples_arrow(
    name: str, change: Callable[[list], list], golden: Path
) -> None:
    """A shard with good checksums that is not of these samples: only somebody who forges commit records makes one."""
    samples, shard = Samples(golden, read_plan(golden)).shard(0), open_shard(golden)
    shard.verify(samples)
    at = samples.schema.get_field_index(name)
    changed = pa.array(change(samples.column(at).to_pylist()), samples.schema.field(at).type)
    assert changed != samples.column(at)
    with pytest.raises(CorruptError, match=r"its ids, masks or row counts are not those of samples\.arrow"):
        shard.verify(samples.set_column(at, samples.schema.field(at), changed))


def test_a_commit_record_is_canonical_json(golden: Path) -> None:
    commit = fill_shard(golden, 0, rows=lambda plan, index: golden_rows(7))
    assert commit_path(golden, 0).read_bytes() == canonical(commit.model_dump())
