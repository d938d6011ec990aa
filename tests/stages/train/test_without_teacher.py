"""Training without a teacher: cross-entropy on data that nobody made rows for, as from a cache in all else."""

import dataclasses
import json
import shutil
import signal
from pathlib import Path

import pytest
import torch
import transformers
from tests.chats import write_chats
from tests.conftest import Apart, Bench
from tests.models import make_model, make_tokenizer
from tests.stages.ranks import Recorder, read_steps, train_and_record, train_until

from kdpipe.manifests.cache import Cache
from kdpipe.manifests.errors import ConfigError, DataError, StudentError, TemporaryError
from kdpipe.manifests.progress import Silent
from kdpipe.manifests.run import read_run
from kdpipe.manifests.running import alone_in
from kdpipe.manifests.specs import DataSpec, LossSpec, RunSpec, TrainSpec
from kdpipe.pipeline.launch import launch
from kdpipe.stages.evaluate import evaluate_student
from kdpipe.stages.feed.batches import PlannedBatches
from kdpipe.stages.train import samples, samples_beside, train
from kdpipe.stages.train.samples import samples_folder
from kdpipe.stages.train.schedule import learning_rate
from kdpipe.stages.train.training import Training, check_training, find

pytestmark = pytest.mark.usefixtures("one_thread")
STEPS = 6
ALONE = LossSpec(kd_weight=0.0)


def training_for(bench: Bench, output: Path, *, loss: LossSpec = ALONE, **changes: object) -> Training:
    """On the data of the bench, as its cache was made."""
    spec = TrainSpec.model_validate(
        {"lr": 1e-2, "batch_tokens": 600, "dtype": "float32", "max_steps": STEPS, "save_every": 2} | changes
    )
    return Training(
        student=bench.student,
        caches=(),
        data=(bench.data,),
        output=output,
        spec=RunSpec(data=DataSpec(max_length=128, heldout_fraction=0.25), loss=loss, train=spec),
        device="cpu",
        workers=1,
    )


def of_the_cache(training: Training, bench: Bench, output: Path) -> Training:
    """The same training from a cache of a teacher with the same tokenizer."""
    return dataclasses.replace(training, caches=(bench.cache,), data=(), output=output)


def weights(output: Path) -> bytes:
    return (output / "model.safetensors").read_bytes()


def make_mamba(folder: Path) -> Path:
    """A student whose batches are padded."""
    config = transformers.MambaConfig(hidden_size=32, num_hidden_layers=2, state_size=8, vocab_size=320)
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return make_tokenizer(folder)


@pytest.mark.parametrize("way", ["packed", "accumulated", "padded", "smoothed"])
def test_the_student_of_data_is_that_of_a_cache_by_cross_entropy(way: str, bench: Bench, tmp_path: Path) -> None:
    """Bit for bit, at every step: the same samples in the same order, cut to the same vocabulary."""
    more: dict[str, object] = {"accumulated": {"grad_accum": 3}, "padded": {"max_steps": 3}}.get(way, {})
    loss = LossSpec(kd_weight=0.0, label_smoothing=0.1, z_loss=1e-3) if way == "smoothed" else ALONE
    training = training_for(bench, tmp_path / "data", loss=loss, eval_every=2, **more)
    if way == "padded":
        training = dataclasses.replace(training, student=make_mamba(tmp_path / "mamba"))
    ours, theirs = Recorder(), Recorder()
    metrics = train(training, ours)
    others = train(of_the_cache(training, bench, tmp_path / "cache"), theirs)
    assert weights(tmp_path / "data") == weights(tmp_path / "cache")
    for field in ("loss/mean", "ce/mean", "grad_norm", "num_tokens"):
        assert ours.values("step", field) == theirs.values("step", field), field
    assert ours.values("eval", "heldout_ce") == theirs.values("eval", "heldout_ce")
    assert any("padded" in note for note in ours.notes) == (way == "padded")
    assert metrics == {name: others[name] for name in metrics}


