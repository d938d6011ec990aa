"""Training across tokenizers: one rank and two, killed and gone on, measured as eval measures."""

import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from tests.conftest import Apart, Bench
from tests.stages.ranks import Recorder, read_steps, train_and_record, train_until
from tests.stages.train.test_train import training_for

from kdpipe.manifests.aligned import ALIGNED
from kdpipe.manifests.errors import ConfigError
from kdpipe.manifests.progress import Silent
from kdpipe.manifests.run import read_run
from kdpipe.manifests.specs import DataSpec, LossSpec
from kdpipe.pipeline.launch import launch
from kdpipe.stages.evaluate import evaluate_student
from kdpipe.stages.train import train
from kdpipe.stages.train.training import Training, check_training, find


def across(bench: Bench, output: Path, align: str = "auto", **changes: object) -> Training:
    loss = changes.pop("loss", LossSpec(kd_weight=0.5))
    assert isinstance(loss, LossSpec)
    training = training_for(bench, output, loss=loss, **changes)
    return replace(training, data=(bench.data,), align=align, align_floor=0.5)


@pytest.mark.parametrize("align", ["dskd", pytest.param("auto", marks=pytest.mark.slow)])
def test_two_ranks_take_the_same_steps_as_one(align: str, far_bench: Bench, tmp_path: Path) -> None:
    """dskd's projectors lie on both ranks, as the student does."""
    one = train_and_record(across(far_bench, tmp_path / "one", align))
    two = launch(train_and_record, across(far_bench, tmp_path / "two", align), nproc=2)
    for field in ("loss/mean", "grad_norm", "num_tokens"):
        assert two[field] == pytest.approx(one[field], rel=2e-5), field


@pytest.mark.parametrize("align", ["dskd", pytest.param("auto", marks=pytest.mark.slow)])
def test_a_killed_run_goes_on_as_if_nothing_had_happened(
    align: str, far_bench: Bench, apart: Apart, tmp_path: Path
) -> None:
    whole, killed = (
        across(far_bench, tmp_path / name, align, max_steps=6, save_every=2) for name in ("whole", "killed")
    )
    assert apart(train_until, whole, "") == 0
    assert apart(train_until, killed, "step:5") != 0
    assert apart(train_until, killed, "") == 0
    assert read_steps(killed.output) == read_steps(whole.output)
    first, second = ((one.output / "model.safetensors").read_bytes() for one in (whole, killed))
    assert first == second


@pytest.mark.parametrize("align", ["uld", "gold", "xtoken"])
def test_every_method_trains(align: str, far_bench: Bench, tmp_path: Path) -> None:
    recorder = Recorder()
    train(across(far_bench, tmp_path, align, max_steps=2), recorder)
    assert all(math.isfinite(loss) for loss in recorder.values("step", "kd/mean"))
    record = read_run(tmp_path)
    assert record is not None
    assert (record.inputs.align, len(record.inputs.data)) == (align, 64)


def test_a_student_learns_loads_and_scores_what_training_said(far_bench: Bench, tmp_path: Path) -> None:
    recorder = Recorder()
    training = across(far_bench, tmp_path, lr=1e-2, max_steps=30, epochs=20, eval_every=15)
    metrics = train(training, recorder)
    losses = recorder.values("step", "loss/mean")
    assert losses[-1] < 0.8 * losses[0]
    bits = recorder.values("eval", "heldout_bits_per_byte")
    assert bits[-1] < 0.8 * bits[0]
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path).dtype == torch.float32
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert "<|turn|>" in tokenizer.chat_template, "it keeps the template that its samples went through"
    before = set((far_bench.cache / ALIGNED).iterdir())
    scores = evaluate_student(
        tmp_path,
        [far_bench.cache],
        heldout_fraction=None,
        device="cpu",
        dtype="auto",
        batch_tokens=900,
        progress=Silent(),
        data=(far_bench.data,),
    )
    assert scores == pytest.approx({name: metrics[name] for name in scores}, rel=1e-4)
    assert scores["shared_mass"] + scores["unmatched_mass"] == pytest.approx(1.0)
    assert 0 < scores["exact_tokens"] < scores["num_tokens"]
    assert scores["aligned_byte_share"] > 0.9
    assert set((far_bench.cache / ALIGNED).iterdir()) == before, "eval finds what train made"
    assert any("--data" in note and "measure it" in note for note in recorder.notes)


