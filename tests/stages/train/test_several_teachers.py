"""Students of several teachers: gradients and scores of the first step against transformers' own models in fp64."""

import dataclasses
from pathlib import Path

import pytest
import torch
from tests.chats import write_chats
from tests.conftest import Bench
from tests.models import make_model, make_tokenizer
from tests.stages import by_hand
from tests.stages.ranks import Recorder, first_gradients
from torch import Tensor

from kdpipe.manifests.cache import Cache
from kdpipe.manifests.errors import ConfigError, KdpipeError
from kdpipe.manifests.progress import Silent
from kdpipe.manifests.run import read_run
from kdpipe.manifests.specs import DataSpec, LossSpec, RunSpec, TrainSpec
from kdpipe.stages.evaluate import evaluate_student
from kdpipe.stages.extract import ExtractSpec, extract
from kdpipe.stages.feed.batches import PlannedBatches
from kdpipe.stages.feed.dataset import Dataset, of_caches
from kdpipe.stages.train import Training, check_training, train

WEIGHTS = (3.0, 1.0)
MIXES = ("distributions", "losses", "route")


@pytest.fixture(scope="module")
def caches(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """A second teacher's cache beside the bench's, of the same samples, and for "route" of others."""
    folder = tmp_path_factory.mktemp("second")
    teacher = make_tokenizer(make_model("llama", folder / "teacher", vocab_size=304, seed=7, sizes={"hidden_size": 48}))
    other = write_chats(folder / "other.jsonl", 30, seed=5)
    found = {}
    for name, data in (("same", bench.data), ("other", other)):
        spec = ExtractSpec(teacher=teacher, data=(data,), data_spec=DataSpec(max_length=128, heldout_fraction=0.25))
        extract(spec, folder / name, Silent())
        found[name] = (bench.cache, folder / name)
    return {"distributions": found["same"], "losses": found["same"], "route": found["other"]}


def training_of(bench: Bench, caches: tuple[Path, ...], output: Path, mix: str, **changes: object) -> Training:
    weights = () if mix == "route" else WEIGHTS
    loss = LossSpec(teacher_mix=mix, teacher_weights=weights, temperature=2.0, kd_weight=0.7)  # type: ignore[arg-type]
    train_spec = TrainSpec(lr=1e-3, batch_tokens=600, dtype="float32", max_steps=2)
    training = Training(
        student=bench.student, caches=caches, output=output, spec=RunSpec(train=train_spec, loss=loss), device="cpu"
    )
    return dataclasses.replace(training, **changes)  # type: ignore[arg-type]


def log_average(each: list[Tensor], weights: list[float]) -> Tensor:
    return torch.stack([w * log_t.exp() for w, log_t in zip(weights, each, strict=True)]).sum(0).log()


def kl(log_t: Tensor, log_s: Tensor) -> Tensor:
    return (log_t.exp() * (log_t - log_s)).sum()


def by_definition(
    dataset: Dataset, folders: list[Path], student: by_hand.Model, samples: list[int], loss: LossSpec
) -> tuple[Tensor, dict[str, float]]:
    """The loss summed over some samples, and the sums of an evaluation on them; every model in fp64."""
    teachers = [by_hand.load(folder) for folder in folders]
    weights = [weight / sum(WEIGHTS) for weight in WEIGHTS]
    total, scores = torch.zeros((), dtype=torch.float64), dict.fromkeys(("mixture", "1", "2", "tokens"), 0.0)
    for sample in samples:
        text = dataset.tokens(sample)
        ids = torch.tensor(text.token_ids, dtype=torch.int64)
        at = torch.nonzero(torch.tensor(text.supervised)[1:])[:, 0]

        def logits(model: by_hand.Model, ids: Tensor = ids, at: Tensor = at) -> Tensor:
            found: Tensor = model(ids[None]).logits[0, at, : by_hand.VOCAB_SIZE]
            return found

        own = logits(student)
        mine = [int(dataset.taught_by[sample])] if dataset.taught_by is not None else [0, 1]
        w = [1.0] if len(mine) == 1 else weights
        with torch.no_grad():
            theirs = [logits(teachers[number]) for number in mine]
        warm, cool = ([each.div(t).log_softmax(-1) for each in (*theirs, own)] for t in (loss.temperature, 1.0))
        if loss.teacher_mix == "losses":
            kd = torch.stack([v * kl(log_t, warm[-1]) for v, log_t in zip(w, warm[:-1], strict=True)]).sum()
        else:
            kd = kl(log_average(warm[:-1], w), warm[-1])
        ce = -cool[-1].gather(1, ids[at + 1][:, None]).sum()
        total = total + loss.kd_weight * kd + (1 - loss.kd_weight) * ce
        scores["mixture"] += float(kl(log_average(cool[:-1], w), cool[-1]).detach())
        for number, log_t in zip(mine, cool[:-1], strict=True):
            scores[f"{number + 1}"] += float(kl(log_t, cool[-1]).detach())
        scores["tokens"] += len(at)
    return total, scores


@pytest.mark.parametrize("mix", MIXES)
def test_first_step_and_scores_equal_the_float64_definition(
    mix: str, bench: Bench, caches: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    training = training_of(bench, caches[mix], tmp_path / "out", mix)
    first_gradients({mix: training}, tmp_path)
    gradients, sums, scores = torch.load(tmp_path / mix)
    dataset = of_caches([Cache.open(path) for path in caches[mix]], training.spec.loss)
    batches = PlannedBatches(dataset, dataset.split(None)[0], seed=0, batch_tokens=600, max_steps=2)
    folders = [bench.teacher, caches[mix][1].parent / "teacher"]
    student = by_hand.load(bench.student)
    total, _ = by_definition(dataset, folders, student, batches.samples(0).tolist(), training.spec.loss)
    count = batches.num_supervised(0)
    (total / count).backward()
    assert sums["loss"] == pytest.approx(float(total.detach()), rel=1e-5)
    for name, parameter in student.named_parameters():
        found = gradients[f"model.{name}"].double()
        assert (found - parameter.grad).norm() <= 1e-4 * parameter.grad.norm(), name

    with torch.no_grad():
        _, right = by_definition(dataset, folders, student, dataset.split(None)[1].tolist(), training.spec.loss)
    assert scores["heldout_kl"] == pytest.approx(right["mixture"] / right["tokens"], rel=1e-4)
    assert scores["num_tokens"] == right["tokens"]
    tokens = {1: right["tokens"], 2: right["tokens"]}
    if mix == "route":
        heldout, taught_by = dataset.split(None)[1], dataset.taught_by
        assert taught_by is not None
        tokens = {n + 1: int(dataset.num_supervised[heldout[taught_by[heldout] == n]].sum()) for n in (0, 1)}
    for number, size in tokens.items():
        assert scores[f"heldout_kl_teacher_{number}"] == pytest.approx(right[f"{number}"] / size, rel=1e-4)


def test_a_run_records_all_teachers_and_is_measured_against_them_again(
    bench: Bench, caches: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    recorder = Recorder()
    both = caches["distributions"]
    metrics = train(training_of(bench, both, tmp_path / "out", "distributions"), recorder)
    record = read_run(tmp_path / "out")
    assert record is not None
    assert record.inputs.caches == tuple(Cache.open(path).plan.fingerprint.overall() for path in both)
    assert record.inputs.spec.loss.teacher_weights == WEIGHTS
    assert any(note == f"teachers by number: 1 {both[0]}; 2 {both[1]}" for note in recorder.notes)
    assert any(note.endswith(f"--cache {both[0]} {both[1]}") for note in recorder.notes), "how it is measured"
    found = evaluate_student(
        tmp_path / "out",
        both,
        heldout_fraction=None,
        device="cpu",
        dtype="auto",
        batch_tokens=900,
        progress=Silent(),
    )
    assert {"heldout_kl", "heldout_kl_teacher_1", "heldout_kl_teacher_2"} <= found.keys()
    assert found == pytest.approx({name: metrics[name] for name in found}, rel=1e-5)


def test_shares_of_caches_are_of_caches_that_lie_side_by_side(
    bench: Bench, caches: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"cache.weights: teachers of the same samples have no shares"):
        check_training(training_of(bench, caches["losses"], tmp_path / "o", "losses", weights=(1.0, 1.0)), 1)
    routed = training_of(bench, caches["route"], tmp_path / "o", "route", weights=(0.1, 0.9))
    train(routed, Silent())
    record = read_run(routed.output)
    assert record is not None
    assert record.inputs.cache_weights == (0.1, 0.9)
    with pytest.raises(KdpipeError, match="its cache_weights"):
        check_training(dataclasses.replace(routed, weights=(0.2, 0.8)), 1)