def test_the_first_steps_are_those_of_transformers_own_loss(bench: Bench, tmp_path: Path) -> None:
    """A loop by hand, a sample at a time: the model's own loss, torch's AdamW, no line of kdpipe's loss or packing."""
    student = make_tokenizer(make_model("qwen2", tmp_path / "student", vocab_size=300, seed=3))
    training = dataclasses.replace(training_for(bench, tmp_path / "out", max_steps=3), student=student)
    recorder = Recorder()
    train(training, recorder)
    dataset = find(training).dataset
    batches = PlannedBatches(dataset, dataset.split(None)[0], seed=0, batch_tokens=600, max_steps=3)
    model = transformers.AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32).train()
    spec = training.spec.train
    optimizer = torch.optim.AdamW(model.parameters(), betas=spec.betas, weight_decay=0.0)
    for step in range(3):
        members, total = batches.samples(step).tolist(), 0.0
        count = int(dataset.num_supervised[members].sum())
        for member in members:
            text = dataset.tokens(member)
            ids, supervised = torch.tensor(text.token_ids), torch.tensor(text.supervised)
            labels = torch.where(supervised, ids, -100)
            own = int(supervised[1:].sum())
            loss = model(input_ids=ids.long()[None], labels=labels.long()[None]).loss * own / count
            loss.backward()
            total += float(loss.detach())
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), spec.max_grad_norm)
        assert recorder.values("step", "ce/mean")[step] == pytest.approx(total, rel=2e-5)
        assert recorder.values("step", "grad_norm")[step] == pytest.approx(float(norm), rel=2e-4)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, 3, spec)
        optimizer.step()
        optimizer.zero_grad()


def test_nothing_is_said_of_a_teacher_that_there_is_none_of(bench: Bench, tmp_path: Path) -> None:
    recorder = Recorder()
    metrics = train(training_for(bench, tmp_path / "out"), recorder)
    figures = {"heldout_ce", "heldout_bits_per_byte", "perplexity", "num_tokens", "dtype"}
    assert metrics.keys() == figures | {"num_steps", "trained_tokens"}
    assert {frozenset(fields) for kind, fields in recorder.events if kind == "eval"} == {frozenset(figures | {"step"})}
    logged = {name for kind, fields in recorder.events if kind == "step" for name in fields}
    assert not logged & {"kd/mean", "teacher_entropy/mean", "top1_agreement", "top_k_mass"}
    assert "ce/mean" in logged
    record = read_run(tmp_path / "out")
    assert record is not None
    assert record.metrics is not None
    assert record.metrics.keys() == figures
    assert (record.inputs.spec.loss.kd_weight, record.inputs.caches) == (0.0, ())
    assert len(record.inputs.data) == 64
    notes = "\n".join(recorder.notes)
    assert "no teacher: cross-entropy on 60 samples of the data, loss.kd_weight is 0" in notes
    assert "before training: held-out cross-entropy" in notes
    assert "KL" not in notes
    assert recorder.notes[-1].endswith(f"kdpipe eval --student {tmp_path / 'out'} --cache CACHE")


def test_it_is_measured_on_a_cache_on_what_it_held_out(bench: Bench, tmp_path: Path) -> None:
    training = training_for(bench, tmp_path / "out")
    spec = training.spec.model_copy(update={"data": DataSpec(max_length=128, heldout_fraction=0.5)})
    metrics = train(dataclasses.replace(training, spec=spec), Silent())
    scores = evaluate_student(
        tmp_path / "out",
        [bench.cache],
        heldout_fraction=None,
        device="cpu",
        dtype="auto",
        batch_tokens=600,
        progress=Silent(),
    )
    assert scores["num_tokens"] == metrics["num_tokens"]
    assert scores["heldout_ce"] == pytest.approx(metrics["heldout_ce"], rel=1e-6)
    assert scores["heldout_kl"] > 0


