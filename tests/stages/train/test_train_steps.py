"""What a step does to the weights: AdamW, clipping and the rate by hand; random numbers and skipped steps."""

from pathlib import Path

import pytest
import torch
import transformers
from tests.conftest import Bench
from tests.models import make_tokenizer
from tests.stages import by_hand
from tests.stages.ranks import Recorder, Seeds
from tests.stages.train.test_train import training_for

from kdpipe.manifests.cache import Cache
from kdpipe.manifests.progress import Silent
from kdpipe.stages.feed.batches import PlannedBatches
from kdpipe.stages.feed.dataset import of_caches
from kdpipe.stages.train import train


@pytest.mark.parametrize(
    "changes",
    [
        {"weight_decay": 3.0, "betas": (0.5, 0.7), "max_grad_norm": 0.0},
        {"max_grad_norm": 1e-6, "grad_accum": 2},
    ],
    ids=["decay-betas", "clipped"],
)
def test_steps_are_adamws_by_hand(changes: dict[str, object], bench: Bench, tmp_path: Path) -> None:
    """A norm of 1e-6 brings gradients below AdamW's epsilon: what clipping does shows in the first step."""
    training = training_for(
        bench, tmp_path, lr=1e-2, schedule="linear", warmup_ratio=0.0, max_steps=3, seed=7, **changes
    )
    train(training, Silent())
    rows = of_caches([Cache.open(bench.cache)])
    feed = PlannedBatches(rows, rows.split(None)[0], seed=7, batch_tokens=600)
    rates = [1e-2, 1e-2 * 2 / 3, 1e-2 / 3]
    right = by_hand.trained(
        bench, lambda step: feed.samples(step).tolist(), training.spec.loss, training.spec.train, rates
    )
    before = by_hand.load(bench.student).state_dict()
    found = by_hand.load(tmp_path).state_dict()
    for name, weight in right.items():
        moved = (weight - before[name]).norm()
        assert (found[name] - weight).norm() < 1e-2 * moved, name


def test_the_logged_norm_is_that_before_clipping(bench: Bench, tmp_path: Path) -> None:
    recorder = Recorder()
    training = training_for(bench, tmp_path, max_grad_norm=1e-3, max_steps=1)
    train(training, recorder)
    rows = of_caches([Cache.open(bench.cache)])
    members = PlannedBatches(rows, rows.split(None)[0], seed=0, batch_tokens=600).samples(0).tolist()
    gradients, _ = by_hand.step_gradients(bench, by_hand.load(bench.student), members, training.spec.loss)
    norm = torch.stack([gradient.square().sum() for gradient in gradients.values()]).sum().sqrt()
    assert recorder.values("step", "grad_norm") == pytest.approx([float(norm)], rel=1e-5)


def test_every_step_and_every_run_seed_has_random_numbers_of_its_own(bench: Bench, tmp_path: Path) -> None:
    seeds = {}
    for name, seed in (("first", 0), ("again", 0), ("other", 1)):
        recorder = Seeds()
        train(training_for(bench, tmp_path / name, seed=seed, max_steps=2, batch_tokens=200), recorder)
        seeds[name] = [seed for step in recorder.seeds for seed in step]
    assert seeds["first"] == seeds["again"]
    assert len({*seeds["first"], *seeds["other"]}) == 4


def dropping(folder: Path, out: Path, share: float = 0.3) -> Path:
    """The student with dropout in its attention."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    model.config.attention_dropout = share
    model.save_pretrained(out)
    return make_tokenizer(out)


def test_dropout_is_on_in_every_step_and_off_in_every_evaluation(bench: Bench, tmp_path: Path) -> None:
    """Rates so small that the weights stay: what differs from the student without dropout is dropout."""
    found = {}
    for name, student in (("wet", dropping(bench.student, tmp_path / "student")), ("dry", bench.student)):
        recorder = Recorder()
        train(training_for(bench, tmp_path / name, student=student, lr=1e-12, eval_every=1, max_steps=3), recorder)
        found[name] = recorder
    for name in ("heldout_kl", "heldout_ce"):
        dry = found["dry"].values("eval", name)
        assert found["wet"].values("eval", name) == pytest.approx(dry, rel=1e-6)
        assert len(dry) == 4
    for wet, dry in zip(*(found[name].values("step", "loss/mean") for name in ("wet", "dry")), strict=True):
        assert abs(wet - dry) > 1e-4 * dry


@pytest.mark.parametrize("epochs", [0.01, 0.45])
def test_a_run_takes_the_nearest_number_of_steps_to_its_epochs(epochs: float, bench: Bench, tmp_path: Path) -> None:
    recorder = Recorder()
    metrics = train(training_for(bench, tmp_path, epochs=epochs, max_steps=None, batch_tokens=400), recorder)
    (an_epoch,) = recorder.values("start", "steps_per_epoch")
    steps = max(int(an_epoch * epochs + 0.5), 1)
    assert an_epoch * epochs < steps, "rounding down is another number"
    assert recorder.values("step", "step") == list(range(1, steps + 1))
    assert (metrics["num_steps"], metrics["trained_tokens"]) == (steps, sum(recorder.values("step", "num_tokens")))
