"""The teacher run again on samples of a finished cache: the same rows, or the sample that is not is named."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from tests.caches import fill_shard
from tests.conftest import Main
from tests.models import make_model, make_tokenizer
from tests.stages.extracting import extract_small, small_spec

from kdpipe.manifests.cache import Cache
from kdpipe.manifests.errors import IncompleteError, TeacherError
from kdpipe.manifests.plan import Plan
from kdpipe.manifests.progress import Silent
from kdpipe.manifests.shard import commit_path, shard_path
from kdpipe.stages.extract import ExtractSpec
from kdpipe.stages.extract.recompute import choose, recompute


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> ExtractSpec:
    return small_spec(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def whole(spec: ExtractSpec, tmp_path_factory: pytest.TempPathFactory) -> Path:
    cache = tmp_path_factory.mktemp("whole") / "cache"
    extract_small(spec, cache)
    return cache


@pytest.mark.parametrize("changes", [{}, {"batch_tokens": 150}, {"rows": "all"}], ids=["alone", "batches", "all rows"])
def test_the_same_teacher_gives_the_same_bits(changes: dict, spec: ExtractSpec, tmp_path: Path) -> None:
    extract_small(dataclasses.replace(spec, **changes), tmp_path / "cache")
    cache = Cache.open(tmp_path / "cache")
    found = recompute(cache, spec.teacher, 3, Silent())
    assert (found.rows_equal, found.worst_distance, found.worst_sample) == (1.0, 0.0, None)
    assert found.num_samples >= 3
    everything = recompute(cache, spec.teacher, 100, Silent())
    assert (everything.num_samples, everything.num_rows) == (12, cache.plan.num_rows)
    assert everything.rows_equal == 1.0


def swapped(plan: Plan, index: int, *, of: Path) -> np.ndarray:
    """A shard's own rows, the first two of them in each other's place."""
    rows = np.array(Cache.open(of).shard(index).rows(0, plan.shards[index].num_rows))
    rows[[0, 1]] = rows[[1, 0]]
    return rows


def test_rows_that_were_wrong_from_the_start_are_found(
    spec: ExtractSpec, whole: Path, main: Main, tmp_path: Path
) -> None:
    """Every checksum is right: only the teacher can tell."""
    cache = shutil.copytree(whole, tmp_path / "cache")
    for path in (commit_path(cache, 1), shard_path(cache, 1)):
        path.unlink()
    fill_shard(cache, 1, rows=lambda plan, index: swapped(plan, index, of=whole))
    assert main("cache", "verify", cache, "--deep")[0] == 0
    code, out, err = main("cache", "verify", cache, "--recompute", 12, "--teacher", spec.teacher, "--json")
    told = json.loads(out)
    assert code == 3
    assert told["ok"] is False
    first = Cache.open(cache).plan.shards[1].first_sample
    assert told["recomputed"]["worst_sample"] == first
    assert f"sample {first} is" in err
    code, out, _ = main("cache", "verify", whole, "--recompute", 2, "--teacher", spec.teacher, "--json")
    assert (code, json.loads(out)["recomputed"]["rows_equal"]) == (0, 1.0)


def test_which_samples_are_chosen_is_a_function_of_the_plan(whole: Path) -> None:
    cache = Cache.open(whole)
    assert choose(cache, 5) == choose(Cache.open(whole), 5)
    assert len(set(choose(cache, 5))) == 5
    assert set(choose(cache, 3)) <= set(choose(cache, 5))
    assert choose(cache, 99) == [*range(12)]


def test_another_teacher_and_an_unfinished_cache_are_refused(spec: ExtractSpec, whole: Path, tmp_path: Path) -> None:
    other = make_tokenizer(make_model("qwen3", tmp_path / "other", vocab_size=304, seed=5))
    with pytest.raises(TeacherError, match="the cache was made by"):
        recompute(Cache.open(whole), other, 1, Silent())
    for none in (tmp_path / "nowhere", spec.data[0]):
        with pytest.raises(TeacherError, match=r"no such folder|not a folder"):
            recompute(Cache.open(whole), none, 1, Silent())
    cache = shutil.copytree(whole, tmp_path / "cache")
    commit_path(cache, 2).unlink()
    with pytest.raises(IncompleteError):
        recompute(Cache.open(cache), spec.teacher, 1, Silent())


def test_the_options_go_together(whole: Path, main: Main) -> None:
    code, _, err = main("cache", "verify", whole, "--recompute", 2)
    assert code == 4
    assert "--teacher" in err
