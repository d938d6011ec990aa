"""The learning rate of every step, to the last digit."""

import math
from pathlib import Path

import pytest
from tests.conftest import Bench
from tests.stages.ranks import Recorder
from tests.stages.train.test_train import training_for

from kdpipe.manifests.specs import TrainSpec
from kdpipe.stages.train import train
from kdpipe.stages.train.schedule import learning_rate

RISE = [1 / 3, 2 / 3]
FALLS = {
    "cosine": [(1 + math.cos(math.pi * eighth / 8)) / 2 for eighth in range(8)],
    "linear": [1.0, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8],
    "constant": [1.0] * 8,
}
"""Of ten steps, two of which are the warm-up: the fall would be at its end in the eleventh."""


@pytest.mark.parametrize("floor", [0.0, 0.1])
@pytest.mark.parametrize("schedule", FALLS)
def test_every_rate_is_that_of_the_schedule(schedule: str, floor: float) -> None:
    spec = TrainSpec.model_validate({"lr": 0.5, "schedule": schedule, "warmup_ratio": 0.2, "min_lr_ratio": floor})
    fall = [0.5 * (floor + (1 - floor) * share) for share in FALLS[schedule]]
    rates = [learning_rate(step, 10, spec) for step in range(10)]
    assert rates == pytest.approx([0.5 * share for share in RISE] + fall, rel=1e-12)
    assert min(rates) > 0.0


@pytest.mark.parametrize(("ratio", "first"), [(0.0, [1.0, 0.75]), (0.24, [1.0, 0.75]), (0.25, [0.5, 1.0])])
def test_a_part_of_a_warm_up_step_is_none(ratio: float, first: list[float]) -> None:
    spec = TrainSpec(lr=1.0, schedule="linear", warmup_ratio=ratio)
    assert [learning_rate(step, 4, spec) for step in range(2)] == pytest.approx(first, rel=1e-12)


def test_a_warm_up_of_all_steps_never_falls() -> None:
    spec = TrainSpec(lr=1.0, warmup_ratio=1.0)
    assert [learning_rate(step, 4, spec) for step in range(4)] == pytest.approx([0.2, 0.4, 0.6, 0.8], rel=1e-12)


def test_a_step_is_taken_and_logged_at_its_own_rate(bench: Bench, tmp_path: Path) -> None:
    """Four steps without a floor; the optimizer has the rate that is logged, see test_train_steps."""
    recorder = Recorder()
    train(training_for(bench, tmp_path, lr=2e-3, schedule="linear", warmup_ratio=0.25, max_steps=4), recorder)
    assert recorder.values("step", "lr") == pytest.approx([1e-3, 2e-3, 2e-3 * 2 / 3, 2e-3 / 3], rel=1e-12)
