"""Training by adapters: only they have gradients, moments and a checkpoint; what is written is what was trained."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from tests.conftest import Apart, Bench
from tests.models import make_adapter
from tests.opened import load_student, student_in
from tests.stages import by_hand
from tests.stages.ranks import Recorder, first_gradients, read_steps, train_logged, train_until

from kdpipe.manifests.cache import Cache
from kdpipe.manifests.errors import ConfigError
from kdpipe.manifests.progress import Silent
from kdpipe.manifests.run import read_run
from kdpipe.manifests.specs import LossSpec, RunSpec, StudentSpec, TrainSpec
from kdpipe.pipeline.launch import launch
from kdpipe.stages.feed.batches import PlannedBatches
from kdpipe.stages.feed.dataset import of_caches
from kdpipe.stages.ranks import joined
from kdpipe.stages.train import train
from kdpipe.stages.train.run import Run
from kdpipe.stages.train.training import Training, check_training, find

CPU = torch.device("cpu")
LOSS = LossSpec(kd_weight=0.5, temperature=1.5)
NAMES = ("adapter_config.json", "adapter_model.safetensors", "base.json")


def lora(bench: Bench, output: Path, *, student: Path | None = None, keys: Any = None, **changes: Any) -> Training:
    """A training by adapters of a rank 4 on a small budget."""
    spec = TrainSpec.model_validate({"lr": 1e-2, "batch_tokens": 600, "dtype": "float32", "max_steps": 4} | changes)
    own = StudentSpec(**({"lora_rank": 4} if keys is None else keys))
    return Training(
        student=student or bench.student,
        caches=(bench.cache,),
        output=output,
        spec=RunSpec(train=spec, loss=LOSS, student=own),
        device="cpu",
    )


@pytest.fixture(scope="module")
def everywhere(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random adapter on every linear layer of the student and on its head."""
    return make_adapter(
        bench.student, tmp_path_factory.mktemp("adapter"), targets=["q_proj", "o_proj", "up_proj", "lm_head"]
    )


def first_members(training: Training) -> list[int]:
    rows = of_caches([Cache.open(training.caches[0])])
    members = PlannedBatches(rows, rows.split(None)[0], seed=0, batch_tokens=600).samples(0)
    return sorted(members.tolist(), key=lambda member: -rows.num_tokens[member])


@pytest.mark.parametrize("nproc", [1, 2])
def test_the_gradients_are_those_of_pefts_own_model_and_nothing_else_has_any(
    nproc: int, bench: Bench, everywhere: Path, tmp_path: Path
) -> None:
    """In float64, every row dense; on one rank and on two, an adapter on the head among them."""
    training = lora(bench, tmp_path / "run", student=everywhere, keys={}, grad_accum=2)
    if nproc == 1:
        first_gradients({"found": training}, tmp_path)
    else:
        launch(first_gradients, {"found": training}, tmp_path, nproc=nproc)
    found, sums, _ = torch.load(tmp_path / "found", weights_only=True)
    model = peft.PeftModel.from_pretrained(by_hand.load(bench.student), str(everywhere), is_trainable=True).double()
    truth, right = by_hand.step_gradients(bench, model, first_members(training), LOSS)
    assert sums["loss"] == pytest.approx(float(right.loss.detach()), rel=2e-6)
    assert {name for name, gradient in found.items() if gradient is not None} == {
        f"model.{name.removeprefix('base_model.model.')}" for name in truth
    }
    for name, gradient in truth.items():
        ours = found[f"model.{name.removeprefix('base_model.model.')}"].double()
        assert (ours - gradient).norm() / gradient.norm() < 2e-5, name


