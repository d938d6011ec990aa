"""Training by adapters: only they have gradients, moments and a checkpoint; what is written is what was trained."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from tests.conftest import Apart, Bench
from tests.models import make_adapter, make_model, make_tokenizer
from tests.opened import load_student, student_in
from tests.stages import by_hand
from tests.stages.ranks import Recorder, first_gradients, read_steps, train_logged, train_until

from kdpipe.manifests.cache import Cache
from kdpipe.manifests.errors import CheckFailed, ConfigError
from kdpipe.manifests.progress import Silent
from kdpipe.manifests.run import read_run
from kdpipe.manifests.specs import LossSpec, RunSpec, StudentSpec, TrainSpec
from kdpipe.pipeline.launch import launch
from kdpipe.stages.feed.batches import PlannedBatches
from kdpipe.stages.feed.dataset import of_caches
from kdpipe.stages.models import adapter
from kdpipe.stages.models.adapter import own_weights, widened
from kdpipe.stages.ranks import joined
from kdpipe.stages.student import Student
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


def test_an_engine_beside_the_student_is_given_merged_weights(bench: Bench, everywhere: Path, tmp_path: Path) -> None:
    """By the names of the base, as SGLang loads them; the student's own scores are theirs."""
    training = lora(bench, tmp_path / "run", student=everywhere, keys={})
    with joined(CPU) as ranks:
        run = Run(training, find(training), ranks)
        found = dict(run.student.weights(torch.float32, keep=True))
        ours = run.student.logprobs(np.arange(3, 60, dtype=np.int32))
    right = load_student(everywhere, torch.float32, CPU)
    assert found.keys() == dict(right.named_parameters()).keys()
    for name, weight in right.named_parameters():
        torch.testing.assert_close(found[name], weight.detach(), rtol=1e-5, atol=1e-6)
    theirs = Student(right).logprobs(np.arange(3, 60, dtype=np.int32))
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
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


@pytest.fixture(scope="module", params=[(64, 128), (48, 80)], ids=str)
def wide(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student whose layers are as wide as some of bitsandbytes' blocks of 64, and one whose layers are not."""
    sizes = dict(zip(("hidden_size", "intermediate_size"), request.param, strict=True))
    folder = tmp_path_factory.mktemp("wide")
    return make_tokenizer(make_model("llama", folder, vocab_size=320, seed=1, sizes=sizes))


def test_over_4_bits_the_gradients_are_those_over_the_weights_that_these_stand_for(
    bench: Bench, wide: Path, tmp_path: Path
) -> None:
    pytest.importorskip("bitsandbytes")
    model = student_in(wide).load_in_4_bits(torch.float32, torch.float32, CPU)
    plain = load_student(wide, torch.float32, CPU)
    with torch.no_grad():
        for name, weight, _ in own_weights(model):
            plain.get_parameter(name).copy_(widened(weight))
    rounded = [
        name
        for name, weight in load_student(wide, torch.float32, CPU).named_parameters()
        if not torch.equal(weight, plain.get_parameter(name))
    ]
    assert len(rounded) == 2 * 7
    other = make_tokenizer(tmp_path / "other")
    plain.save_pretrained(other)
    ours, theirs = (make_adapter(folder, tmp_path / f"on_{folder.name}") for folder in (wide, other))
    bits = {"lora_base_bits": 4}
    trainings = {
        "bits": lora(bench, tmp_path / "run", student=ours, keys=bits, grad_checkpointing=True),
        "plain": lora(bench, tmp_path / "run", student=theirs, keys={}),
    }
    first_gradients(trainings, tmp_path)
    (found, bits_sums, _), (whole, sums, _) = (torch.load(tmp_path / name, weights_only=True) for name in trainings)
    assert bits_sums["loss"] == pytest.approx(sums["loss"], rel=1e-5)
    for name, gradient in whole.items():
        if gradient is not None:
            assert (found[name] - gradient).norm() / gradient.norm() < 1e-4, name


def test_over_4_bits_a_merged_export_has_the_logits_of_what_was_trained(
    bench: Bench, wide: Path, tmp_path: Path
) -> None:
    """Out of the 4 bits; measured before the export and after it."""
    pytest.importorskip("bitsandbytes")
    recorder = Recorder()
    training = lora(
        bench,
        tmp_path / "run",
        student=wide,
        keys={"lora_rank": 4, "lora_base_bits": 4},
        export="merged",
        eval_every=1,
        max_steps=2,
        lr=1e-9,
    )
    metrics = train(training, recorder)
    assert metrics["heldout_kl"] == pytest.approx(recorder.values("eval", "heldout_kl")[0], rel=1e-4)
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert "quantization_config" not in config


def test_a_merged_student_that_says_other_things_than_the_trained_one_is_refused(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adapter, "product", lambda layer, down, up: torch.zeros(len(up), down.shape[1]))
    with pytest.raises(CheckFailed, match=r"with its adapter merged in is .* nats from the one that was trained"):
        train(lora(bench, tmp_path / "run", export="merged", save_every=0), Silent())
    assert not (tmp_path / "run" / "kdpipe.json").exists()


def test_the_base_teaches_by_switching_the_adapter_off(bench: Bench, everywhere: Path, tmp_path: Path) -> None:
    """Against the base's own logits in float64; on data alone, with no rows and no second model."""
    training = dataclasses.replace(
        lora(bench, tmp_path / "run", student=everywhere, keys={"lora_teacher": True}, batch_tokens=600),
        caches=(),
        data=(bench.data,),
    )
    recorder = Recorder()
    train(training, recorder)
    prepared = recorder.values("step", "kd/mean")
    assert prepared[0] > 0.01
    table = find(dataclasses.replace(training, output=tmp_path / "again")).dataset
    members = PlannedBatches(table, table.split(0.05)[0], seed=0, batch_tokens=600).samples(0)
    base = by_hand.load(bench.student)
    student = peft.PeftModel.from_pretrained(by_hand.load(bench.student), str(everywhere)).double()
    total, count = 0.0, 0
    for member in members.tolist():
        text = table.tokens(member)
        ids = torch.tensor(text.token_ids, dtype=torch.int64)
        at = torch.nonzero(torch.tensor(text.supervised)[1:])[:, 0]
        with torch.no_grad():
            t, s = (model(ids[None]).logits[0, at, :300].div(1.5).log_softmax(-1) for model in (base, student))
        total, count = total + float((t.exp() * (t - s)).sum()), count + len(at)
    assert prepared[0] == pytest.approx(total / count, rel=1e-5)


@pytest.mark.parametrize(
    ("keys", "data", "words"),
    [
        ({"lora_teacher": True}, True, r"student\.lora_teacher: its base is what an adapter is put on"),
        (
            {"lora_teacher": True, "lora_rank": 4},
            False,
            r"student\.lora_teacher: the rows of another teacher are given",
        ),
    ],
)
def test_a_base_that_cannot_be_the_teacher_is_refused(
    keys: dict[str, Any], data: bool, words: str, bench: Bench, tmp_path: Path
) -> None:
    training = lora(bench, tmp_path / "run", keys=keys)
    if data:
        training = dataclasses.replace(training, caches=(), data=(bench.data,))
    with pytest.raises(ConfigError, match=words):
        check_training(training, 1)


def test_export_is_for_adapters_alone(bench: Bench, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"train\.export: it is for students that are trained by adapters"):
        check_training(lora(bench, tmp_path, keys={}, export="merged"), 1)
