"""A teacher that is made anew of its student: what it becomes, whose rows a step has, and what a kill leaves."""

import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.conftest import Apart, Bench
from tests.models import make_model, make_tokenizer
from tests.opened import student_in, teacher_in
from tests.stages.live.test_rollouts import REVERSE, of, rollouts, run_file, weights
from tests.stages.ranks import Recorder
from tests.stages.train.test_train import training_for
from transformers import AutoModelForCausalLM

from kdpipe.manifests import failpoints
from kdpipe.manifests.cache import Cache
from kdpipe.manifests.errors import ConfigError, CorruptError
from kdpipe.manifests.progress import Silent
from kdpipe.manifests.ring import RingReader, RingWriter, make_ring
from kdpipe.manifests.sample import prompt_of
from kdpipe.manifests.specs import DataSpec, LossSpec, RunFile, StudentSpec
from kdpipe.stages.extract import ExtractSpec, extract
from kdpipe.stages.live.onpolicy import fed_by, find_onpolicy
from kdpipe.stages.live.serve import serve_plan
from kdpipe.stages.live.updates import require_same_model
from kdpipe.stages.train import Training, train

PLACES = ("update:written#2", "update:named#1")


@pytest.fixture(scope="module")
def pair(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """The student beside a teacher of its own sizes, with other weights."""
    folder = tmp_path_factory.mktemp("pair")
    teacher = make_model("llama", folder / "teacher", vocab_size=320, seed=7, sizes={"hidden_size": 32})
    spec = ExtractSpec(
        teacher=make_tokenizer(teacher),
        data=(bench.data,),
        data_spec=DataSpec(max_length=128, heldout_fraction=0.25),
    )
    extract(spec, folder / "cache", Silent())
    return Bench(teacher=teacher, student=bench.student, data=bench.data, cache=folder / "cache")


@contextmanager
def serving(pair: Bench, output: Path) -> Iterator[RingReader]:
    """The reader of a teacher's whole life in a thread of this process."""
    ours, theirs = make_ring(1 << 20)
    spec = ExtractSpec(teacher=pair.teacher, data=(), device="cpu")

    def run() -> None:
        with RingWriter(ours, patience_s=20) as ring:
            serve_plan(spec, Cache.open(pair.cache), [ring], Silent(), output=output)

    def quietly() -> None:
        try:
            run()
        except Exception:
            return  # the reader has it from the ring

    thread = threading.Thread(target=quietly)
    thread.start()
    with RingReader(theirs, patience_s=20) as reader:
        yield reader
    thread.join(30)
    assert not thread.is_alive()


def updated(
    pair: Bench, training: Training, recorder: Recorder | None = None, *, every: int, ema: float = 0.0, **live: object
) -> Recorder:
    """A run whose teacher is made anew."""
    recorder = recorder or Recorder()
    given = run_file(teacher_update_every=every, ema=ema, **live)
    run = RunFile.model_validate(given.model_dump() | {"teacher": {"path": pair.teacher}})
    with serving(pair, training.output) as reader:
        train(training, recorder, fed_by(reader, find_onpolicy(training, run), training, run))
        reader.finish()
        assert reader.take("the end") is None
    return recorder


class Copies(Recorder):
    """Keeps a copy of every teacher and of every checkpoint."""

    def __init__(self, output: Path, folder: Path) -> None:
        super().__init__()
        self._output, self._folder = output, folder

    def event(self, kind: str, **fields: object) -> None:
        super().event(kind, **fields)
        if kind == "checkpoint":
            name = f"checkpoints/{fields['step']:06d}"
        elif kind == "step" and "update/seconds" in fields:
            name = f"teachers/{fields['teacher/version']:06d}"
        else:
            return
        shutil.copytree(self._output / name, self._folder / name)


class Stopped(Recorder):
    """Interrupts after some step."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self._step = step

    def event(self, kind: str, **fields: object) -> None:
        super().event(kind, **fields)
        if kind == "step" and fields["step"] == self._step:
            raise KeyboardInterrupt


def student_at(folder: Path, step: int) -> dict[str, torch.Tensor]:
    """The student's weights in a checkpoint, by the names that its folder has for them."""
    (file,) = (folder / "checkpoints" / f"{step:06d}").glob("*.safetensors")
    own = {name: tensor for name, tensor in load_file(file).items() if name.startswith("weight.model.")}
    return {name.removeprefix("weight.model."): tensor for name, tensor in own.items()}


def test_a_copy_of_the_student_has_nothing_to_teach_it_however_it_moves(pair: Bench, tmp_path: Path) -> None:
    """Cross entropy on the data's answers moves it; the first step has the teacher of its own folder."""
    training = training_for(pair, tmp_path / "out", loss=LossSpec(kd_weight=0.5), max_steps=5)
    recorder = updated(pair, training, every=1, lmbda=0.5)
    steps = of(recorder, "step")
    assert [step["teacher/version"] for step in steps] == [0, 1, 2, 3, 4]
    assert ["update/seconds" in step for step in steps] == [False, True, True, True, True]
    kd = [step["kd/mean"] for step in steps]
    assert kd[0] > 0.1
    assert max(map(abs, kd[1:])) < 1e-6
    before, after = (load_file(path / "model.safetensors") for path in (pair.student, training.output))
    assert all((after[name] - before[name]).norm() > 1e-3 * before[name].norm() for name in before)
    assert not (training.output / "teachers").exists(), "none is left of a finished run"


def test_an_average_is_what_is_reckoned_by_hand(pair: Bench, tmp_path: Path) -> None:
    training = training_for(pair, tmp_path / "out", loss=REVERSE, max_steps=7, save_every=2, keep=1)
    copies = Copies(training.output, tmp_path)
    updated(pair, training, copies, every=2, ema=0.75)
    assert [step["teacher/version"] for step in of(copies, "step")] == [0, 0, 2, 2, 4, 4, 6]
    mean = {name: tensor.double() for name, tensor in load_file(pair.teacher / "model.safetensors").items()}
    for step in (2, 4, 6):
        now = student_at(tmp_path, step)
        mean = {name: 0.75 * tensor + 0.25 * now[name].double() for name, tensor in mean.items()}
        found = load_file(tmp_path / "teachers" / f"{step:06d}" / "model.safetensors")
        assert found.keys() == mean.keys()
        for name, tensor in found.items():
            assert tensor.dtype == torch.float32
            assert torch.allclose(tensor.double(), mean[name], rtol=1e-6, atol=1e-7), (step, name)


@pytest.mark.parametrize("ema", [0.0, 0.75])
def test_of_a_student_of_adapters_the_teacher_is_made_with_them_merged_in(
    pair: Bench, ema: float, tmp_path: Path
) -> None:
    """A copy has nothing to teach it; an average is that of the merged weights."""
    training = training_for(pair, tmp_path / "out", loss=LossSpec(kd_weight=0.5), max_steps=3, save_every=1, lr=1e-2)
    spec = training.spec.model_copy(update={"student": StudentSpec(lora_rank=4)})
    copies = Copies(training.output, tmp_path)
    updated(pair, replace(training, spec=spec), copies, every=1, lmbda=0.5, ema=ema)
    base = load_file(pair.student / "model.safetensors")
    mean = {name: tensor.double() for name, tensor in load_file(pair.teacher / "model.safetensors").items()}
    for step in (1, 2):
        trained = student_at(tmp_path, step)
        assert trained
        for name, tensor in base.items():
            layer = name.removesuffix(".weight")
            now = tensor.double()
            if f"{layer}.lora_A.default.weight" in trained:
                down, up = (trained[f"{layer}.lora_{part}.default.weight"].double() for part in "AB")
                now = now + 16 / 4 * up @ down
            mean[name] = ema * mean[name] + (1 - ema) * now
        found = load_file(tmp_path / "teachers" / f"{step:06d}" / "model.safetensors")
        assert found.keys() == mean.keys()
        for name, tensor in found.items():
            assert torch.allclose(tensor.double(), mean[name], rtol=1e-5, atol=1e-6), (step, name)
    if not ema:
        kd = [step["kd/mean"] for step in of(copies, "step")]
        assert kd[0] > 0.1
        assert max(map(abs, kd[1:])) < 1e-6


def test_rows_and_head_after_an_update_are_those_of_the_new_teacher(pair: Bench, tmp_path: Path) -> None:
    training = training_for(pair, tmp_path / "out", loss=REVERSE, max_steps=2, save_every=1, eval_every=1, lr=3e-2)
    copies = Copies(training.output, tmp_path)
    updated(pair, training, copies, every=1, ema=0.5)
    student = AutoModelForCausalLM.from_pretrained(pair.student, dtype=torch.float32)
    student.load_state_dict(student_at(tmp_path, 1))
    teacher = AutoModelForCausalLM.from_pretrained(tmp_path / "teachers" / "000001")
    cache = Cache.open(pair.cache)
    total, count, size = 0.0, 0, cache.plan.head.vocab_size
    for each in rollouts(training.output):
        if each["step"] == 1:
            prompt = prompt_of(cache.samples.tokens(each["sample"]))
            ids = torch.tensor([*prompt.tolist(), *each["token_ids"]])[None]
            with torch.no_grad():
                ours, theirs = (
                    model(ids).logits[0, len(prompt) - 1 : -1, :size].double().log_softmax(-1)
                    for model in (student, teacher)
                )
            total += float((ours.exp() * (ours - theirs)).sum())
            count += len(each["token_ids"])
    (_, step) = of(copies, "step")
    assert step["num_supervised"] == count
    assert step["kd/mean"] == pytest.approx(total / count, rel=1e-4)


@pytest.mark.parametrize(("every", "ema"), [(2, 0.5), (3, 0.0)])
def test_a_run_that_goes_on_has_the_teacher_that_its_step_had(
    pair: Bench, tmp_path: Path, every: int, ema: float
) -> None:
    """From the checkpoint of step 4: with 2 its teacher is made again, with 3 that of step 3 is taken again."""
    found = []
    for name, stops in (("whole", ()), ("stopped", (5,))):
        training = training_for(pair, tmp_path / name, loss=REVERSE, max_steps=7, save_every=2, lr=1e-2)
        for step in stops:
            with pytest.raises(KeyboardInterrupt):
                updated(pair, training, Stopped(step), every=every, ema=ema)
        recorder = updated(pair, training, every=every, ema=ema)
        found.append(weights(training.output))
        versions = {step["step"]: step["teacher/version"] for step in of(recorder, "step")}
        assert versions == {step + 1: step // every * every for step in range(4 if stops else 0, 7)}
    assert found[0] == found[1]


def run_to(pair: Bench, training: Training, place: str) -> None:
    torch.set_num_threads(1)
    failpoints.arm(place)
    updated(pair, training, every=1, ema=0.5)


def test_an_update_that_a_kill_has_torn_is_made_again(
    pair: Bench, apart: Apart, one_thread: None, tmp_path: Path
) -> None:
    """One run, killed while the teacher of its third step is written, then before that teacher is taken."""
    whole, killed = (
        training_for(pair, tmp_path / name, loss=REVERSE, max_steps=5, save_every=1, lr=1e-2)
        for name in ("whole", "killed")
    )
    updated(pair, whole, every=1, ema=0.5)
    for place in PLACES:
        assert apart(run_to, pair, killed, place) == -signal.SIGKILL
    recorder = updated(pair, killed, every=1, ema=0.5)
    assert of(recorder, "resume")
    assert weights(killed.output) == weights(whole.output)


@pytest.mark.parametrize("damage", ["changed", "missing"])
@pytest.mark.parametrize("every", [2, 3])
def test_a_teacher_that_is_not_what_was_written_is_not_gone_on_with(
    pair: Bench, tmp_path: Path, damage: str, every: int
) -> None:
    training = training_for(pair, tmp_path / "out", max_steps=6, save_every=1)
    with pytest.raises(KeyboardInterrupt):
        updated(pair, training, Stopped(5), every=every, ema=0.5)
    folder = training.output / "teachers" / {2: "000002", 3: "000003"}[every]
    if damage == "missing":
        shutil.rmtree(folder)
    else:
        data = bytearray((folder / "model.safetensors").read_bytes())
        data[-5] ^= 1
        (folder / "model.safetensors").write_bytes(data)
    with pytest.raises(CorruptError, match=r"the teacher of step \d is (missing|not what was written)"):
        updated(pair, training, every=every, ema=0.5)


def test_a_teacher_of_other_sizes_is_refused_by_what_differs(bench: Bench, pair: Bench) -> None:
    require_same_model(student_in(pair.student), teacher_in(pair.teacher))
    with pytest.raises(ConfigError, match=r"its architectures is \[\"Qwen3ForCausalLM\"\], the student's is"):
        require_same_model(student_in(pair.student), teacher_in(bench.teacher))
