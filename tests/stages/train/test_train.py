"""Training: the same steps on one rank and on two, gradients of the dense reference, a student that loads."""

import dataclasses
import functools
import itertools
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors import safe_open
from tests.caches import fill_shard, grow_plan, make_samples
from tests.chats import write_chats
from tests.conftest import Bench
from tests.models import make_model, make_tokenizer
from tests.opened import student_in
from tests.stages import by_hand
from tests.stages.conftest import STUDENTS
from tests.stages.ranks import (
    Recorder,
    first_gradients,
    train_and_keep_tasks,
    train_and_record,
    train_on_two_caches,
)

from kdpipe.manifests.cache import Cache
from kdpipe.manifests.errors import (
    BusyError,
    CheckFailed,
    ConfigError,
    CorruptError,
    KdpipeError,
    SpaceError,
    StudentError,
    TemporaryError,
)
from kdpipe.manifests.progress import Silent
from kdpipe.manifests.row_source import CacheRows
from kdpipe.manifests.run import read_run
from kdpipe.manifests.running import alone_in
from kdpipe.manifests.shard import Shard
from kdpipe.manifests.specs import DataSpec, LossSpec, RunSpec, TrainSpec
from kdpipe.pipeline.launch import launch
from kdpipe.stages import evaluate
from kdpipe.stages.evaluate import evaluate_student, run_dtype
from kdpipe.stages.extract import ExtractSpec, extract
from kdpipe.stages.feed.batches import PlannedBatches
from kdpipe.stages.feed.dataset import of_caches
from kdpipe.stages.ranks import joined
from kdpipe.stages.train import run, train
from kdpipe.stages.train.training import Training, check_training, find

LOSS = LossSpec(kd_weight=0.5, temperature=1.5)
Truth = tuple[by_hand.Parameters, by_hand.Sums]


def training_for(
    bench: Bench, output: Path, *, student: Path | None = None, loss: LossSpec = LOSS, **changes: object
) -> Training:
    spec = TrainSpec.model_validate({"lr": 1e-3, "batch_tokens": 600, "dtype": "float32", "max_steps": 5} | changes)
    return Training(
        student=student or bench.student,
        caches=(bench.cache,),
        output=output,
        spec=RunSpec(train=spec, loss=loss),
        device="cpu",
    )


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student whose head is its embedding."""
    return make_tokenizer(make_model("qwen2", tmp_path_factory.mktemp("tied") / "student", vocab_size=300, seed=3))


LOSSES = {
    "everything": LossSpec(
        preset="trl", temperature=2.0, kd_weight=0.8, scale_t2=True, label_smoothing=0.1, z_loss=1e-3
    ),
    "sampled": LossSpec(divergence="sampled_kl", options={"samples": 20}),
    "cross-entropy": LossSpec(kd_weight=0.0, label_smoothing=0.2),
}
MATRIX = [
    f"{head}-{accumulate}-{checkpointing}"
    for head in ("tied", "untied")
    for accumulate in (1, 3)
    for checkpointing in ("", "checkpointing")
]


@pytest.fixture(scope="module")
def trainings(
    bench: Bench, families: dict[str, Bench], tied: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Training]:
    """Every head with and without accumulation and activation checkpointing; every kind of loss with all three.

    And every family whose logits are more than a matrix product, teacher and student.
    """
    folder = tmp_path_factory.mktemp("trainings")
    made = {
        name: training_for(bench, folder, student=tied, loss=loss, grad_accum=2, grad_checkpointing=True)
        for name, loss in LOSSES.items()
    }
    for name in MATRIX:
        head, accumulate, checkpointing = name.split("-")
        made[name] = training_for(
            bench,
            folder,
            student=tied if head == "tied" else bench.student,
            grad_accum=int(accumulate),
            grad_checkpointing=bool(checkpointing),
        )
    return made | {kind: training_for(family, folder) for kind, family in families.items()}


@pytest.fixture(scope="module", params=[1, 2])
def gradients(
    request: pytest.FixtureRequest, trainings: dict[str, Training], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The folder with each training's first gradients, made by one rank, and by two."""
    folder = tmp_path_factory.mktemp("gradients")
    if request.param == 1:
        first_gradients(trainings, folder)
    else:
        launch(first_gradients, trainings, folder, nproc=request.param)
    return folder


