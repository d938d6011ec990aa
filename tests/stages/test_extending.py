"""What a part of one's own plugs into, each in a few lines and without a change to the project."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from tests.caches import make_cache
from tests.conftest import Bench
from tests.stages.loss.cases import arguments_of

from kdpipe.manifests.cache import Cache
from kdpipe.manifests.progress import Silent
from kdpipe.manifests.specs import LossSpec
from kdpipe.stages.extract import ExtractSpec, extract
from kdpipe.stages.feed.batches import PlannedBatches
from kdpipe.stages.feed.dataset import Dataset, of_caches
from kdpipe.stages.loss import DIVERGENCES, fused_distill_loss, reference_distill_loss
from kdpipe.stages.loss.divergences import Divergence
from kdpipe.stages.loss.pointwise import Distributions, through_softmax
from kdpipe.stages.teacher import ENGINES
from kdpipe.stages.teacher.engine import Ack, Request
from kdpipe.stages.teacher.transformers_engine import TransformersEngine


class InMemory:
    """A row source: rows that were made elsewhere, as a ring beside a live teacher has them."""

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