@pytest.fixture(scope="module")
def trained(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student trained by adapters, its output."""
    output = tmp_path_factory.mktemp("trained") / "run"
    train(lora(bench, output, keys={"lora_rank": 4, "lora_head": True}), Silent())
    return output


def test_peft_loads_what_is_written_and_gives_its_logits(bench: Bench, trained: Path) -> None:
    ids, base = torch.arange(3, 90)[None], transformers.AutoModelForCausalLM.from_pretrained(bench.student)
    before = base(ids).logits
    found = peft.PeftModel.from_pretrained(base, str(trained))(ids).logits
    torch.testing.assert_close(load_student(trained, torch.float32, CPU)(ids).logits, found, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(found, before, atol=0.1)
    assert all("lora_" in name for name in load_file(trained / "adapter_model.safetensors"))
    assert json.loads((trained / "base.json").read_text()) == {"digest": student_in(bench.student).digest()}
    assert json.loads((trained / "adapter_config.json").read_text())["base_model_name_or_path"] == str(bench.student)


def test_a_merged_export_is_a_model_with_the_logits_of_the_adapter(bench: Bench, trained: Path, tmp_path: Path) -> None:
    keys = {"lora_rank": 4, "lora_head": True}
    metrics = train(lora(bench, tmp_path / "run", keys=keys, export="merged"), Silent())
    assert not (tmp_path / "run" / "adapter_config.json").exists()
    ids, base = torch.arange(3, 90)[None], transformers.AutoModelForCausalLM.from_pretrained(bench.student)
    theirs = peft.PeftModel.from_pretrained(base, str(trained))(ids).logits
    found = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "run")(ids).logits
    torch.testing.assert_close(found, theirs, rtol=1e-5, atol=1e-5)
    record = read_run(trained)
    assert record is not None
    assert record.metrics is not None
    assert metrics["heldout_kl"] == pytest.approx(record.metrics["heldout_kl"], rel=1e-6)


def test_an_adapter_that_is_trained_on_begins_where_it_was(bench: Bench, trained: Path, tmp_path: Path) -> None:
    recorder, record = Recorder(), read_run(trained)
    train(lora(bench, tmp_path / "run", student=trained, keys={}, max_steps=1), recorder)
    assert record is not None
    assert record.metrics is not None
    assert recorder.values("eval", "heldout_kl")[0] == pytest.approx(float(record.metrics["heldout_kl"]), rel=1e-5)
    assert (tmp_path / "run" / "base.json").read_bytes() == (trained / "base.json").read_bytes()
    configs = [json.loads((path / "adapter_config.json").read_text()) for path in (trained, tmp_path / "run")]
    assert configs[0] == configs[1]


def test_a_new_adapter_on_top_of_another_starts_from_both_and_is_merged(
    bench: Bench, trained: Path, tmp_path: Path
) -> None:
    on_top = lora(bench, tmp_path / "run", student=trained, max_steps=1)
    with pytest.raises(ConfigError, match=r"train\.export: an adapter on top of the adapter .* set it to merged"):
        check_training(on_top, 1)
    recorder, record = Recorder(), read_run(trained)
    train(lora(bench, tmp_path / "run", student=trained, max_steps=1, export="merged"), recorder)
    assert record is not None
    assert record.metrics is not None
    assert recorder.values("eval", "heldout_kl")[0] == pytest.approx(float(record.metrics["heldout_kl"]), rel=1e-5)
    assert (tmp_path / "run" / "config.json").exists()


def test_only_the_adapter_has_moments_and_a_place_in_a_checkpoint(bench: Bench, tmp_path: Path) -> None:
    training = lora(bench, tmp_path / "run")
    with joined(CPU) as ranks:
        run = Run(training, find(training), ranks)
        run.trainer.step()
        state = run.trainer.state()
        names = {name.partition(".")[2] for name in state}
        assert names
        assert all(".lora_" in name for name in names)
        assert len(state) == 3 * len(names)
        in_optimizer = {id(p) for group in run.trainer.optimizer.param_groups for p in group["params"]}
        assert in_optimizer == {id(p) for p in run.student.parameters() if p.requires_grad}
        assert len(in_optimizer) == len(names)


@pytest.mark.parametrize("kill", ["step:3", "checkpoint:named#2"])
def test_a_run_that_was_killed_ends_as_one_that_never_stopped(
    kill: str, apart: Apart, bench: Bench, tmp_path: Path
) -> None:
    """Bit for bit, dropout and all."""
    keys = {"lora_rank": 4, "lora_dropout": 0.2}
    trainings = [lora(bench, tmp_path / name, keys=keys, save_every=1, max_steps=4) for name in ("killed", "whole")]
    assert apart(train_until, trainings[0], kill) != 0
    for training in trainings:
        assert apart(train_until, training, "") == 0
    killed, whole = (read_steps(training.output) for training in trainings)
    assert killed == whole
    for name in NAMES:
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_two_ranks_take_the_steps_of_one(dtype: str, bench: Bench, tmp_path: Path) -> None:
    keys = {"lora_rank": 4, "lora_head": True}
    one, two = (lora(bench, tmp_path / name, keys=keys, dtype=dtype) for name in ("one", "two"))
    alone = train_logged(one)
    together = launch(train_logged, two, nproc=2)
    assert alone == pytest.approx(together, rel=1e-5 if dtype == "float32" else 2e-2)
    if dtype == "float32":
        ours, theirs = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "two"))
        for name, value in ours.items():
            torch.testing.assert_close(theirs[name], value, rtol=2e-3, atol=2e-5)


def test_export_is_for_adapters_alone(bench: Bench, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"train\.export: it is for students that are trained by adapters"):
        check_training(lora(bench, tmp_path, keys={}, export="merged"), 1)