def test_two_ranks_take_the_same_steps_as_one(bench: Bench, tmp_path: Path) -> None:
    """Their samples are those that the launcher has prepared."""
    training = training_for(bench, tmp_path / "two")
    found = check_training(training, 2)
    two = launch(train_and_record, dataclasses.replace(training, inputs=found.inputs), nproc=2)
    one = train_and_record(training_for(bench, tmp_path / "one"))
    assert len(one["loss/mean"]) == STEPS
    assert two["num_tokens"] == one["num_tokens"]
    assert two["loss/mean"] == pytest.approx(one["loss/mean"], rel=2e-6)
    first, second = (read_run(tmp_path / name) for name in ("one", "two"))
    assert first is not None
    assert second is not None
    assert first.metrics is not None
    assert second.metrics is not None
    for name in ("heldout_ce", "num_tokens"):
        assert float(second.metrics[name]) == pytest.approx(float(first.metrics[name]), rel=1e-5)


def test_a_rank_whose_samples_are_gone_or_others_says_so(bench: Bench, tmp_path: Path) -> None:
    training = training_for(bench, tmp_path / "out")
    inputs = check_training(training, 1).inputs
    other = inputs.model_copy(update={"data": "0" * 64})
    with pytest.raises(TemporaryError, match="gone or others; run it again"):
        find(dataclasses.replace(training, inputs=other))
    shutil.rmtree(samples_folder(training.output))
    with pytest.raises(TemporaryError, match="gone or others; run it again"):
        find(dataclasses.replace(training, inputs=inputs))


