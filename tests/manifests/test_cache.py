"""A cache gives every sample's rows without a copy, says what it lacks, and finds what was damaged."""

import json
import mmap
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tests.caches import array_dtype, fill_shard, make_cache, make_plan, make_samples, random_rows, verified

from kdpipe.manifests import access
from kdpipe.manifests.cache import HEAD_FILE, Cache
from kdpipe.manifests.errors import CacheError, CorruptError, IncompleteError, KdpipeError, LayoutError
from kdpipe.manifests.plan import PLAN_FILE, SAMPLES_FILE
from kdpipe.manifests.sample import row_positions
from kdpipe.manifests.shard import commit_path, shard_path
from kdpipe.manifests.shard_table import SHARDS_FILE
from kdpipe.manifests.specs import Io


def test_every_sample_comes_with_its_ids_its_mask_and_its_rows(tmp_path: Path) -> None:
    cache, samples = make_cache(tmp_path), make_samples(21)
    written = np.concatenate([random_rows(cache.plan, number) for number in range(len(cache.plan.shards))])
    assert len(cache) == 21
    assert len(cache.plan.shards) > 2
    row = 0
    for view, sample in zip(cache, samples, strict=True):
        count = len(row_positions(sample.supervised))
        assert view.token_ids.tolist() == sample.token_ids.tolist()
        assert view.supervised.tolist() == sample.supervised.tolist()
        assert view.rows.tobytes() == written[row : row + count].tobytes()
        row += count
    assert row == len(written) == cache.plan.num_rows


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_rows_are_a_view_of_the_mapping(tmp_path: Path, dtype: str) -> None:
    cache = make_cache(tmp_path, dtype=dtype)  # type: ignore[arg-type]
    rows = cache[7].rows
    shard = cache.shard(int(cache.samples.column("shard")[7]))
    assert np.shares_memory(rows, shard.rows(0, shard.num_rows))
    assert rows.dtype == array_dtype(dtype)  # type: ignore[arg-type]
    assert not rows.flags.writeable
    assert rows.flags.c_contiguous


def test_a_cache_of_every_row_gives_the_supervised_ones(tmp_path: Path) -> None:
    cache = make_cache(tmp_path, rows="all")
    first, adjacent, scattered = 0, 0, 0
    for index, view in enumerate(cache):
        number = int(cache.samples.column("shard")[index])
        first = int(cache.samples.column("first_row")[index])
        positions = row_positions(view.supervised)
        assert view.rows.tobytes() == random_rows(cache.plan, number)[first + positions].tobytes()
        if len(positions) and positions[-1] - positions[0] + 1 == len(positions):
            adjacent += 1
            assert np.shares_memory(view.rows, cache.shard(number).rows(0, cache.shard(number).num_rows))
        else:
            scattered += 1
    assert adjacent > 3
    assert scattered > 3
    assert cache.num_supervised().sum() < cache.plan.num_rows


def test_indices_count_from_the_end_too_and_stop_at_both(tmp_path: Path) -> None:
    cache = make_cache(tmp_path)
    assert cache[-1].token_ids.tolist() == cache[20].token_ids.tolist()
    assert cache[-21].token_ids.tolist() == cache[0].token_ids.tolist()
    for index in (21, -22):
        with pytest.raises(IndexError):
            cache[index]


def test_columns_agree_with_the_samples(tmp_path: Path) -> None:
    cache = make_cache(tmp_path)
    assert cache.num_tokens().tolist() == [len(view.token_ids) for view in cache]
    assert cache.num_supervised().tolist() == [len(view.rows) for view in cache]


def test_the_held_out_split_is_the_same_for_every_cache_of_the_same_texts(tmp_path: Path) -> None:
    one = make_cache(tmp_path / "one", num_samples=40)
    other = make_cache(tmp_path / "other", num_samples=40, hidden_size=7, dtype="float32", shard_tokens=90)
    assert 0 < one.heldout().sum() < 40
    np.testing.assert_array_equal(one.heldout(), other.heldout())
    np.testing.assert_array_equal(one.heldout(), one.heldout(one.plan.heldout_fraction))
    assert not (one.heldout(0.1) & ~one.heldout(0.6)).any()
    assert [int(one.heldout(fraction).sum()) for fraction in (0.0, 1.0)] == [0, 40]


