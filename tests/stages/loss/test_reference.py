"""The reference against formulas written out by hand, in fp64."""

import math
from typing import Any

import pytest
import torch
from tests.stages.loss.cases import CROSS_ENTROPIES, OF_TOKENS, SAMPLED, Inputs, make_inputs
from torch import Tensor

from kdpipe.stages.loss import DIVERGENCES, dense, reference_distill_loss


def logits_as_given(teacher: Tensor, student: Tensor) -> tuple[Tensor, ...]:
    """Arguments whose logits are these: identity heads."""
    eye = torch.eye(teacher.shape[1], dtype=torch.float64)
    return student, eye, teacher, eye


def kd_of(teacher: list[float], student: list[float], **arguments: Any) -> float:
    rows = [torch.tensor([each], dtype=torch.float64).log() for each in (teacher, student)]
    return float(reference_distill_loss(*logits_as_given(*rows), **arguments).kd)


def test_forward_and_reverse_kl_by_hand() -> None:
    forward = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    reverse = 0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5)
    assert kd_of([0.5, 0.5], [0.25, 0.75]) == pytest.approx(forward, rel=1e-12)
    assert kd_of([0.5, 0.5], [0.25, 0.75], divergence="reverse_kl") == pytest.approx(reverse, rel=1e-12)


def test_jsd_by_hand_in_trls_orientation() -> None:
    # beta 0.2: M = 0.8 S + 0.2 T = [0.3, 0.7]
    teacher_to_m = 0.5 * math.log(0.5 / 0.3) + 0.5 * math.log(0.5 / 0.7)
    student_to_m = 0.25 * math.log(0.25 / 0.3) + 0.75 * math.log(0.75 / 0.7)
    found = kd_of([0.5, 0.5], [0.25, 0.75], divergence="jsd", beta=0.2)
    assert found == pytest.approx(0.2 * teacher_to_m + 0.8 * student_to_m, rel=1e-12)


def test_jsd_ends_are_forward_and_reverse_kl() -> None:
    for beta, name in ((0.0, "forward_kl"), (1.0, "reverse_kl")):
        ends = [kd_of([0.6, 0.3, 0.1], [0.2, 0.3, 0.5], divergence="jsd", beta=beta)]
        ends.append(kd_of([0.6, 0.3, 0.1], [0.2, 0.3, 0.5], divergence=name))
        assert ends[0] == ends[1]


def test_temperature_divides_both_logits_and_t2_multiplies_the_sum() -> None:
    # Halving logits takes the square root of odds: 4:1 becomes 2:1, 1:1 stays.
    expected = 2 / 3 * math.log(2 / 3 / 0.5) + 1 / 3 * math.log(1 / 3 / 0.5)
    assert kd_of([0.8, 0.2], [0.5, 0.5], temperature=2.0) == pytest.approx(expected, rel=1e-12)
    assert kd_of([0.8, 0.2], [0.5, 0.5], temperature=2.0, scale_t2=True) == pytest.approx(4 * expected, rel=1e-12)


@pytest.mark.parametrize("divergence", sorted(DIVERGENCES.keys() - CROSS_ENTROPIES - SAMPLED))
def test_every_divergence_is_zero_for_equals_and_positive_otherwise(divergence: str) -> None:
    options = {"k": 2} if "k" in DIVERGENCES[divergence].options else {}
    equal = kd_of([0.7, 0.2, 0.1], [0.7, 0.2, 0.1], divergence=divergence, **options)
    assert equal == pytest.approx(0.0, abs=1e-14)
    assert kd_of([0.7, 0.2, 0.1], [0.1, 0.2, 0.7], divergence=divergence, **options) > 0.05


