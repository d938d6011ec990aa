"""Two caches of the same samples: equal, apart by rounding, apart by a row, or not comparable."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tests.caches import fill_shard, make_cache, make_samples, random_rows
from tests.conftest import Main

from kdpipe.manifests.cache import HEAD_FILE, Cache, teacher_files, write_head
from kdpipe.manifests.compare import TOLERANCE, compare, row_distance
from kdpipe.manifests.errors import CacheError
from kdpipe.manifests.plan import Plan
from kdpipe.manifests.shard import commit_path, shard_path


def with_rows(cache: Path, folder: Path, change: str) -> Path:
    """A copy of the cache whose first shard has changed rows, committed anew."""
    copy = shutil.copytree(cache, folder)
    for path in (shard_path(copy, 0), commit_path(copy, 0)):
        path.unlink()

    def rows(plan: Plan, index: int) -> np.ndarray:
        own = random_rows(plan, index)
        if change == "rounding":
            return (own.astype(np.float32) * np.float32(1 + 2e-7)).astype(own.dtype)
        own[3] = own[4]
        return own

    fill_shard(copy, 0, rows=rows)
    return copy


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return make_cache(tmp_path / "cache", dtype="float32").path


def test_a_cache_equals_itself(cache: Path) -> None:
    found = compare(Cache.open(cache), Cache.open(cache))
    assert (found.rows_equal, found.mean_distance, found.worst_distance, found.worst_row) == (1.0, 0.0, 0.0, None)
    assert found.heads_equal
    assert found.num_rows == Cache.open(cache).plan.num_rows > 0


def test_rounding_is_measured_and_a_wrong_row_is_named(cache: Path, tmp_path: Path, main: Main) -> None:
    close = compare(Cache.open(cache), Cache.open(with_rows(cache, tmp_path / "close", "rounding")))
    assert 0 < close.mean_distance < close.worst_distance < 1e-6
    assert 0.5 < close.rows_equal < 1
    wrong = with_rows(cache, tmp_path / "wrong", "a row")
    code, out, err = main("cache", "compare", cache, wrong, "--json")
    assert (code, out.count("\n")) == (3, 1)
    assert err.splitlines()[-1].startswith(f"E-DRIFT {wrong}: row ")
    found = compare(Cache.open(cache), Cache.open(wrong))
    assert found.worst_sample is not None
    bad = Cache.open(wrong)[found.worst_sample].rows[found.worst_row]
    assert np.array_equal(bad, random_rows(Cache.open(wrong).plan, 0)[4])
    assert main("cache", "compare", cache, wrong, "--tolerance", "9")[0] == 0
    assert main("cache", "compare", cache, tmp_path / "close")[0] == 0


def test_the_coarser_dtype_sets_the_tolerance_whichever_comes_first(cache: Path, tmp_path: Path, main: Main) -> None:
    coarse = make_cache(tmp_path / "coarse", dtype="bfloat16").path
    for pair in ((cache, coarse), (coarse, cache)):
        out = main("cache", "compare", *pair, "--json")[1]
        assert json.loads(out)["tolerance"] == TOLERANCE["bfloat16"]


def test_nan_is_worse_than_anything() -> None:
    ours = np.ones((3, 2), np.float32)
    theirs = ours.copy()
    theirs[1, 1] = np.nan
    assert np.isnan(row_distance(ours, theirs)[1])
    assert row_distance(np.zeros((1, 2)), np.zeros((1, 2))).tolist() == [0.0]
    assert row_distance(np.zeros((1, 2)), np.ones((1, 2)))[0] > 1e300


def test_caches_of_other_masks_or_heads_are_told_apart(tmp_path: Path) -> None:
    samples = make_samples(21)
    at = next(index for index, sample in enumerate(samples) if sample.supervised[1:].any())
    masks = [sample.supervised.copy() for sample in samples]
    masks[at][1:] = np.roll(masks[at][1:], 1)  # as many rows, of other tokens
    assert not np.array_equal(masks[at], samples[at].supervised)
    others = [replace(sample, supervised=mask) for sample, mask in zip(samples, masks, strict=True)]
    one = make_cache(tmp_path / "one", samples=samples, has_bias=True)
    with pytest.raises(CacheError, match=f"sample {at} has other tokens or another mask"):
        compare(one, make_cache(tmp_path / "masks", samples=others, has_bias=True))
    assert compare(one, one).heads_equal
    folder = shutil.copytree(one.path, tmp_path / "head")
    for part in ("weight", "bias"):
        arrays = {"weight": one.head().weight.copy(), "bias": one.head().bias}
        arrays[part] = arrays[part] + arrays[part].dtype.type(1)
        (folder / "teacher" / HEAD_FILE).unlink()
        write_head(folder / "teacher", arrays["weight"], arrays["bias"], dtype=one.plan.head.dtype)
        plan = one.plan.model_copy(update={"teacher_files": teacher_files(folder / "teacher")})
        found = compare(one, Cache(folder, one.plan.model_copy(update={"teacher_files": plan.teacher_files})))
        assert (found.heads_equal, found.rows_equal) == (False, 1.0), part


def test_caches_of_other_samples_or_widths_are_refused(cache: Path, tmp_path: Path) -> None:
    for name, other in {
        "num_samples is 21": {"num_samples": 20},
        "wide": {"hidden_size": 7},
        "other tokens": {"vocab_size": 91},
    }.items():
        made = make_cache(tmp_path / name, dtype="float32", **other)
        with pytest.raises(CacheError, match=name):
            compare(Cache.open(cache), made)