def test_the_same_arguments_give_byte_identical_caches(tmp_path: Path) -> None:
    for name in ("one", "two"):
        make_cache(tmp_path / name, has_bias=True)
    one, two = (
        {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
        for folder in (tmp_path / "one", tmp_path / "two")
    )
    assert one == two
    assert len(one) > 8


@pytest.mark.parametrize("has_bias", [False, True])
def test_the_head_comes_back_bit_for_bit(tmp_path: Path, has_bias: bool) -> None:
    head = make_cache(tmp_path, has_bias=has_bias).head()
    assert head.weight.shape == (104, 19)
    rng = np.random.default_rng([0, 1 << 20])
    weight = rng.standard_normal((104, 19), dtype=np.float32) / np.sqrt(19)
    assert head.weight.tobytes() == weight.astype(head.weight.dtype).tobytes()
    assert (head.bias is not None) == has_bias
    if head.bias is not None:
        bias = rng.standard_normal(104, dtype=np.float32)
        assert head.bias.tobytes() == bias.astype(head.bias.dtype).tobytes()


def test_a_growing_cache_reads_what_is_committed_and_says_what_is_not(tmp_path: Path) -> None:
    plan = make_plan(tmp_path, make_samples(21))
    fill_shard(tmp_path, 1)
    cache = Cache.open(tmp_path)
    assert (cache.complete, cache.committed(), cache.info()["shards_committed"]) == (False, [1], 1)
    _ = cache[plan.shards[1].first_sample].rows
    with pytest.raises(IncompleteError, match="not extracted yet"):
        cache[0]
    with pytest.raises(IncompleteError, match=f"1 of {len(plan.shards)} shards"):
        cache.require_complete()
    with pytest.raises(IncompleteError, match="not extracted yet"):
        verified(cache.path)
    for number in set(range(len(plan.shards))) - {1}:
        fill_shard(tmp_path, number)
    assert cache.complete
    _ = cache[0].rows


def test_a_shard_that_is_linked_but_not_committed_does_not_count(tmp_path: Path) -> None:
    make_cache(tmp_path)
    commit_path(tmp_path, 0).unlink()
    cache = Cache.open(tmp_path)
    assert not cache.complete
    with pytest.raises(IncompleteError):
        cache[0]
    with pytest.raises(IncompleteError):
        verified(cache.path)


def test_info_has_every_promised_key_and_is_json(tmp_path: Path) -> None:
    cache = make_cache(tmp_path)
    info = json.loads(json.dumps(cache.info()))
    assert {
        "num_samples", "num_tokens", "num_rows", "hidden_size", "vocab_size", "codec", "dtype", "num_bytes", "shards",
        "complete", "fingerprint",
    } <= info.keys()  # fmt: skip
    assert (info["num_samples"], info["hidden_size"], info["vocab_size"]) == (21, 19, 97)
    assert info["num_tokens"] == sum(len(view.token_ids) for view in cache)
    assert info["num_bytes"] == sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())


def test_work_in_progress_counts_for_nothing_in_the_size(tmp_path: Path) -> None:
    cache = make_cache(tmp_path)
    before = cache.num_bytes()
    (cache.path / "tmp" / "000009.safetensors.1-a").write_bytes(bytes(1000))
    assert cache.num_bytes() == before > 1000


def test_the_first_shard_of_a_lost_plan_says_that_it_is_lost(tmp_path: Path) -> None:
    """Committed once the cache had grown, and the folder of the plan that brought it is gone."""
    number = len(make_cache(tmp_path).plan.shards)
    shutil.copy(commit_path(tmp_path, number - 1), commit_path(tmp_path, number))
    with pytest.raises(LayoutError, match=f"shard {number} is committed, its plans have {number} shards") as caught:
        Cache.open(tmp_path)
    assert "a folder of grown/ is lost" in str(caught.value)


def test_no_cache_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(CacheError, match="no cache here"):
        Cache.open(tmp_path)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "c"
    make_cache(folder, has_bias=True)
    return folder