@pytest.fixture(scope="module")
def truths(bench: Bench, families: dict[str, Bench], trainings: dict[str, Training]) -> Callable[[str], Truth]:
    """Gradients and sums of a training's first step by hand, each made once."""

    @functools.cache
    def truth(name: str) -> Truth:
        training = trainings[name]
        return by_hand.step_gradients(
            families.get(name, bench), by_hand.load(training.student), first_members(training), training.spec.loss
        )

    return truth


def first_members(training: Training) -> list[int]:
    """The samples of the first step, the longest first: as one rank packs them."""
    rows = of_caches([Cache.open(training.caches[0])])
    members = PlannedBatches(rows, rows.split(None)[0], seed=0, batch_tokens=600).samples(0)
    return sorted(members.tolist(), key=lambda member: -rows.num_tokens[member])


@pytest.mark.parametrize("name", [*LOSSES, *MATRIX, *STUDENTS])
def test_one_steps_gradients_equal_those_by_hand(
    name: str, gradients: Path, truths: Callable[[str], Truth], trainings: dict[str, Training]
) -> None:
    """Gradients and loss of the first step on one rank and on two against transformers' own logits in float64."""
    ours, sums, _ = torch.load(gradients / name, weights_only=True)
    truth, right = truths(name)
    assert sums["loss"] == pytest.approx(float(right.loss.detach()), rel=2e-6)
    for term in ("ce", "z", "kd") if trainings[name].spec.loss.kd_weight else ("ce", "z"):
        assert sums[term] == pytest.approx(getattr(right, term), rel=5e-6), term
    assert {parameter.removeprefix("model.") for parameter in ours} == truth.keys()
    for parameter, gradient in truth.items():
        error = (ours["model." + parameter].double() - gradient).norm() / gradient.norm()
        assert error < 2e-5, parameter


@pytest.mark.parametrize("name", ["untied-1-", "untied-3-checkpointing", *STUDENTS])
def test_an_evaluation_in_training_equals_that_by_hand(
    name: str, gradients: Path, bench: Bench, families: dict[str, Bench]
) -> None:
    """Before the first step, on one rank and on two."""
    _, _, scores = torch.load(gradients / name, weights_only=True)
    some = families.get(name, bench)
    truth = by_hand.scores(some, Cache.open(some.cache).heldout().nonzero()[0])
    assert scores == pytest.approx(truth, rel=2e-5)


@pytest.mark.parametrize("name", ["tied-1-", "gemma2"])
def test_a_step_tells_entropy_agreement_and_mass(
    name: str, truths: Callable[[str], Truth], trainings: dict[str, Training], tmp_path: Path
) -> None:
    """Of every token the first, of every 16th the other two."""
    recorder = Recorder()
    train(dataclasses.replace(trainings[name], output=tmp_path), recorder)
    _, right = truths(name)
    assert recorder.values("step", "loss/mean")[0] == pytest.approx(
        float(right.loss.detach()) / right.num_tokens, rel=2e-6
    )
    for term in ("kd", "ce", "z"):
        assert recorder.values("step", f"{term}/mean")[0] == pytest.approx(
            getattr(right, term) / right.num_tokens, rel=5e-6
        )
    for field, rows in (
        ("teacher_entropy/mean", right.teacher_entropy),
        ("top1_agreement", right.top1_agree[::16]),
        ("top_k_mass", right.top_k_mass[::16]),
    ):
        assert recorder.values("step", field)[0] == pytest.approx(float(rows.mean()), rel=1e-5), field