T, S = [0.5, 0.3, 0.2], [0.2, 0.2, 0.6]
BY_HAND = {
    "skew_kl": 0.5 * math.log(0.5 / 0.23) + 0.3 * math.log(0.3 / 0.21) + 0.2 * math.log(0.2 / 0.56),
    "skew_reverse_kl": 0.2 * math.log(0.2 / 0.47) + 0.2 * math.log(0.2 / 0.29) + 0.6 * math.log(0.6 / 0.24),
    "symmetric_kl": 0.5 * (0.3 * math.log(0.5 / 0.2) + 0.1 * math.log(0.3 / 0.2) - 0.4 * math.log(0.2 / 0.6)),
    "tvd": 0.4,
    "top1_ce": -0.5 * math.log(0.2),
    "soft_cross_entropy": -0.8 * math.log(0.2) - 0.2 * math.log(0.6),
    # the tail is {0.2, 0.3}: h = 0.3, t = 0.5
    "adaptive_kl": 0.375 * (0.5 * math.log(2.5) + 0.3 * math.log(1.5) + 0.2 * math.log(1 / 3))
    + 0.625 * (0.2 * math.log(0.4) + 0.2 * math.log(2 / 3) + 0.6 * math.log(3)),
    "alpha_beta": sum(0.2 * t**0.9 + 0.7 * s**0.9 - 0.9 * t**0.2 * s**0.7 for t, s in zip(T, S, strict=True)) / 0.126,
    "top_k_kl": 0.5 * math.log(0.5 / 0.2) + 0.5 * math.log(0.5 / 0.8),
    "top_k_reverse_kl": 0.2 * math.log(0.2 / 0.5) + 0.8 * math.log(0.8 / 0.5),
    # k = 2: teacher's first two are 0 and 1 (student 0.2, 0.2), the student's are 2 and 0 (0.6, 0.2; teacher 0.2, 0.5);
    # pairs that count: student's 0.6 > 0.2 and > 0.5; for its 0.2 neither. (0.6 - 0.2) + (0.2 - 0.2).
    "hierarchical_ranking": 0.4,
}


@pytest.mark.parametrize("divergence", BY_HAND)
def test_values_by_hand(divergence: str) -> None:
    options = {"top_k_kl": {"k": 1}, "top_k_reverse_kl": {"k": 1}, "hierarchical_ranking": {"k": 2}}.get(divergence, {})
    assert kd_of(T, S, divergence=divergence, **options) == pytest.approx(BY_HAND[divergence], rel=1e-12)


def test_a_sample_by_hand() -> None:
    log_t, log_s = torch.tensor([T, S], dtype=torch.float64).log()[:, None]
    draws = torch.tensor([[0.1, 0.6, 0.9, 0.85]], dtype=torch.float64)  # by T's sums 0.5, 0.8, 1: tokens 0, 1, 2, 2
    gaps = [math.log(0.5 / 0.2), math.log(0.3 / 0.2), math.log(0.2 / 0.6)]
    found = dense.sampled_kl(log_t, log_s, samples=4, power=1.0, draws=draws)
    assert float(found) == pytest.approx((gaps[0] + gaps[1] + 2 * gaps[2]) / 4, rel=1e-12)
    # power 0 draws every token alike, the same four here, and weighs them by 3 T.
    found = dense.sampled_kl(log_t, log_s, samples=4, power=0.0, draws=draws)
    assert float(found) == pytest.approx((1.5 * gaps[0] + 0.9 * gaps[1] + 1.2 * gaps[2]) / 4, rel=1e-12)


def test_label_smoothing_and_z_loss_by_hand() -> None:
    logits = torch.tensor([[1.0, 2.0, 3.0]], dtype=torch.float64)
    log_total = math.log(math.exp(1) + math.exp(2) + math.exp(3))
    out = reference_distill_loss(
        *logits_as_given(logits, logits), torch.tensor([1]), kd_weight=0.25, label_smoothing=0.3, z_loss=0.01
    )
    ce = log_total - (0.7 * 2.0 + 0.1 * (1.0 + 2.0 + 3.0))
    assert float(out.ce) == pytest.approx(ce, rel=1e-12)
    assert float(out.z) == pytest.approx(log_total**2, rel=1e-12)
    assert float(out.loss) == pytest.approx(0.75 * ce + 0.01 * log_total**2, rel=1e-12)


