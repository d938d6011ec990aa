"""Presets: the value is that project's, worked out here by its formula in plain arithmetic."""

import math

import pytest
import torch
from tests.stages.loss.cases import arguments_of

from kdpipe.manifests.specs import PRESETS, LossSpec
from kdpipe.stages.loss import reference_distill_loss

T, S = [0.5, 0.3, 0.2], [0.2, 0.2, 0.6]
LABEL = 1
KL = sum(t * math.log(t / s) for t, s in zip(T, S, strict=True))
SOFT_CE = -sum(t * math.log(s) for t, s in zip(T, S, strict=True))
CE = -math.log(S[LABEL])
M = [(t + s) / 2 for t, s in zip(T, S, strict=True)]
JSD = sum(t * math.log(t / m) + s * math.log(s / m) for t, s, m in zip(T, S, M, strict=True)) / 2


def loss_of(**keys: object) -> float:
    """The loss of one token with these probabilities."""
    eye = torch.eye(3, dtype=torch.float64)
    teacher, student = (torch.tensor([each], dtype=torch.float64).log() for each in (T, S))
    arguments = arguments_of(LossSpec.model_validate(keys))
    return float(reference_distill_loss(student, eye, teacher, eye, torch.tensor([LABEL]), **arguments).loss)


@pytest.mark.parametrize(
    ("preset", "value"),
    [
        ("kdflow", 0.5 * CE + 0.5 * KL),  # (1 - kd_ratio) * nll + kd_ratio * kl
        ("trl", JSD),
        ("torchtune", 0.5 * CE + 0.5 * SOFT_CE),  # ForwardKLLoss leaves out the teacher's entropy
        ("distillkit", 0.5 * CE + 0.5 * KL),
    ],
)
def test_a_preset_gives_its_projects_value(preset: str, value: float) -> None:
    assert loss_of(preset=preset) == pytest.approx(value, rel=1e-12)


def test_every_preset_has_a_value_above_or_is_compared_with_its_project_across_tokenizers() -> None:
    assert set(PRESETS) == {"kdflow", "trl", "torchtune", "distillkit", "trl-gold", "trl-uld"}


def test_distillkit_multiplies_by_the_temperature_squared_and_kdflow_does_not() -> None:
    def warm(probabilities: list[float]) -> list[float]:
        raised = [p**0.5 for p in probabilities]
        return [p / sum(raised) for p in raised]

    kl = sum(t * math.log(t / s) for t, s in zip(warm(T), warm(S), strict=True))
    assert loss_of(preset="distillkit", temperature=2.0) == pytest.approx(0.5 * CE + 0.5 * 4 * kl, rel=1e-12)
    assert loss_of(preset="kdflow", temperature=2.0) == pytest.approx(0.5 * CE + 0.5 * kl, rel=1e-12)


def test_kdflows_jsd_is_ours_with_the_other_beta() -> None:
    # Its M is b S + (1 - b) T with b KL(S || M) + (1 - b) KL(T || M).
    b = 0.2
    m = [b * s + (1 - b) * t for t, s in zip(T, S, strict=True)]
    theirs = sum(b * s * math.log(s / x) + (1 - b) * t * math.log(t / x) for t, s, x in zip(T, S, m, strict=True))
    ours = loss_of(preset="kdflow", divergence="jsd", options={"beta": 1 - b}, kd_weight=1.0)
    assert ours == pytest.approx(theirs, rel=1e-12)


def test_keys_beside_a_preset_win() -> None:
    spec = LossSpec(preset="trl", kd_weight=0.9, divergence="forward_kl")
    assert (spec.kd_weight, spec.divergence, spec.options) == (0.9, "forward_kl", {})
    assert LossSpec(preset="trl", options={"beta": 0.25}).options == {"beta": 0.25}