def test_micro_batches_of_bfloat16_are_summed_in_float32(bench: Bench, tmp_path: Path) -> None:
    """A sum that is kept in bfloat16 loses what it adds; one in float32 has numbers that bfloat16 has not."""
    training = training_for(bench, tmp_path, dtype="bfloat16", grad_accum=3)
    first_gradients({"sum": training}, tmp_path)
    found, _, _ = torch.load(tmp_path / "sum", weights_only=True)
    for name, gradient in found.items():
        assert not torch.equal(gradient, gradient.bfloat16().float()), name


def test_a_sampled_loss_draws_anew_in_every_step(bench: Bench, tmp_path: Path) -> None:
    """The same samples in every step, weights that hardly move: only the draws differ."""
    values = {}
    for divergence in ("sampled_kl", "forward_kl"):
        recorder = Recorder()
        loss = LossSpec(divergence=divergence)
        train(training_for(bench, tmp_path / divergence, loss=loss, lr=1e-12, batch_tokens=99999, epochs=3), recorder)
        values[divergence] = recorder.values("step", "kd/mean")
    assert values["forward_kl"] == pytest.approx([values["forward_kl"][0]] * 3, rel=1e-5)
    assert len({round(value, 5) for value in values["sampled_kl"]}) == 3
    assert values["sampled_kl"] == pytest.approx(values["forward_kl"], rel=0.05)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_two_ranks_take_the_same_steps_as_one(dtype: str, bench: Bench, tmp_path: Path) -> None:
    one = train_and_record(training_for(bench, tmp_path / "one", dtype=dtype))
    two = launch(train_and_record, training_for(bench, tmp_path / "two", dtype=dtype), nproc=2)
    # float32: summation in another order. bfloat16: gradients are sums of other groups, rounded once each.
    allowed = {"float32": 2e-6, "bfloat16": 5e-3}[dtype]
    assert len(one["loss/mean"]) == 5
    assert two["num_tokens"] == one["num_tokens"]
    assert (one["num_seeds"], two["num_seeds"]) == ([5], [10]), "a rank drops what another drops"
    assert two["loss/mean"] == pytest.approx(one["loss/mean"], rel=allowed)
    assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=20 * allowed)


def test_rank_without_samples_changes_no_loss(bench: Bench, tmp_path: Path) -> None:
    """Steps of one sample: one of two ranks has nothing to do, the other's gradient must arrive whole."""
    one = train_and_record(training_for(bench, tmp_path / "one", batch_tokens=30))
    two = launch(train_and_record, training_for(bench, tmp_path / "two", batch_tokens=30), nproc=2)
    assert two["num_tokens"] == one["num_tokens"]
    assert two["loss/mean"] == pytest.approx(one["loss/mean"], rel=2e-6)


def test_ranks_that_found_other_samples_stop_before_the_first_step(bench: Bench, tmp_path: Path) -> None:
    """A cache grew between the looks of two ranks."""
    cache = tmp_path / "cache"
    shutil.copytree(bench.cache, cache)
    grow_plan(cache, make_samples(3, vocab_size=300))
    fill_shard(cache, len(Cache.open(cache).plan.shards) - 1)
    with pytest.raises(TemporaryError, match="run it again"):
        launch(train_on_two_caches, training_for(bench, tmp_path / "out"), cache, nproc=2)
    assert not (tmp_path / "out" / "run.json").exists()


def test_tied_student_is_exported_in_its_own_precision_with_one_head(bench: Bench, tied: Path, tmp_path: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(tied, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "student")
    make_tokenizer(tmp_path / "student")
    train(training_for(bench, tmp_path / "out", student=tmp_path / "student"), Silent())
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert "lm_head.weight" not in file.keys()  # noqa: SIM118 - not a dict
        assert file.get_slice("model.norm.weight").get_dtype() == "BF16"
    trained = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert trained.dtype == torch.bfloat16
    assert not torch.equal(trained.model.embed_tokens.weight, model.model.embed_tokens.weight)


def test_accumulation_changes_no_loss(bench: Bench, tmp_path: Path) -> None:
    whole = train_and_record(training_for(bench, tmp_path / "whole"))
    parts = train_and_record(training_for(bench, tmp_path / "parts", grad_accum=4))
    assert parts["loss/mean"] == pytest.approx(whole["loss/mean"], rel=2e-6)


def test_running_twice_gives_the_same_weights_bit_for_bit(bench: Bench, tmp_path: Path) -> None:
    for name in ("first", "second"):
        train(training_for(bench, tmp_path / name), Silent())
    first, second = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("first", "second"))
    assert first == second