def test_killed_it_goes_on_bit_for_bit_without_reading_the_data_again(
    bench: Bench, apart: Apart, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, kill in (("whole", ""), ("out", "step:3")):
        assert apart(train_until, training_for(bench, tmp_path / name), kill) == (-signal.SIGKILL if kill else 0)
    training, recorder = training_for(bench, tmp_path / "out"), Recorder()
    monkeypatch.setattr(samples, "write_samples", lambda *_, **__: pytest.fail("the data were read again"))
    check_training(training, 1, find(training, recorder))
    assert recorder.notes == ["no input has changed since the data were prepared: 60 samples"]
    assert apart(train_until, training, "") == 0
    assert read_steps(tmp_path / "out") == read_steps(tmp_path / "whole")
    assert weights(tmp_path / "out") == weights(tmp_path / "whole")


def test_the_same_samples_by_another_rank_of_torchrun_are_left_in_place(bench: Bench, tmp_path: Path) -> None:
    """Each prepares them, and what one has put in place another may have opened."""
    training = training_for(bench, tmp_path / "out")
    find(training)
    place = samples_folder(training.output)
    there = place.stat().st_ino
    (place / "runs" / "inputs.json").unlink()
    find(training)
    assert place.stat().st_ino == there
    find(dataclasses.replace(training, data=(write_chats(tmp_path / "other.jsonl", 9),)))
    assert place.stat().st_ino != there
    assert [entry.name for entry in tmp_path.glob(".*")] == [place.name]


def test_data_that_changed_since_the_run_began_are_refused(bench: Bench, apart: Apart, tmp_path: Path) -> None:
    """Interrupted or finished; as they were then they go on, or are finished already."""
    data = shutil.copy(bench.data, tmp_path / "data.jsonl")
    training = dataclasses.replace(training_for(bench, tmp_path / "out"), data=(Path(data),))
    assert apart(train_until, training, "step:3") == -signal.SIGKILL
    before = Path(data).read_text()
    lines = before.splitlines(keepends=True)
    for changed in (lines + lines[:1], lines[::-1], lines[1:], [lines[0].replace("?", "!"), *lines[1:]]):
        Path(data).write_text("".join(changed))
        with pytest.raises(ConfigError, match=r"000002: it is a checkpoint of another run: its data is [0-9a-f]{64}, "):
            train(training, Silent())
    Path(data).write_text(before)
    train(training, Silent())
    recorder = Recorder()
    train(training, recorder, check_training(training, 1))
    assert "holds this run's student already" in "\n".join(recorder.notes)
    Path(data).write_text("".join(lines[1:]))
    with pytest.raises(ConfigError, match=r"it holds the student of another run: its data is [0-9a-f]{64}, this run's"):
        check_training(training, 1)


def test_samples_lie_beside_the_output_as_long_as_a_run_may_go_on_from_them(
    bench: Bench, apart: Apart, tmp_path: Path
) -> None:
    training = training_for(bench, tmp_path / "runs" / "out")
    place = samples_folder(training.output)
    with pytest.raises(ConfigError, match="ranks for"), samples_beside(training.output):
        check_training(training, 99)
    assert list(tmp_path.iterdir()) == [], "refused, it leaves nothing"
    assert apart(train_until, training, "step:3") == -signal.SIGKILL
    with samples_beside(training.output):
        assert place.exists()
    assert place.exists(), "it may go on"
    with alone_in(training.output), samples_beside(training.output):
        shutil.move(training.output / "checkpoints", tmp_path)
    assert place.exists(), "they are those of a run at work"
    shutil.move(tmp_path / "checkpoints", training.output)
    with samples_beside(training.output):
        train(training, Silent())
    assert sorted(entry.name for entry in (tmp_path / "runs").iterdir()) == ["out", "out.log"]


def test_what_was_cut_or_left_out_is_listed_in_the_output(bench: Bench, tmp_path: Path) -> None:
    data = write_chats(tmp_path / "data.jsonl", 12)
    with open(data, "a", encoding="utf-8") as file:
        file.write('{"messages": 7}\n')
    training = dataclasses.replace(training_for(bench, tmp_path / "out"), data=(data,))
    with pytest.raises(DataError, match=r"data\.jsonl:13"):
        check_training(training, 1)
    spec = DataSpec(max_length=60, heldout_fraction=0, bad_records="skip", max_bad=0.5)
    training = dataclasses.replace(training, spec=training.spec.model_copy(update={"data": spec}))
    recorder = Recorder()
    train(training, recorder)
    listed = [json.loads(line) for line in (tmp_path / "out" / "prepare.jsonl").read_text().splitlines()]
    assert (listed[-1]["line"], listed[-1]["kind"]) == (13, "bad_record")
    assert f"1 of 13 samples bad record: see {tmp_path / 'out' / 'prepare.jsonl'}" in recorder.notes
    assert {each["kind"] for each in listed[:-1]} == {"truncated"}


def test_what_does_not_fit_the_student_is_refused_before_its_data_are_read(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = training_for(bench, tmp_path / "out")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "letter.txt").touch()
    small = make_tokenizer(make_model("llama", tmp_path / "small", vocab_size=251))
    monkeypatch.setattr(samples, "write_samples", lambda *_, **__: pytest.fail("the data were read"))
    with pytest.raises(StudentError, match=r"the tokenizer makes ids up to 299, the lm_head has 251 rows"):
        check_training(dataclasses.replace(training, student=small), 1)
    with pytest.raises(ConfigError, match=r"it holds other things \(letter.txt\)"):
        check_training(training, 1)
    with pytest.raises(ConfigError, match=r"--resume nowhere: no checkpoint here"):
        find(dataclasses.replace(training, output=tmp_path / "other", resume="nowhere"))
    with pytest.raises(ConfigError, match=r"loss.kd_weight"):
        check_training(dataclasses.replace(training, spec=RunSpec()), 1)


def test_a_sample_longer_than_the_student_reads_is_refused_with_its_line(bench: Bench, tmp_path: Path) -> None:
    student = make_tokenizer(
        make_model("llama", tmp_path / "student", vocab_size=320, sizes={"max_position_embeddings": 64})
    )
    training = dataclasses.replace(training_for(bench, tmp_path / "out"), student=student)
    with pytest.raises(
        DataError,
        match=r"data\.jsonl:\d+: \d+ tokens, the student takes 64 \(max_position_embeddings\); --max-length 64",
    ):
        check_training(training, 1)


def test_a_cache_with_rows_is_trained_on_by_cross_entropy_without_reading_them(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = training_for(bench, tmp_path / "out")
    training = of_the_cache(training, bench, tmp_path / "out")
    spec = training.spec.model_copy(update={"data": DataSpec(max_length=128, heldout_fraction=0)})
    monkeypatch.setattr(Cache, "rows", lambda *_: pytest.fail("rows were read"))
    assert train(dataclasses.replace(training, spec=spec), Silent())["num_steps"] > 0
