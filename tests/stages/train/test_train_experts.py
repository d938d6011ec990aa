"""Training mixtures of experts: the router loss is in the loss, in the gradients and in the log, or left out."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from tests.conftest import Bench
from tests.models import EXPERTS, ROUTED, make_model, make_tokenizer
from tests.stages import by_hand
from tests.stages.ranks import Recorder, first_gradients

from kdpipe.manifests.cache import Cache
from kdpipe.manifests.specs import LossSpec, RunSpec, TrainSpec
from kdpipe.pipeline.launch import launch
from kdpipe.stages.feed.batches import PlannedBatches
from kdpipe.stages.feed.dataset import of_caches
from kdpipe.stages.ranks import joined
from kdpipe.stages.train import train
from kdpipe.stages.train.run import Run
from kdpipe.stages.train.training import Training, find

WEIGHT = ROUTED["router_aux_loss_coef"]


@pytest.fixture(scope="module")
def mixtures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("mixtures")
    return {kind: make_tokenizer(make_model(kind, folder / kind, vocab_size=320, seed=1)) for kind in EXPERTS}


def training_of(bench: Bench, student: Path, output: Path, loss: LossSpec, **changes: Any) -> Training:
    spec = TrainSpec.model_validate({"lr": 1e-3, "batch_tokens": 600, "dtype": "float32", "max_steps": 2} | changes)
    run = RunSpec(train=spec, loss=loss)
    return Training(student=student, caches=(bench.cache,), output=output, spec=run, device="cpu")


@pytest.mark.parametrize("kind", EXPERTS)
@pytest.mark.parametrize(("nproc", "asked"), [(1, None), (2, 0.0), pytest.param(2, None, marks=pytest.mark.slow)])
def test_one_steps_gradients_equal_those_by_hand(
    kind: str, nproc: int, asked: float | None, bench: Bench, mixtures: dict[str, Path], tmp_path: Path
) -> None:
    """In float64, each sample alone; the router loss over all tokens of a batch, of which each rank has one."""
    loss = LossSpec(kd_weight=0.5, temperature=1.5, router_weight=asked)
    training = training_of(bench, mixtures[kind], tmp_path / "run", loss, grad_checkpointing=nproc == 1)
    if nproc == 1:
        first_gradients({"found": training}, tmp_path)
    else:
        launch(first_gradients, {"found": training}, tmp_path, nproc=nproc)
    found, sums, _ = torch.load(tmp_path / "found", weights_only=True)

    rows = of_caches([Cache.open(bench.cache)])
    ranks = [
        PlannedBatches(rows, rows.split(None)[0], seed=0, batch_tokens=600, rank=rank, world_size=nproc)
        for rank in range(nproc)
    ]
    batches = [batch.tolist() for rank in ranks for batch in rank.mine(0)]
    members = [member for batch in batches for member in batch]
    student: Any = transformers.AutoModelForCausalLM.from_pretrained(
        mixtures[kind], dtype=torch.float64, experts_implementation="eager"
    )
    routers: list[tuple[torch.Tensor, ...]] = []
    student.config.output_router_logits = True
    student.register_forward_hook(lambda module, given, output: routers.append(output.router_logits))
    right = by_hand.sums(by_hand.load(bench.teacher), student, Cache.open(bench.cache), members, loss, 0)
    supervised, balance = dict(zip(members, rows.num_supervised[members].tolist(), strict=True)), torch.zeros(())
    for batch in batches:  # a batch's router loss counts once for each of its rows
        mine = [routers[members.index(member)] for member in batch]
        one = balanced([torch.cat(layer) for layer in zip(*mine, strict=True)])
        balance = balance + one * sum(supervised[member] for member in batch) / right.num_tokens
    weight = WEIGHT if asked is None else asked
    (right.loss / right.num_tokens + weight * balance).backward()

    if weight:
        assert sums["router"] / right.num_tokens == pytest.approx(float(balance.detach()), rel=1e-5)
    mean = float((right.loss / right.num_tokens + weight * balance).detach())
    assert sums["loss"] / right.num_tokens == pytest.approx(mean, rel=5e-6)
    for name, parameter in student.named_parameters():
        truth, ours = parameter.grad, found[f"model.{name}"].double()
        assert truth is not None
        assert (ours - truth).norm() / truth.norm() < 5e-5, name


def balanced(layers: list[torch.Tensor]) -> torch.Tensor:
    """Switch Transformer's loss of router logits [tokens, experts] over all layers, each token sent to two experts."""
    logits = torch.cat(layers)
    p = logits.softmax(-1)
    sent = torch.zeros_like(p).scatter_(1, p.topk(2, -1).indices, 1.0).mean(0)
    return len(sent) * (sent * p.mean(0)).sum()


def test_the_router_loss_is_logged_and_left_out_where_it_is_zero(
    bench: Bench, mixtures: dict[str, Path], tmp_path: Path
) -> None:
    with_it, without = Recorder(), Recorder()
    train(training_of(bench, mixtures["mixtral"], tmp_path / "a", LossSpec()), with_it)
    train(training_of(bench, mixtures["mixtral"], tmp_path / "b", LossSpec(router_weight=0.0)), without)
    routed, kd = (with_it.values("step", f"{name}/mean") for name in ("router", "kd"))
    assert with_it.values("step", "loss/mean") == pytest.approx(
        [own + WEIGHT * one for own, one in zip(kd, routed, strict=True)], rel=1e-5
    )
    assert not any("router/mean" in fields for kind, fields in without.events if kind == "step")


@pytest.mark.parametrize("kind", EXPERTS)
def test_an_engine_is_given_the_experts_as_their_files_have_them(
    kind: str, bench: Bench, mixtures: dict[str, Path], tmp_path: Path
) -> None:
    training = training_of(bench, mixtures[kind], tmp_path / "run", LossSpec())
    with joined(torch.device("cpu")) as ranks:
        found = dict(Run(training, find(training), ranks).student.weights(torch.float32, keep=True, as_filed=True))
    filed = load_file(mixtures[kind] / "model.safetensors")
    assert found.keys() == filed.keys()
    assert any(".experts.3." in name for name in filed)
    assert all(torch.equal(found[name], weight) for name, weight in filed.items())