def test_student_learns_loads_and_scores_what_training_said(bench: Bench, tmp_path: Path) -> None:
    recorder = Recorder()
    training = training_for(bench, tmp_path, lr=1e-2, max_steps=40, eval_every=10, epochs=20, loss=LossSpec())
    metrics = train(training, recorder)
    losses = recorder.values("step", "loss/mean")
    assert losses[-1] < 0.5 * losses[0]
    assert recorder.values("eval", "step") == [0, 10, 20, 30, 40]
    assert {fields["dtype"] for kind, fields in recorder.events if kind == "eval"} == {"float32"}
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert model.dtype == torch.float32
    assert transformers.AutoTokenizer.from_pretrained(tmp_path).get_vocab()
    scores = evaluate_student(
        tmp_path, [bench.cache], heldout_fraction=None, device="cpu", dtype="auto", batch_tokens=900, progress=Silent()
    )
    assert scores == pytest.approx({name: metrics[name] for name in scores}, rel=1e-5)
    assert json.loads((tmp_path / "kdpipe.json").read_text())["num_steps"] == 40


def test_a_student_that_is_not_finite_is_refused_by_eval_and_train(bench: Bench, tmp_path: Path) -> None:
    broken = make_tokenizer(make_model("llama", tmp_path / "broken", vocab_size=320))
    model = transformers.AutoModelForCausalLM.from_pretrained(broken)
    model.model.norm.weight.data[0] = float("nan")
    model.save_pretrained(broken)
    with pytest.raises(StudentError, match="not finite"):
        evaluate_student(
            broken,
            [bench.cache],
            heldout_fraction=None,
            device="cpu",
            dtype="auto",
            batch_tokens=900,
            progress=Silent(),
        )
    with pytest.raises(StudentError, match="not finite"):
        train(training_for(bench, tmp_path / "out", student=broken), Silent())
    assert not (tmp_path / "out").exists()


