"""Checkpoints: a run killed anywhere goes on bit for bit, a damaged checkpoint is passed over."""

import dataclasses
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import transformers
from tests.chats import write_chats
from tests.conftest import Apart, Bench
from tests.models import make_tokenizer
from tests.stages.ranks import Recorder, newest_of_two, read_steps, train_logged, train_until
from tests.stages.train.test_train import training_for

from kdpipe.manifests.errors import ConfigError, CorruptError, KdpipeError, TemporaryError
from kdpipe.manifests.progress import Silent
from kdpipe.manifests.run import CHECKPOINT_FILE, read_run
from kdpipe.manifests.running import RUNNING_FILE
from kdpipe.manifests.specs import DataSpec
from kdpipe.pipeline.launch import launch
from kdpipe.stages.extract import ExtractSpec, extract
from kdpipe.stages.train import train
from kdpipe.stages.train.checkpoint import UNFINISHED, file_name
from kdpipe.stages.train.signals import SIGNALS, asked_to_stop
from kdpipe.stages.train.trainer import Trainer
from kdpipe.stages.train.training import Training, check_training

STEPS = 12
FAILPOINTS = ("written", "digested", "recorded", "flushed", "named", "pruned")


def small_training(bench: Bench, output: Path, **changes: object) -> Training:
    """12 steps over two epochs and a bit."""
    return training_for(
        bench, output, **{"max_steps": STEPS, "batch_tokens": 900, "epochs": 9, "save_every": 3} | changes
    )


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def run(apart: Apart) -> Callable[..., int]:
    """Train in a process of its own, killed where it is told to be; its exit code."""
    return lambda training, kill="": apart(train_until, training, kill)