def rewrite(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / name
        path.write_bytes(change(path.read_bytes()))

    return damage


HEAD = f"teacher/{HEAD_FILE}"


@pytest.mark.parametrize(
    ("damage", "error", "says"),
    [
        (rewrite(SAMPLES_FILE, lambda data: data[:900] + bytes([data[900] ^ 1]) + data[901:]), CorruptError, "sha256"),
        (rewrite(HEAD, lambda data: data[:-1] + bytes([data[-1] ^ 1])), CorruptError, "xxh3-128"),
        (rewrite(HEAD, lambda data: data.replace(b'"bias"', b'"cias"')), LayoutError, "not the head PLAN.json"),
        (rewrite(HEAD, lambda data: data.replace(b'"version":"1"', b'"version":"2"')), LayoutError, "not the head"),
        (rewrite(HEAD, lambda data: data[:-2]), LayoutError, "tensors end at"),
        (rewrite(HEAD, lambda data: b""), LayoutError, "an empty file"),
        (lambda folder: (folder / HEAD).unlink(), IncompleteError, "head is missing"),
    ],
)
def test_verify_names_the_damaged_file(
    whole: Path, tmp_path: Path, damage: Callable[[Path], None], error: type[KdpipeError], says: str
) -> None:
    folder = shutil.copytree(whole, tmp_path / "c")
    damage(folder)
    with pytest.raises(error) as caught:
        verified(folder)
    assert says in str(caught.value)
    assert caught.value.where in (str(folder / SAMPLES_FILE), str(folder / HEAD))


def test_the_head_of_another_teacher_is_refused(whole: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(whole, tmp_path / "c")
    make_cache(tmp_path / "other", vocab_size=98, has_bias=True)
    shutil.copy(tmp_path / "other" / HEAD, folder / HEAD)
    with pytest.raises(LayoutError, match=r"not the head PLAN\.json describes: bfloat16, 104 x 19, a bias"):
        Cache.open(folder).head()


def test_no_flipped_bit_in_any_file_of_a_cache_goes_unnoticed(whole: Path, tmp_path: Path) -> None:
    folder, rng = shutil.copytree(whole, tmp_path / "c"), np.random.default_rng(11)
    files = [PLAN_FILE, SAMPLES_FILE, SHARDS_FILE, HEAD]
    files += [str(path(folder, 1).relative_to(folder)) for path in (shard_path, commit_path)]
    assert verified(folder) == list(range(4))
    for name in files:
        path = folder / name
        good = path.read_bytes()
        for _ in range(40):
            at, bit = int(rng.integers(len(good))), 1 << int(rng.integers(8))
            path.write_bytes(good[:at] + bytes([good[at] ^ bit]) + good[at + 1 :])
            with pytest.raises(KdpipeError):
                verified(folder)
        path.write_bytes(good)
    assert verified(folder) == list(range(4))


@pytest.mark.parametrize("io", ["mmap", "pread"])
def test_prefetching_asks_for_the_bytes_of_a_samples_rows(
    io: Io, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Real calls, whose places and lengths are written down: nothing else tells that the kernel was asked."""
    make_cache(tmp_path)
    cache, asked = Cache.open(tmp_path, io=io), []
    advise, madvise = os.posix_fadvise, access._libc.madvise

    def by_offset(descriptor: int, begin: int, length: int, advice: int) -> None:
        asked.append((begin, length, advice == os.POSIX_FADV_WILLNEED))
        advise(descriptor, begin, length, advice)

    def by_address(address: int, length: int, advice: int) -> int:
        asked.append((address, length, advice == mmap.MADV_WILLNEED))
        return madvise(address, length, advice)

    monkeypatch.setattr(os, "posix_fadvise", by_offset)
    monkeypatch.setattr(access._libc, "madvise", by_address)
    for index, view in enumerate(cache):
        asked.clear()
        cache.prefetch(index)
        if not len(view.rows):
            assert all(length == 0 or io == "mmap" for _, length, _ in asked)
            continue
        ((at, length, wanted),) = asked
        begin = view.rows.__array_interface__["data"][0]
        if io == "pread":
            shard = cache.shard(int(cache.samples.column("shard")[index]))
            at += begin - shard.layout.tensors["hidden"].begin - int(cache.samples.column("first_row")[index]) * 38
        assert wanted
        assert begin - mmap.PAGESIZE < at <= begin
        assert at + length == begin + view.rows.nbytes
    assert verified(cache.path) == list(range(len(cache.plan.shards)))
