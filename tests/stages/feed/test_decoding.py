"""Decoding in the batch path: what a model gets of a coded cache is what the cache itself reads, on every way there."""

from pathlib import Path

import numpy as np
import pytest
import torch
from tests.caches import fill_shard, fit_codec, make_cache, make_plan, make_samples, random_rows

from kdpipe.manifests.cache import Cache
from kdpipe.manifests.plan import Plan
from kdpipe.stages.feed.batches import PlannedBatches
from kdpipe.stages.feed.dataset import of_caches
from kdpipe.stages.feed.decoding import decoder_of
from kdpipe.stages.feed.packing import Packer
from kdpipe.stages.student.student import load_teacher_head

CPU = torch.device("cpu")
CODECS = ["int8", "fisher kl=0.01"]


def with_wild_rows(plan: Plan, index: int) -> np.ndarray:
    rows = random_rows(plan, index)
    rows[::7] = 3e4  # stored as they are
    return rows


def coded(folder: Path, codec: str, dtype: str = "bfloat16") -> Cache:
    make_plan(folder, make_samples(21), dtype=dtype)  # type: ignore[arg-type]
    fit_codec(folder, codec)
    cache = Cache.open(folder)
    for number in range(len(cache.plan.shards)):
        fill_shard(folder, number, rows=with_wild_rows)
    return cache


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("codec", CODECS)
def test_rows_of_a_batch_are_those_that_the_cache_reads(codec: str, dtype: str, tmp_path: Path) -> None:
    cache = coded(tmp_path / "c", codec, dtype)
    dataset = of_caches([cache])
    (teacher,) = dataset.teachers
    assert teacher.codec is not None
    decoder = decoder_of(teacher.codec, teacher.dtype, CPU)
    for samples in ([3, 0, 20, 7], list(range(21)), [5]):
        (stored,) = Packer(dataset).pack(samples).to(CPU).teacher_rows
        assert isinstance(stored, dict)
        wanted = np.concatenate([cache.rows(sample).astype(np.float32) for sample in samples])
        found = decoder.rows(stored)
        assert found.dtype == teacher.dtype
        assert torch.allclose(
            found.float(), torch.from_numpy(wanted), rtol=1e-2 if dtype == "bfloat16" else 2e-3, atol=1e-2
        )
        if codec != "int8":
            assert (found.float() == torch.from_numpy(wanted)).all(1)[torch.from_numpy(wanted > 2e4).any(1)].all()


def test_what_travels_is_smaller_than_rows(tmp_path: Path) -> None:
    make_cache(tmp_path / "c", codec="fisher kl=0.01")
    dataset = of_caches([Cache.open(tmp_path / "c")])
    (stored,) = Packer(dataset).pack(range(21)).teacher_rows
    assert isinstance(stored, dict)
    num_rows = len(stored["packed"])
    assert stored["packed"].nbytes < 0.5 * num_rows * 19 * 2


@pytest.mark.parametrize("codec", CODECS)
def test_what_travels_is_integers_which_no_student_casts(codec: str, tmp_path: Path) -> None:
    (stored,) = Packer(of_caches([coded(tmp_path / "c", codec)])).pack(range(21)).teacher_rows
    assert isinstance(stored, dict)
    assert not [name for name, tensor in stored.items() if tensor.is_floating_point()]


@pytest.mark.parametrize("codec", CODECS)
def test_a_batch_without_rows_has_none(codec: str, tmp_path: Path) -> None:
    cache = coded(tmp_path / "c", codec)
    dataset = of_caches([cache])
    head = load_teacher_head(dataset.teachers[0], CPU)
    batch = Packer(dataset).empty()
    assert head.side(batch.teacher_rows[0], batch.taught_tokens[0]).hidden.shape == (0, 19)


def test_caches_of_several_codecs_come_as_rows(tmp_path: Path) -> None:
    caches = [
        make_cache(tmp_path / f"c{number}", samples=make_samples(9, seed=number), codec=codec)
        for number, codec in enumerate(["raw", "int8", "fisher kl=0.01"])
    ]
    dataset = of_caches(caches)
    assert dataset.teachers[0].codec is None
    for batch in PlannedBatches(dataset, np.arange(27), seed=0, batch_tokens=200).step(0):
        assert isinstance(batch.teacher_rows[0], torch.Tensor)
    both = of_caches([caches[1]])
    assert both.teachers[0].codec is not None


def test_a_cache_of_every_row_comes_as_rows_of_supervised_tokens(tmp_path: Path) -> None:
    make_plan(tmp_path / "c", make_samples(21), rows="all")
    fit_codec(tmp_path / "c", "fisher kl=0.01")
    cache = Cache.open(tmp_path / "c")
    for number in range(len(cache.plan.shards)):
        fill_shard(cache.path, number)
    dataset = of_caches([cache])
    batch = Packer(dataset).pack([3, 4])
    assert isinstance(batch.teacher_rows[0], torch.Tensor)
    assert len(batch.teacher_rows[0]) == len(batch.labels)