def weights(output: Path) -> bytes:
    return (output / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def whole(bench: Bench, apart: Apart, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The output of the run that was never interrupted, made once for each grad_accum."""
    made: dict[int, Path] = {}

    def output(accumulate: int = 1) -> Path:
        if accumulate not in made:
            made[accumulate] = tmp_path_factory.mktemp("whole") / "out"
            training = small_training(bench, made[accumulate], grad_accum=accumulate)
            assert apart(train_until, training, "") == 0
        return made[accumulate]

    return output


def assert_same(output: Path, whole: Path) -> None:
    """Every step's loss, norm and rate, and the final weights: bit for bit."""
    assert read_steps(output) == read_steps(whole)
    assert weights(output) == weights(whole)
    assert not (output / "checkpoints").exists()
    assert sorted(path.name for path in output.iterdir()) == sorted(path.name for path in whole.iterdir())


@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("step", [1, 3, 7, STEPS])
def test_a_run_killed_after_a_step_goes_on_bit_for_bit(
    step: int, accumulate: int, bench: Bench, run: Callable[..., int], whole: Callable[..., Path], tmp_path: Path
) -> None:
    training = small_training(bench, tmp_path / "out", grad_accum=accumulate)
    assert run(training, kill=f"step:{step}") == -signal.SIGKILL
    assert run(training) == 0
    assert_same(training.output, whole(accumulate))


@pytest.mark.parametrize(
    "place", [*(f"checkpoint:{name}#2" for name in FAILPOINTS), "export:written", "export:moved#2"]
)
def test_a_run_killed_while_it_saves_goes_on_bit_for_bit(
    place: str, bench: Bench, run: Callable[..., int], whole: Callable[..., Path], tmp_path: Path
) -> None:
    training = small_training(bench, tmp_path / "out")
    assert run(training, kill=place) == -signal.SIGKILL
    check_training(training, 1)
    assert run(training) == 0
    assert_same(training.output, whole())


def test_a_run_killed_five_times_goes_on_bit_for_bit(
    bench: Bench, run: Callable[..., int], whole: Callable[..., Path], tmp_path: Path
) -> None:
    training = small_training(bench, tmp_path / "out")
    for place in ("step:2", "step:4", "checkpoint:digested", "checkpoint:named", "step:9"):
        assert run(training, kill=place) == -signal.SIGKILL
    assert run(training) == 0
    assert_same(training.output, whole())


def test_a_cache_that_grew_is_what_it_was_to_a_run_that_goes_on(
    bench: Bench, run: Callable[..., int], whole: Callable[..., Path], tmp_path: Path
) -> None:
    cache = shutil.copytree(bench.cache, tmp_path / "cache")
    training = dataclasses.replace(small_training(bench, tmp_path / "out"), caches=(cache,))
    assert run(training, kill="step:7") == -signal.SIGKILL
    grow(bench, cache, tmp_path)
    recorder = Recorder()
    train(training, recorder)
    assert any("has grown since this run began" in note for note in recorder.notes)
    assert weights(training.output) == weights(whole())
    check_training(training, 1)
    told = Recorder()
    assert train(training, told)["num_steps"] == STEPS
    assert any("another --output trains on all" in note for note in told.notes)
    again = dataclasses.replace(training, output=tmp_path / "again")
    train(again, Recorder())
    assert weights(again.output) != weights(whole())


def grow(bench: Bench, cache: Path, folder: Path) -> None:
    more = write_chats(folder / "more.jsonl", 9, seed=41)
    spec = ExtractSpec(
        teacher=bench.teacher,
        data=(more,),
        data_spec=DataSpec(max_length=128, heldout_fraction=0.25),
        device="cpu",
        grow=True,
    )
    grown = extract(spec, cache, Silent())
    assert (grown.plan.generation, grown.complete) == (1, True)


def test_dropout_goes_on_with_the_same_random_numbers(bench: Bench, run: Callable[..., int], tmp_path: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(bench.student)
    model.config.attention_dropout = 0.3
    model.save_pretrained(tmp_path / "student")
    make_tokenizer(tmp_path / "student")
    trainings = [
        small_training(bench, tmp_path / name / "out", student=tmp_path / "student")
        for name in ("whole", "killed", "dry")
    ]
    trainings[2] = small_training(bench, trainings[2].output)
    assert run(trainings[0]) == run(trainings[2]) == 0
    assert read_steps(trainings[0].output) != read_steps(trainings[2].output), "nothing was dropped"
    assert run(trainings[1], kill="step:7") == -signal.SIGKILL
    assert run(trainings[1]) == 0
    assert_same(trainings[1].output, trainings[0].output)


DAMAGE: dict[str, Callable[[bytes], bytes | None]] = {
    "a bit flipped": lambda data: data[:-5] + bytes([data[-5] ^ 1]) + data[-4:],
    "cut short": lambda data: data[: len(data) // 2],
    "empty": lambda data: b"",
    "gone": lambda data: None,
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", [CHECKPOINT_FILE, file_name(0)])
def test_a_damaged_checkpoint_is_passed_over(
    name: str, damage: str, bench: Bench, run: Callable[..., int], whole: Callable[..., Path], tmp_path: Path
) -> None:
    training = small_training(bench, tmp_path / "out")
    assert run(training, kill="step:8") == -signal.SIGKILL
    victim = training.output / "checkpoints" / "000006" / name
    left = DAMAGE[damage](victim.read_bytes())
    victim.unlink()
    if left is not None:
        victim.write_bytes(left)
    notes = Recorder()
    train(training, notes)
    assert any("checkpoint of step 6 is damaged" in text for text in notes.notes), notes.notes
    assert ("resume", 3) in [(kind, fields.get("step")) for kind, fields in notes.events]
    assert weights(training.output) == weights(whole())


def test_other_ranks_and_accumulation_go_on_with_the_same_steps(
    bench: Bench, run: Callable[..., int], whole: Callable[..., Path], tmp_path: Path
) -> None:
    training = small_training(bench, tmp_path / "out")
    assert run(training, kill="step:7") == -signal.SIGKILL
    wide = small_training(bench, training.output, grad_accum=2, save_every=2, keep=1)
    found = launch(train_logged, wide, nproc=2)
    right = {step: float.fromhex(told.split()[0]) for step, told in read_steps(whole()).items()}
    assert sorted(found) == list(range(7, STEPS + 1))
    assert all(loss == pytest.approx(right[step], rel=2e-5) for step, loss in found.items())


def test_two_ranks_killed_go_on_bit_for_bit(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training = small_training(bench, tmp_path / "whole" / "out")
    launch(train_until, training, "", nproc=2)
    other = dataclasses.replace(training, output=tmp_path / "other" / "out")
    for place in ("step:5", "checkpoint:recorded"):
        with pytest.raises(TemporaryError, match="SIGKILL"):
            launch(train_until, other, place, nproc=2)
    launch(train_until, other, "", nproc=2)
    assert_same(other.output, training.output)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_finishes_the_step_and_saves(
    number: signal.Signals, bench: Bench, whole: Callable[..., Path], tmp_path: Path
) -> None:
    training = small_training(bench, tmp_path / "out", save_every=100)

    class Sender(Recorder):
        def event(self, kind: str, **fields: object) -> None:
            super().event(kind, **fields)
            if (kind, fields.get("step")) == ("step", 4):
                os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    with pytest.raises(KdpipeError, match=f"stopped by {number.name}; its state after step 4 is saved") as caught:
        train(training, Sender())
    assert caught.value.exit_code == (130 if number == signal.SIGINT else 75)
    assert signal.getsignal(number) == before
    recorder = Recorder()
    train(training, recorder)
    assert recorder.values("step", "step") == list(range(5, STEPS + 1))
    assert weights(training.output) == weights(whole())


@pytest.mark.parametrize("number", SIGNALS)
def test_asked_twice_it_does_not_wait(number: signal.Signals, capfd: pytest.CaptureFixture[str]) -> None:
    heard: list[int] = []
    before = signal.signal(number, lambda number, _: heard.append(number))
    try:
        with asked_to_stop() as asked:
            os.kill(os.getpid(), signal.SIGTERM)
            assert (asked, heard) == ([signal.SIGTERM], [])
            assert capfd.readouterr().err == "SIGTERM: finishing the step and saving; once more ends it at once\n"
            os.kill(os.getpid(), number)
            assert (asked, heard) == ([signal.SIGTERM], [number])
    finally:
        signal.signal(number, before)


def test_a_rank_hears_what_its_launcher_passes_on_as_one_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C reaches ranks and launcher, which signals them once more."""
    monkeypatch.setenv("RANK", "0")
    heard: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: heard.append(number))
    try:
        with asked_to_stop(say=False) as asked:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGTERM)
            assert (asked, heard) == ([signal.SIGINT], [])
            monkeypatch.setattr("kdpipe.stages.train.signals.SAME_S", -1.0)
            os.kill(os.getpid(), signal.SIGTERM)
            assert heard == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)


def test_an_ignored_signal_stays_ignored() -> None:
    """nohup kdpipe train ..."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with asked_to_stop() as asked:
            os.kill(os.getpid(), signal.SIGHUP)
            assert asked == []
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_slow_run_saves_by_the_clock(bench: Bench, tmp_path: Path) -> None:
    for minutes, saved in ((1e-9, [1, 2]), (0, []), (1e9, [])):
        recorder = Recorder()
        train(
            small_training(bench, tmp_path / str(minutes), max_steps=3, save_every=100, save_minutes=minutes), recorder
        )
        assert recorder.values("checkpoint", "step") == saved
    recorder = Recorder()
    train(small_training(bench, tmp_path / "none", max_steps=3, save_every=0, save_minutes=1e-9), recorder)
    assert recorder.values("checkpoint", "step") == []


def test_a_start_says_which_earlier_steps_it_takes_again(bench: Bench, run: Callable[..., int], tmp_path: Path) -> None:
    training = small_training(bench, tmp_path / "out")
    assert run(training, kill="step:5") == -signal.SIGKILL
    recorder = Recorder()
    train(training, recorder)
    assert recorder.values("start", "first_step") == [4] == recorder.values("step", "step")[:1]
    assert recorder.values("eval", "step") == [STEPS], "only an untrained student is measured before the first step"


def test_going_on_from_a_named_checkpoint_leaves_another_runs_alone(
    bench: Bench, run: Callable[..., int], tmp_path: Path
) -> None:
    training, other = small_training(bench, tmp_path / "out"), small_training(bench, tmp_path / "other", seed=2)
    assert run(training, kill="step:7") == run(other, kill="step:4") == -signal.SIGKILL
    before = sorted((training.output / "checkpoints").rglob("*"))
    mixed = dataclasses.replace(other, output=training.output, resume=str(other.output / "checkpoints" / "000003"))
    with pytest.raises(ConfigError, match=r"000006: it is a checkpoint of another run: its spec\.train\.seed is 0"):
        train(mixed, Recorder())
    assert sorted((training.output / "checkpoints").rglob("*")) == before


def test_a_checkpoint_of_another_run_is_refused(bench: Bench, run: Callable[..., int], tmp_path: Path) -> None:
    training = small_training(bench, tmp_path / "out")
    assert run(training, kill="step:4") == -signal.SIGKILL
    other = small_training(bench, training.output, lr=5e-4)
    with pytest.raises(ConfigError, match=r"checkpoint of another run: its spec\.train\.lr is 0\.001, this run's is"):
        train(other, Recorder())
    with pytest.raises(CorruptError, match=r"checkpoint\.json is missing"):
        train(dataclasses.replace(training, resume=str(tmp_path)), Recorder())
    with pytest.raises(ConfigError, match=r"--resume .*: no checkpoint here"):
        check_training(dataclasses.replace(training, output=tmp_path / "new", resume=str(tmp_path)), 1)
    assert not (tmp_path / "new").exists()
    recorder = Recorder()
    train(dataclasses.replace(other, resume="never"), recorder)
    assert recorder.values("step", "step") == list(range(1, STEPS + 1))


def test_a_run_started_again_keeps_its_own_checkpoints(bench: Bench, run: Callable[..., int], tmp_path: Path) -> None:
    """Later ones of the run before would be the newest, and its own would be pruned at once."""
    training = small_training(bench, tmp_path / "out")
    assert run(training, kill="step:10") == -signal.SIGKILL
    again = dataclasses.replace(training, resume="never")
    assert run(again, kill="step:4") == -signal.SIGKILL
    assert sorted(path.name for path in (training.output / "checkpoints").iterdir() if path.name != UNFINISHED) == [
        "000003"
    ]


def test_a_refused_run_leaves_anothers_student_and_checkpoints(
    bench: Bench, run: Callable[..., int], tmp_path: Path
) -> None:
    training = small_training(bench, tmp_path / "out")
    assert run(training, kill="export:written") == -signal.SIGKILL
    (training.output / RUNNING_FILE).unlink()  # of the run that was killed: whoever comes next takes it away
    before = sorted(training.output.rglob("*"))
    with pytest.raises(ConfigError, match="another run"):
        train(small_training(bench, training.output, lr=5e-4), Recorder())
    check_training(small_training(bench, training.output, lr=5e-4), 1)
    assert sorted(training.output.rglob("*")) == before


def test_a_run_goes_on_from_a_named_checkpoint(
    bench: Bench, run: Callable[..., int], whole: Callable[..., Path], tmp_path: Path
) -> None:
    training = small_training(bench, tmp_path / "out")
    assert run(training, kill="step:7") == -signal.SIGKILL
    shutil.move(training.output / "checkpoints" / "000003", tmp_path / "mine")
    elsewhere = dataclasses.replace(training, output=tmp_path / "elsewhere", resume=str(tmp_path / "mine"))
    recorder = Recorder()
    train(elsewhere, recorder)
    assert recorder.values("step", "step")[0] == 4
    assert weights(elsewhere.output) == weights(whole())


def test_only_the_newest_are_kept_and_none_when_it_is_done(
    bench: Bench, run: Callable[..., int], tmp_path: Path
) -> None:
    training = small_training(bench, tmp_path / "out", save_every=1, keep=3)
    assert run(training, kill="step:9") == -signal.SIGKILL
    folder = training.output / "checkpoints"
    assert sorted(path.name for path in folder.iterdir() if path.name != UNFINISHED) == ["000006", "000007", "000008"]
    train(training, Recorder())
    assert not folder.exists()


@pytest.mark.parametrize(("policy", "factor"), [("skip", 1.0), ("halve", 0.25)])
def test_a_step_that_is_not_finite_is_left_out(
    policy: str, factor: float, bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, own = [], Trainer._clip

    def clip(self: Trainer) -> float:
        calls.append(own(self))
        return float("nan") if len(calls) in (3, 5) else calls[-1]

    monkeypatch.setattr(Trainer, "_clip", clip)
    training = small_training(bench, tmp_path, on_nonfinite=policy, schedule="constant", warmup_ratio=0.0)
    recorder = Recorder()
    train(training, recorder)
    assert recorder.values("step", "num_skipped") == [0, 0, 1, 1, *([2] * 8)]
    assert recorder.values("step", "lr")[-1] == pytest.approx(1e-3 * factor)
    assert (tmp_path / "model.safetensors").is_file()


class Stopper(Recorder):
    """Asks the run to stop at a step, after which it ends."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self._step = step

    def event(self, kind: str, **fields: object) -> None:
        super().event(kind, **fields)
        if (kind, fields.get("step")) == ("step", self._step):
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("policy", ["skip", "halve"])
def test_a_run_that_left_steps_out_goes_on_bit_for_bit(
    policy: str, bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """AdamW's count of updates, the rate's factor and the count of what was left out are those of the whole run."""
    own = Trainer._clip
    monkeypatch.setattr(Trainer, "_clip", lambda run: float("nan") if run.done in (1, 3, 6) else own(run))
    whole, training = (
        small_training(bench, tmp_path / name, max_steps=8, on_nonfinite=policy) for name in ("whole", "parts")
    )
    right, first, second = Recorder(), Stopper(4), Recorder()
    train(whole, right)
    with pytest.raises(TemporaryError, match="its state after step 4 is saved"):
        train(training, first)
    train(training, second)
    assert second.values("step", "step") == [5, 6, 7, 8]
    for field in ("loss/mean", "grad_norm", "lr", "num_skipped"):
        parts = first.values("step", field) + second.values("step", field)
        assert [each.hex() for each in parts] == [each.hex() for each in right.values("step", field)], field
    assert right.values("step", "num_skipped")[-1] == 3
    assert weights(training.output) == weights(whole.output)
    assert read_run(training.output) == read_run(whole.output)


def test_the_checkpoint_gone_on_from_stays_until_a_newer_one_is_there(bench: Bench, tmp_path: Path) -> None:
    """A run that is killed before its next checkpoint must find one."""
    training = small_training(bench, tmp_path, max_steps=6, save_every=2)
    with pytest.raises(TemporaryError):
        train(training, Stopper(3))
    left: list[list[str]] = []

    class Looker(Recorder):
        def event(self, kind: str, **fields: object) -> None:
            if kind == "resume":
                left.append(sorted(path.name for path in (training.output / "checkpoints").glob("0*")))

    train(training, Looker())
    assert left == [["000002", "000003"]]


def test_damage_that_one_rank_finds_counts_for_all(tmp_path: Path) -> None:
    """Each rank reads its own share of a checkpoint's files: rank 1's is the damaged one."""
    damaged = "the checkpoint of step 4 is damaged ({}); taking the one before"
    assert launch(newest_of_two, tmp_path, nproc=2) == [
        (2, damaged.format("found by another rank")),
        (2, damaged.format(f"{file_name(1)} is not what was written")),
    ]


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("accumulate", [1, 4])
def test_soak_a_run_killed_at_every_one_of_60_steps(
    accumulate: int, bench: Bench, run: Callable[..., int], tmp_path: Path
) -> None:
    def training(name: str) -> Training:
        return small_training(
            bench, tmp_path / name / "out", max_steps=60, epochs=99, grad_accum=accumulate, save_every=7
        )

    assert run(training("whole")) == 0
    for step in range(1, 61):
        killed = training(str(step))
        for kill in ("step:1", "checkpoint:recorded", f"step:{step}")[-(step % 3 + 1) :]:
            run(killed, kill=kill)
        assert run(killed) == 0
        assert_same(killed.output, training("whole").output)
        shutil.rmtree(killed.output.parent)