def test_metrics_by_hand() -> None:
    rows = [torch.tensor([each, [0.3, 0.4, 0.3]], dtype=torch.float64).log() for each in (T, S)]
    metrics = reference_distill_loss(*logits_as_given(*rows)).metrics
    entropy = -sum(p * math.log(p) for p in (0.5, 0.3, 0.2, 0.3, 0.4, 0.3))
    assert float(metrics.teacher_entropy) == pytest.approx(entropy, rel=1e-12)
    assert float(metrics.top1_agree) == 0.0  # of the first token
    assert (float(metrics.top_k_mass), metrics.num_ranked) == (pytest.approx(1.0), 1)


def test_alpha_beta_holds_its_relatives() -> None:
    for alpha, beta, name in ((1.0, 0.0, "forward_kl"), (0.0, 1.0, "reverse_kl")):
        found = kd_of(T, S, divergence="alpha_beta", alpha=alpha, beta=beta)
        assert found == pytest.approx(kd_of(T, S, divergence=name), rel=1e-12)
        near = kd_of(T, S, divergence="alpha_beta", alpha=max(alpha, 1e-3), beta=max(beta, 1e-3))
        assert near == pytest.approx(found, rel=2e-2)


# Their weights are constants to the gradient.
@pytest.mark.parametrize("divergence", [name for name in DIVERGENCES if name not in {"adaptive_kl", *OF_TOKENS}])
def test_gradients_agree_with_finite_differences(divergence: str) -> None:
    small = make_inputs(3, 7).to(torch.float64)

    def loss(*leaves: Tensor) -> Tensor:
        hidden, head, bias = leaves
        return reference_distill_loss(
            hidden,
            head,
            small.teacher_hidden,
            small.teacher_head,
            small.labels,
            divergence=divergence,
            **({"k": 3} if "k" in DIVERGENCES[divergence].options else {}),  # type: ignore[arg-type]
            kd_weight=0.6,
            temperature=1.5,
            student_bias=bias,
            student_softcap=3.0,
            student_scale=0.8,
        ).loss

    assert torch.autograd.gradcheck(loss, small.leaves)


def test_the_mix_is_the_weighted_sum_of_what_is_reported() -> None:
    inputs: Inputs = make_inputs().to(torch.float64)
    tensors = (inputs.student_hidden, inputs.student_head, inputs.teacher_hidden, inputs.teacher_head)
    out = reference_distill_loss(*tensors, inputs.labels, kd_weight=0.25)
    assert float(out.loss.detach()) == pytest.approx(0.25 * float(out.kd) + 0.75 * float(out.ce), rel=1e-12)


def test_scale_comes_before_softcap_and_after_bias() -> None:
    # Cohere and Granite scale the head's output, bias included; Gemma caps what comes last.
    hidden, eye = torch.tensor([[1.0, 2.0]], dtype=torch.float64), torch.eye(2, dtype=torch.float64)
    bias = torch.tensor([0.5, -0.5], dtype=torch.float64)
    label = torch.tensor([1])
    out = reference_distill_loss(
        hidden, eye, None, None, label, kd_weight=0.0, student_bias=bias, student_scale=2.0, student_softcap=4.0
    )
    first, second = 4 * math.tanh(2 * 1.5 / 4), 4 * math.tanh(2 * 1.5 / 4)
    assert float(out.ce) == pytest.approx(math.log(1 + math.exp(first - second)), rel=1e-12)
    shifted = reference_distill_loss(
        hidden, eye, None, None, label, kd_weight=0.0, student_scale=2.0, student_softcap=4.0
    )
    gap = 4 * math.tanh(2 * 1.0 / 4) - 4 * math.tanh(2 * 2.0 / 4)
    assert float(shifted.ce) == pytest.approx(math.log(1 + math.exp(gap)), rel=1e-12)
