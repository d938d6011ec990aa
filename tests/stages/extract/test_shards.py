"""What an engine is asked about every sample, and that a shard is committed only where its answers hold."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from tests.stages.extracting import extract_small, small_spec
from tests.stages.ranks import Recorder

from kdpipe.manifests.cache import Cache
from kdpipe.manifests.errors import GateError
from kdpipe.manifests.plan import read_plan
from kdpipe.manifests.sample import row_positions
from kdpipe.manifests.samples import Samples
from kdpipe.stages.extract import ExtractSpec
from kdpipe.stages.extract.requests import PROBES, shard_requests
from kdpipe.stages.extract.shards import CANARY_TOKENS
from kdpipe.stages.rows import checksum
from kdpipe.stages.teacher.engine import Ack, Request, RowTarget
from kdpipe.stages.teacher.transformers_engine import TransformersEngine


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> ExtractSpec:
    return small_spec(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def cache(spec: ExtractSpec, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cache") / "cache"
    extract_small(spec, folder)
    return folder


def requests_of(folder: Path, *, probe_every: int, seed: int = 0, rows: str = "supervised") -> list[Request]:
    """All requests of a cache as if it had been planned with another seed, or to keep every row."""
    cache = Cache.open(folder)
    settings = cache.plan.settings.model_copy(update={"seed": seed, "rows": rows})
    changed = Cache(folder, cache.plan.model_copy(update={"settings": settings}))

    def place(sample: int, num_rows: int) -> RowTarget:
        return RowTarget(array=np.zeros((num_rows, 1)), path=Path(), offset=sample)

    numbers = range(len(cache.plan.shards))
    return [one for number in numbers for batch in shard_requests(changed, number, probe_every, place) for one in batch]


def test_every_sample_is_asked_for_with_its_ids_and_the_rows_of_its_mask(cache: Path) -> None:
    opened = Cache.open(cache)
    requests = requests_of(cache, probe_every=1)
    assert [request.sample for request in requests] == [*range(len(opened))]
    for request, view in zip(requests, opened, strict=True):
        assert request.token_ids.tolist() == view.token_ids.tolist()
        assert request.positions.tolist() == row_positions(view.supervised).tolist()
        assert request.scored[:, 0].tolist() == view.token_ids[request.positions[request.probes] + 1].tolist()


def test_several_rows_of_every_sample_are_probed_and_others_for_another_seed(cache: Path) -> None:
    for seed in (0, 1):
        for request in requests_of(cache, probe_every=1, seed=seed):
            assert len(request.probes) == min(PROBES, len(request.positions))
            assert {0, len(request.positions) - 1} >= {int(request.probes[0]), int(request.probes[-1])}
    probes, others = ([one.probes.tolist() for one in requests_of(cache, probe_every=1, seed=seed)] for seed in (0, 1))
    assert probes == [one.probes.tolist() for one in requests_of(cache, probe_every=1)]
    assert probes != others


def test_an_engine_that_probes_few_samples_inside_has_the_last_row_of_each(cache: Path) -> None:
    found = [requests_of(cache, probe_every=3, seed=seed) for seed in range(8)]
    for requests in found:
        assert all(request.probes[-1] == len(request.positions) - 1 for request in requests)
    several = [sum(len(request.probes) > 1 for request in requests) for requests in found]
    assert 0 < sum(several) < sum(map(len, found)) * 0.6
    assert len({tuple(len(request.probes) for request in requests) for requests in found}) > 4, "seeds draw others"


def test_the_canary_is_asked_about_the_first_samples(
    spec: ExtractSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[int]] = []
    own = TransformersEngine.rows_and_logits

    def rows_and_logits(engine: TransformersEngine, token_ids: np.ndarray) -> object:
        asked.append(token_ids.tolist())
        return own(engine, token_ids)

    monkeypatch.setattr(TransformersEngine, "rows_and_logits", rows_and_logits)
    recorder = Recorder()
    extract_small(spec, tmp_path / "cache", progress=recorder)
    plan = read_plan(tmp_path / "cache")
    first = Samples(tmp_path / "cache", plan).shard(0).column("token_ids").to_pylist()[:3]
    assert asked == [ids[:CANARY_TOKENS] for ids in first]
    (canary,) = [fields for kind, fields in recorder.events if kind == "canary"]
    assert float(str(canary["logit_error"])) < 1e-5


Lie = Callable[[Request, Ack], Ack]


def moved_rows(request: Request, ack: Ack) -> Ack:
    """Each row is that of the token before; the engine believes in what it wrote."""
    request.target.array[1:] = request.target.array[:-1].copy()
    return dataclasses.replace(ack, checksum=checksum(request.target.array))


def rows_of_another(request: Request, ack: Ack) -> Ack:
    """Written by somebody else after the acknowledgement."""
    request.target.array[-1] = request.target.array[0]
    return ack


def fewer_rows(request: Request, ack: Ack) -> Ack:
    return dataclasses.replace(ack, num_rows=ack.num_rows - 1)


@pytest.mark.parametrize(
    ("lie", "said"), [(moved_rows, "puts the logits"), (rows_of_another, "checksum"), (fewer_rows, "the engine wrote")]
)
def test_no_shard_is_committed_whose_rows_the_gate_refuses(
    lie: Lie, said: str, spec: ExtractSpec, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A true engine whose answers of the third shard are changed on their way."""
    third = Cache.open(cache).plan.shards[2]
    own = TransformersEngine.run

    def run(engine: TransformersEngine, batches: Iterable[Sequence[Request]]) -> Iterator[Ack]:
        asked: dict[int, Request] = {}

        def noted() -> Iterator[Sequence[Request]]:
            for batch in batches:
                asked.update({request.sample: request for request in batch})
                yield batch

        for ack in own(engine, noted()):
            hit = ack.sample == third.first_sample and len(asked[ack.sample].positions) > 1
            yield lie(asked[ack.sample], ack) if hit else ack

    monkeypatch.setattr(TransformersEngine, "run", run)
    with pytest.raises(GateError, match=f"sample {third.first_sample}: .*{said}"):
        extract_small(spec, tmp_path / "cache")
    assert Cache.open(tmp_path / "cache").committed() == [0, 1]
    monkeypatch.undo()
    extract_small(spec, tmp_path / "cache")
    assert Cache.open(tmp_path / "cache").complete
