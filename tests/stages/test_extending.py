"""What a part of one's own plugs into, each in a few lines and without a change to the project."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.caches import make_cache, verified
from tests.conftest import Bench
from tests.stages.loss.cases import arguments_of
from tests.stages.ranks import Recorder

from kdpipe.manifests.cache import Cache
from kdpipe.manifests.codec import CODECS, TensorSpec
from kdpipe.manifests.progress import Silent
from kdpipe.manifests.specs import DataSpec, Dtype, LossSpec, RunSpec, TrainSpec
from kdpipe.stages.extract import ExtractSpec, extract
from kdpipe.stages.extract.recompute import recompute
from kdpipe.stages.feed.batches import PlannedBatches
from kdpipe.stages.feed.dataset import Dataset, of_caches
from kdpipe.stages.loss import DIVERGENCES, fused_distill_loss, reference_distill_loss
from kdpipe.stages.loss.divergences import Divergence
from kdpipe.stages.loss.pointwise import Distributions, through_softmax
from kdpipe.stages.teacher import ENGINES
from kdpipe.stages.teacher.engine import Ack, Request
from kdpipe.stages.teacher.transformers_engine import TransformersEngine
from kdpipe.stages.train import train
from kdpipe.stages.train.training import Training


class InMemory:
    """A row source: rows that were made elsewhere, as a ring beside a live teacher has them."""

    waited_s = None

    def __init__(self, rows: dict[int, np.ndarray]) -> None:
        self._rows, self.wanted, self.freed = rows, [], []

    def want(self, samples: np.ndarray) -> None:
        self.wanted += samples.tolist()

    def rows(self, sample: int) -> np.ndarray:
        return self._rows[sample]

    def done(self, samples: np.ndarray) -> None:
        self.freed += samples.tolist()


def test_a_row_source_of_ones_own(tmp_path) -> None:
    cache = make_cache(tmp_path, num_samples=20)
    cached = of_caches([cache])
    source = InMemory({index: np.array(view.rows) for index, view in enumerate(cache)})
    own = Dataset(cached.tables, [replace(cached.teachers[0], rows=source)])
    ours, theirs = (PlannedBatches(each, np.arange(20), seed=1, batch_tokens=150) for each in (own, cached))
    for step in range(ours.num_steps):
        for left, right in zip(ours.step(step), theirs.step(step), strict=True):
            assert torch.equal(left.teacher_rows[0].view(torch.int16), right.teacher_rows[0].view(torch.int16))
            assert torch.equal(left.input_ids, right.input_ids)
    assert sorted(source.wanted) == sorted(source.freed) == list(range(20))


class Int8:
    """A codec: a byte a number, and for each row what its largest one is."""

    def tensors(self, num_rows: int, width: int, dtype: Dtype) -> list[TensorSpec]:
        return [("int8", "I8", (num_rows, width)), ("scale", "F32", (num_rows, 1))]

    def encode(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        scale = np.abs(rows.astype(np.float32)).max(1, keepdims=True) / 127
        return {"int8": np.rint(rows.astype(np.float32) / np.maximum(scale, 1e-30)).astype(np.int8), "scale": scale}

    def decode(self, parts: Mapping[str, np.ndarray], out: np.ndarray) -> None:
        out[...] = parts["int8"] * parts["scale"]


def test_a_codec_of_ones_own(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CODECS, "int8-rows", Int8())
    spec = ExtractSpec(
        teacher=bench.teacher,
        data=(bench.data,),
        data_spec=DataSpec(max_length=128, heldout_fraction=0.25),
        codec="int8-rows",
        shard_tokens=500,
    )
    cache, exact = extract(spec, tmp_path / "cache", Silent()), Cache.open(bench.cache)
    assert verified(cache.path, "deep") == [*range(len(cache.plan.shards))]
    for io in ("mmap", "pread"):
        for ours, theirs in zip(Cache.open(cache.path, io=io), exact, strict=True):
            bound = np.abs(theirs.rows).max(1, keepdims=True) * (0.5 / 127 + 1e-6)
            assert (np.abs(ours.rows - theirs.rows) <= bound).all()
            assert ours.rows.dtype == theirs.rows.dtype
    assert not np.array_equal(cache[0].rows, exact[0].rows)
    assert not list((cache.path / "tmp").iterdir())
    sizes = [sum(path.stat().st_size for path in (each.path / "shards").iterdir()) for each in (cache, exact)]
    assert sizes[0] < sizes[1]
    assert recompute(cache, bench.teacher, 5, Silent()).rows_equal == 1.0
    steps = []
    for number, folder in enumerate((cache.path, bench.cache)):
        run = RunSpec(train=TrainSpec(lr=1e-3, batch_tokens=600, dtype="float32", max_steps=3))
        output, log = tmp_path / f"out{number}", Recorder()
        train(Training(student=bench.student, caches=(folder,), output=output, spec=run, device="cpu"), log)
        steps.append(log.values("step", "loss/mean"))
    assert steps[0] != steps[1]
    assert steps[0] == pytest.approx(steps[1], rel=2e-3)


class Backwards(TransformersEngine):
    """An engine: one that runs the samples of a batch in the other order, and answers in the right one."""

    def run(self, batches: Iterable[Sequence[Request]]) -> Iterator[Ack]:
        for batch in batches:
            yield from reversed(list(super().run([[request] for request in reversed(batch)])))


def test_an_engine_of_ones_own(bench: Bench, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ENGINES, "backwards", Backwards)
    spec = ExtractSpec(teacher=bench.teacher, data=(bench.data,), engine="backwards", device="cpu")
    extract(spec, tmp_path / "cache", Silent())
    cache, usual = Cache.open(tmp_path / "cache"), Cache.open(bench.cache)
    assert (cache.complete, cache.plan.engine.name) == (True, "backwards")
    assert cache[7].rows.tobytes() == usual[7].rows.tobytes()


def squared(log_p_teacher: torch.Tensor, log_p_student: torch.Tensor) -> torch.Tensor:
    return (log_p_student.exp() - log_p_teacher.exp()).square().sum(-1)


def squared_and_gradient(both: Distributions) -> tuple[torch.Tensor, torch.Tensor]:
    apart = both.p_student - both.p_teacher
    return apart.square().sum(-1), through_softmax(both.p_student, 2 * apart)


def test_a_divergence_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    own = Divergence(
        name="squared",
        formula="sum (S - T)^2",
        source="this test",
        reference=squared,
        value_and_grad=squared_and_gradient,
    )
    monkeypatch.setitem(DIVERGENCES, "squared", own)
    arguments = arguments_of(LossSpec(divergence="squared", temperature=1.5, kd_weight=0.8))
    torch.manual_seed(0)
    tensors = [torch.randn(shape) for shape in ((50, 12), (251, 12), (50, 19), (251, 19))]
    labels, found = torch.randint(251, (50,)), []
    for loss in (fused_distill_loss, reference_distill_loss):
        hidden = tensors[0].clone().requires_grad_()
        out = loss(hidden, *tensors[1:], labels, **arguments)
        out.loss.backward()
        found.append((out.loss.detach(), hidden.grad))
    assert torch.allclose(found[0][0], found[1][0], rtol=1e-5)
    assert torch.allclose(found[0][1], found[1][1], atol=1e-6)