def test_damaged_samples_table_is_found_before_training(bench: Bench, tmp_path: Path) -> None:
    shutil.copytree(bench.cache, tmp_path / "cache")
    table = tmp_path / "cache" / "samples.arrow"
    data = bytearray(table.read_bytes())
    data[len(data) // 2] ^= 1
    table.write_bytes(data)
    with pytest.raises(CorruptError, match=r"samples\.arrow"):
        check_training(dataclasses.replace(training_for(bench, tmp_path / "out"), caches=(tmp_path / "cache",)), 1)


def test_the_last_figures_are_those_of_eval_whatever_the_dtype_of_training(bench: Bench, tmp_path: Path) -> None:
    """Trained in bfloat16, stored in float32: what counts is the student that was written."""
    metrics = train(training_for(bench, tmp_path, dtype="bfloat16"), Silent())
    scores = evaluate_student(
        tmp_path, [bench.cache], heldout_fraction=None, device="cpu", dtype="auto", batch_tokens=600, progress=Silent()
    )
    assert {name: metrics[name] for name in scores} == scores
    assert metrics["dtype"] == run_dtype(student_in(tmp_path), "auto") == "float32"
    assert json.loads((tmp_path / "kdpipe.json").read_text())["metrics"] == scores | {"dtype": "float32"}
    assert list(train(training_for(bench, tmp_path, dtype="bfloat16"), Silent())) == list(metrics), "in another order"


def failing_once(monkeypatch: pytest.MonkeyPatch, module: object, name: str, error: Exception) -> None:
    """The function of a module raises once."""
    own, raised = getattr(module, name), []

    def fail(*args: object, **options: object) -> object:
        if not raised:
            raised.append(error)
            raise error
        return own(*args, **options)

    monkeypatch.setattr(module, name, fail)


def test_a_last_evaluation_that_fails_loses_nothing_and_is_all_that_is_done_again(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(training_for(bench, tmp_path / "whole"), Silent())
    training = training_for(bench, tmp_path / "out")
    failing_once(monkeypatch, evaluate, "score", CorruptError("a held-out row"))
    with pytest.raises(CorruptError, match="a held-out row"):
        train(training, Silent())
    student = (training.output / "model.safetensors").read_bytes()
    assert transformers.AutoModelForCausalLM.from_pretrained(training.output).config.vocab_size == 320
    check_training(training, 1)
    recorder = Recorder()
    assert train(training, recorder) == whole
    assert recorder.values("step", "step") == []
    assert [task for task, _, _ in recorder.tasks] == ["eval"]
    assert (training.output / "model.safetensors").read_bytes() == student
    assert sorted(path.name for path in training.output.iterdir()) == sorted(
        path.name for path in (tmp_path / "whole").iterdir()
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_during_the_last_evaluation_is_heard_and_the_student_is_there(
    number: signal.Signals, bench: Bench, tmp_path: Path
) -> None:
    class Sender(Recorder):
        def advance(self, amount: int, detail: str = "") -> None:
            super().advance(amount, detail)
            if self.tasks[-1][0] == "eval" and 0 < amount == self.tasks[-1][2]:  # after the first batch
                os.kill(os.getpid(), number)

    training, sender = training_for(bench, tmp_path, max_steps=3, save_every=2, batch_tokens=100), Sender()
    with pytest.raises(KdpipeError, match=f"stopped by {number.name}; the student is written") as caught:
        train(training, sender)
    assert caught.value.exit_code == (130 if number == signal.SIGINT else 75)
    _, total, done = sender.tasks[-1]
    assert total is not None
    assert done < total, "it went on to the end"
    recorder = Recorder()
    train(training, recorder)
    assert (recorder.values("step", "step"), recorder.values("eval", "step")) == ([], [3])


def test_an_export_that_fails_keeps_the_last_steps_state(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(training_for(bench, tmp_path / "whole"), Silent())
    training = training_for(bench, tmp_path / "out")
    failing_once(monkeypatch, run, "export", OSError(28, "No space left on device"))
    with pytest.raises(SpaceError, match="no space left"):
        train(training, Silent())
    check_training(training, 1)
    recorder = Recorder()
    train(training, recorder)
    assert recorder.values("step", "step") == []
    first, second = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "out"))
    assert first == second


def test_a_run_in_an_output_where_another_is_at_work_is_refused_before_anything(bench: Bench, tmp_path: Path) -> None:
    training = training_for(bench, tmp_path)
    with alone_in(tmp_path):
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(BusyError, match=f"pid {os.getpid()} on "):
            check_training(training, 1)
        with pytest.raises(BusyError, match=f"pid {os.getpid()} on "):
            train(training, Silent())
        assert sorted(tmp_path.rglob("*")) == before
    train(training, Silent())
    assert not (tmp_path / ".running").exists()


def test_ranks_of_other_machines_need_no_gpu_of_this_one(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torchrun on two machines of eight GPUs."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    training = dataclasses.replace(training_for(bench, tmp_path), device="cuda")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    check_training(training, 16)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "9")
    with pytest.raises(ConfigError, match="9 ranks for 8 GPUs"):
        check_training(training, 18)


def test_caches_that_hold_out_other_shares_are_split_by_one(bench: Bench, tmp_path: Path) -> None:
    for share in (0.5, 0.05):
        spec = DataSpec(max_length=128, heldout_fraction=share)
        data = write_chats(tmp_path / f"{share}.jsonl", 60, seed=int(100 * share))
        extract(ExtractSpec(teacher=bench.teacher, data=(data,), data_spec=spec), tmp_path / f"{share}", Silent())
    recorder = Recorder()
    training = training_for(bench, tmp_path / "out", max_steps=1)
    train(dataclasses.replace(training, caches=(tmp_path / "0.05", tmp_path / "0.5")), recorder)
    record = read_run(training.output)
    assert record is not None
    assert record.inputs.heldout_fraction == record.inputs.spec.data.heldout_fraction == 0.5
    assert any("hold out 0.05 and 0.5" in note for note in recorder.notes)
    notes = {}
    for share in (None, 0.6):
        told = Recorder()
        evaluate_student(
            training.output,
            [tmp_path / "0.05"],
            heldout_fraction=share,
            device="cpu",
            dtype="auto",
            batch_tokens=900,
            progress=told,
        )
        notes[share] = told.notes
    assert notes[None] == []
    assert notes[0.6] == ["this student held out 0.5 of its samples, 0.6 are measured: it was trained on some of them"]


def test_nothing_held_out_is_not_measured_and_said_once(bench: Bench, tmp_path: Path) -> None:
    training = training_for(bench, tmp_path, eval_every=1, max_steps=3)
    spec = training.spec.model_copy(update={"data": DataSpec(heldout_fraction=0)})
    recorder = Recorder()
    metrics = train(dataclasses.replace(training, spec=spec), recorder)
    assert recorder.values("eval", "step") == []
    assert sum("no sample is held out" in note for note in recorder.notes) == 1
    assert metrics == {"num_steps": 3, "trained_tokens": metrics["trained_tokens"]}


def test_a_finished_run_is_the_same_under_other_elastic_keys(bench: Bench, tmp_path: Path) -> None:
    first = train(training_for(bench, tmp_path, max_steps=2), Silent())
    changed = {"eval_every": 1, "keep": 5, "save_every": 7, "save_minutes": 0, "grad_accum": 2}
    lying = {"grad_checkpointing": True, "fsdp": {"shard_size": 1, "optimizer_on_cpu": True, "compile": True}}
    other = training_for(bench, tmp_path, max_steps=2, **changed, **lying)
    check_training(other, 1)
    assert train(other, Silent()) == first


def test_cross_entropy_alone_reads_no_teacher_row(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Shard, "rows", lambda *_: pytest.fail("a row was read"))
    training = training_for(bench, tmp_path, loss=LossSpec(kd_weight=0.0), max_steps=2)
    spec = training.spec.model_copy(update={"data": DataSpec(heldout_fraction=0)})
    assert train(dataclasses.replace(training, spec=spec), Silent())["num_steps"] == 2


def test_the_next_steps_rows_are_wanted_before_this_step_is_packed(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[tuple[str, int]] = []
    want, rows = CacheRows.want, CacheRows.rows
    monkeypatch.setattr(
        CacheRows, "want", lambda self, some: (order.extend(("want", one) for one in some), want(self, some))[1]
    )
    monkeypatch.setattr(CacheRows, "rows", lambda self, one: (order.append(("read", one)), rows(self, one))[1])
    training = training_for(bench, tmp_path, max_steps=3)
    spec = training.spec.model_copy(update={"data": DataSpec(heldout_fraction=0)})
    train(dataclasses.replace(training, spec=spec), Silent())
    kinds = [kind for kind, _ in itertools.groupby(name for name, _ in order)]
    # wanted 0, 1; packed 0; wanted 2; packed 1; packed 2: nothing beyond the last
    assert kinds == ["want", "read", "want", "read"]
    wanted, packed = ([one for name, one in order if name == each] for each in ("want", "read"))
    assert sorted(wanted) == sorted(packed)


def test_the_first_steps_rows_are_wanted_before_the_student_is_measured(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[list[int] | str] = []
    want, measure = CacheRows.want, run.Run.evaluate_now
    monkeypatch.setattr(CacheRows, "want", lambda self, some: (order.append(some.tolist()), want(self, some))[1])
    monkeypatch.setattr(run.Run, "evaluate_now", lambda *given: (order.append("measured"), measure(*given))[1])
    with joined(torch.device("cpu")) as ranks:
        training = training_for(bench, tmp_path, max_steps=2)
        one = run.Run(training, find(training), ranks)
        one.steps(Silent())
    assert sorted(order[0]) == sorted(one.batches.samples(0).tolist())
    assert order[1] == "measured"
    assert sum(sorted(each) == sorted(order[0]) for each in order) == 1


def test_the_record_has_the_data_settings_of_the_cache(bench: Bench, tmp_path: Path) -> None:
    train(training_for(bench, tmp_path, max_steps=1), Silent())
    record = read_run(tmp_path)
    assert record is not None
    assert (record.inputs.spec.data.max_length, record.inputs.spec.data.heldout_fraction) == (128, 0.25)
    asked = training_for(bench, tmp_path, max_steps=1)
    asked = dataclasses.replace(asked, spec=asked.spec.model_copy(update={"data": DataSpec(max_length=128)}))
    check_training(asked, 1)


def test_another_tokenizer_is_another_run(bench: Bench, tmp_path: Path) -> None:
    student = tmp_path / "student"
    shutil.copytree(bench.student, student)
    training = training_for(bench, tmp_path / "out", student=student, max_steps=1)
    train(training, Silent())
    config = json.loads((student / "tokenizer_config.json").read_text())
    (student / "tokenizer_config.json").write_text(json.dumps(config | {"model_max_length": 77}))
    with pytest.raises(ConfigError, match="student of another run: its tokenizer is"):
        check_training(training, 1)


@pytest.mark.parametrize("nproc", [1, 2])
def test_what_is_done_is_what_was_announced(nproc: int, bench: Bench, tmp_path: Path) -> None:
    """Tokens of all ranks, in part of an epoch and over its end."""
    training = training_for(bench, tmp_path, max_steps=7, epochs=9, batch_tokens=900)
    tasks = train_and_keep_tasks(training) if nproc == 1 else launch(train_and_keep_tasks, training, nproc=nproc)
    assert [task for task, _, _ in tasks] == ["train", "eval"]
    assert all(done == total > 0 for _, total, done in tasks), tasks


def test_a_run_says_what_may_not_be_meant_and_where_the_student_is(bench: Bench, tmp_path: Path) -> None:
    notes = {}
    for batch_tokens in (10**9, 600, 20):
        recorder = Recorder()
        training = training_for(bench, tmp_path / f"out {batch_tokens}", batch_tokens=batch_tokens, max_steps=1)
        train(training, recorder)
        notes[batch_tokens] = "\n".join(recorder.notes)
        assert f"kdpipe eval --student '{training.output}' --cache {bench.cache}" in notes[batch_tokens]
        assert "before training: held-out KL" in notes[batch_tokens]
        assert recorder.values("eval", "step") == [0, 1]
    assert "an epoch is 1 step of about" in notes[10**9]
    assert "less than most samples have" in notes[20]
    assert "an epoch is" not in notes[20]


def test_finished_run_is_not_run_again(bench: Bench, tmp_path: Path) -> None:
    first = train(training_for(bench, tmp_path), Silent())
    before = (tmp_path / "model.safetensors").stat().st_mtime_ns
    assert train(training_for(bench, tmp_path), Silent()) == first
    assert (tmp_path / "model.safetensors").stat().st_mtime_ns == before


def test_output_of_another_run_is_not_overwritten(bench: Bench, tmp_path: Path) -> None:
    train(training_for(bench, tmp_path), Silent())
    with pytest.raises(
        ConfigError, match=r"student of another run: its spec\.train\.lr is 0\.001, this run's is 0\.002"
    ):
        check_training(training_for(bench, tmp_path, lr=2e-3), 1)


@pytest.mark.parametrize("what", ["cache", "teacher"])
def test_output_that_holds_something_else_is_refused(what: str, bench: Bench) -> None:
    with pytest.raises(ConfigError, match=r"it holds other things \("):
        check_training(training_for(bench, getattr(bench, what)), 1)


def of_others(output: Path, kind: str) -> None:
    elsewhere = output.parent / "elsewhere"
    (elsewhere / ".unfinished").mkdir(parents=True)
    (elsewhere / ".unfinished" / "precious").write_text("a note")
    output.mkdir()
    if kind == "folder":
        shutil.copytree(elsewhere, output / "tmp")
    elif kind == "linked folder":
        (output / "checkpoints").symlink_to(elsewhere)
    elif kind == "file for a folder":
        (output / "checkpoints").write_text("a note")
    elif kind == "pipe":
        os.mkfifo(output / "events.jsonl")
    elif kind == "below a file":
        output.rmdir()
        output.write_text("a note")


@pytest.mark.parametrize("kind", ["folder", "linked folder", "file for a folder", "pipe", "below a file"])
def test_what_others_keep_in_an_output_is_refused_and_left_alone(kind: str, bench: Bench, tmp_path: Path) -> None:
    output = tmp_path / "out"
    of_others(output, kind)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ConfigError, match=r"holds other things|not a folder"):
        check_training(training_for(bench, output / "below" if kind == "below a file" else output), 1)
    assert sorted(tmp_path.rglob("*")) == before


def test_what_others_keep_beside_checkpoints_outlives_them(bench: Bench, tmp_path: Path) -> None:
    mine = tmp_path / "checkpoints" / "mine"
    mine.mkdir(parents=True)
    (mine / "notes.txt").write_text("a note")
    training = training_for(bench, tmp_path, save_every=2)
    check_training(training, 1)
    train(training, Silent())
    check_training(training, 1)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["mine"]
    assert (mine / "notes.txt").exists()


@pytest.mark.parametrize("damage", ["gone", "cut", "flipped"])
def test_a_finished_student_that_is_not_what_was_written_is_not_called_finished(
    damage: str, bench: Bench, tmp_path: Path
) -> None:
    training = training_for(bench, tmp_path)
    train(training, Silent())
    path = tmp_path / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-5000] ^= 1
    path.unlink()
    if damage != "gone":
        path.write_bytes(data if damage == "flipped" else data[:-1])
    for look in (lambda: check_training(training, 1), lambda: train(training, Silent())):
        with pytest.raises(CorruptError, match=r"model\.safetensors .*run the same command again"):
            look()


def test_output_of_an_interrupted_run_is_taken_again(bench: Bench, tmp_path: Path) -> None:
    (tmp_path / "events.jsonl").write_text("{}\n")
    check_training(training_for(bench, tmp_path), 1)


def test_more_ranks_than_training_samples_is_refused(bench: Bench, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="1000 ranks for"):
        check_training(training_for(bench, tmp_path), 1000)


def test_holding_everything_out_is_refused_by_its_name(bench: Bench, tmp_path: Path) -> None:
    training = dataclasses.replace(training_for(bench, tmp_path), spec=RunSpec(data=DataSpec(heldout_fraction=1.0)))
    with pytest.raises(ConfigError, match=r"lower data\.heldout_fraction"):
        check_training(training, 1)


def test_output_that_cannot_be_made_is_one_line(bench: Bench) -> None:
    with pytest.raises(KdpipeError, match="/proc/nowhere"):
        train(training_for(bench, Path("/proc/nowhere/out")), Silent())


def test_run_file_that_contradicts_the_cache_is_refused(bench: Bench, tmp_path: Path) -> None:
    training = dataclasses.replace(training_for(bench, tmp_path), spec=RunSpec(data=DataSpec(max_length=64)))
    with pytest.raises(ConfigError, match=r"data.max_length is 64, the cache was extracted with 128"):
        check_training(training, 1)


def test_a_run_files_keys_of_extraction_alone_are_no_contradiction(bench: Bench, tmp_path: Path) -> None:
    data = DataSpec(bad_records="skip", max_bad=0.5, strict=True, max_length=128)
    check_training(dataclasses.replace(training_for(bench, tmp_path), spec=RunSpec(data=data)), 1)


def test_gradient_that_is_not_finite_stops_the_run_and_exports_nothing(bench: Bench, tmp_path: Path) -> None:
    """A learning rate that no weight survives: the second step finds nothing finite."""
    with pytest.raises(CheckFailed, match="not finite"):
        train(training_for(bench, tmp_path, lr=1e30, warmup_ratio=0.0, max_grad_norm=0.0), Silent())
    assert not (tmp_path / "model.safetensors").exists()