def test_a_student_that_learns_to_stop_is_measured_on_the_samples_that_it_was_trained_on(
    far_bench: Bench, tmp_path: Path
) -> None:
    """Defect: its new stop ids made eval align everything again. Trained once more it asks for the same too."""
    student = Path(shutil.copytree(far_bench.student, tmp_path / "student"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(student)
    tokenizer.eos_token = "</s>"  # nothing but the template ends its answers with <|stop|>
    tokenizer.save_pretrained(student)
    bench = replace(far_bench, student=student, cache=Path(shutil.copytree(far_bench.cache, tmp_path / "cache")))
    shutil.rmtree(bench.cache / ALIGNED, ignore_errors=True)
    for number in range(2):
        output, recorder = tmp_path / f"out-{number}", Recorder()
        train(across(bench, output, max_steps=1), recorder)
        assert any("stops at <|stop|>" in note for note in recorder.notes) == (number == 0)
        (record,) = filter(None, [read_run(output)])
        assert record.added_stops == (tokenizer.convert_tokens_to_ids("<|stop|>"),)
        evaluate_student(
            output,
            [bench.cache],
            heldout_fraction=None,
            device="cpu",
            dtype="auto",
            batch_tokens=900,
            progress=Silent(),
            data=(bench.data,),
        )
        bench = replace(bench, student=output)
    assert len(list((bench.cache / ALIGNED).iterdir())) == 1


def test_what_is_said_before_training_names_the_tokens_that_it_is_over(far_bench: Bench, tmp_path: Path) -> None:
    """Defect: the divergence was said to be over all tokens of the cross-entropy."""
    recorder = Recorder()
    train(across(far_bench, tmp_path, max_steps=1), recorder)
    (exact, _), (num_tokens, _) = (recorder.values("eval", name) for name in ("exact_tokens", "num_tokens"))
    assert exact < num_tokens
    (said,) = (note for note in recorder.notes if note.startswith("before training: held-out KL"))
    assert said.endswith(f", over {int(exact):,} exact tokens")


def test_cross_entropy_alone_is_measured_against_the_teacher_too(far_bench: Bench, tmp_path: Path) -> None:
    metrics = train(across(far_bench, tmp_path, max_steps=2, loss=LossSpec(kd_weight=0.0)), Silent())
    assert {"heldout_kl", "heldout_bits_per_byte", "shared_mass"} <= metrics.keys()


def test_bits_per_byte_are_the_cross_entropy_over_the_text(bench: Bench, tmp_path: Path) -> None:
    """With the teacher's tokenizer too."""
    found = evaluate_student(
        bench.student,
        [bench.cache],
        heldout_fraction=1.0,
        device="cpu",
        dtype="auto",
        batch_tokens=900,
        progress=Silent(),
    )
    from tests.opened import student_in

    from kdpipe.manifests.cache import Cache

    tokenizer = student_in(bench.student).tokenizer
    ids = [view.token_ids[view.supervised] for view in Cache.open(bench.cache)]
    num_bytes = sum(len(tokenizer.decode(each, skip_special_tokens=True).encode()) for each in ids)
    bits = found["heldout_ce"] * found["num_tokens"] / num_bytes / math.log(2)
    assert found["heldout_bits_per_byte"] == pytest.approx(bits)


def test_a_method_for_a_student_of_the_teachers_tokenizer_is_said_to_do_nothing(bench: Bench, tmp_path: Path) -> None:
    training = training_for(bench, tmp_path)
    assert not any("nothing is aligned" in note for note in find(training).notes)
    assert any("student.align=uld" in note for note in find(replace(training, align="uld")).notes)


def test_another_method_or_other_data_are_another_run(far_bench: Bench, tmp_path: Path) -> None:
    train(across(far_bench, tmp_path, max_steps=1), Silent())
    with pytest.raises(ConfigError, match="its align is shared-vocab, this run's is uld"):
        check_training(across(far_bench, tmp_path, "uld", max_steps=1), 1)
    training = across(far_bench, tmp_path, max_steps=1)
    shorter = DataSpec(max_length=100)
    with pytest.raises(ConfigError, match="student of another run: its data is"):
        check_training(replace(training, spec=training.spec.model_copy(update={"data": shorter})), 1)


def test_a_loss_that_the_method_does_not_take_is_refused(far_bench: Bench, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="reverse_kl"):
        check_training(across(far_bench, tmp_path, "uld", loss=LossSpec(divergence="reverse_kl")), 1)
    with pytest.raises(ConfigError, match="tau"):
        check_training(across(far_bench, tmp_path, "chunk", loss=LossSpec(options={"tauu": 3.0})), 1)
