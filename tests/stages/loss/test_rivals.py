"""The fused loss against the rivals' own installed code, on the same inputs: values and gradients."""

# Shapes: T tokens, V vocabulary.

import warnings
from typing import Any

import pytest
import torch
from tests.stages.loss.cases import Inputs, arguments_of, make_inputs
from torch import Tensor

from kdpipe.manifests.specs import LossSpec
from kdpipe.stages.loss import fused_distill_loss

trl = pytest.importorskip("trl", reason="make rivals")
liger = pytest.importorskip("liger_kernel.chunked_loss", reason="make rivals")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from trl.experimental.gkd.gkd_trainer import GKDTrainer
    from trl.trainer.distillation_trainer import _chunked_divergence_loss as trl_chunked_loss

BETAS = [0.0, 0.1, 0.5, 1.0]


def logits_of(inputs: Inputs) -> tuple[Tensor, Tensor]:
    return inputs.student_hidden @ inputs.student_head.T, inputs.teacher_hidden @ inputs.teacher_head.T


def gradients(loss: Tensor, inputs: Inputs) -> list[Tensor]:
    return list(torch.autograd.grad(loss, [inputs.student_hidden, inputs.student_head]))


def ours(inputs: Inputs, labels: Tensor | None = None, **arguments: Any) -> Tensor:
    tensors = (inputs.student_hidden, inputs.student_head, inputs.teacher_hidden, inputs.teacher_head)
    return fused_distill_loss(*tensors, labels, **arguments).loss


def assert_same(found: Tensor, theirs: Tensor, inputs: Inputs, rel: float = 2e-6) -> None:
    assert float(found.detach()) == pytest.approx(float(theirs.detach()), rel=rel)
    for mine, other in zip(gradients(found, inputs), gradients(theirs, inputs), strict=True):
        assert (mine - other).norm() <= 2 * rel * other.norm()


@pytest.mark.parametrize("temperature", [1.0, 0.9, 3.0])
@pytest.mark.parametrize("beta", BETAS)
def test_jsd_is_trls_generalized_jsd(beta: float, temperature: float) -> None:
    inputs = make_inputs()
    student, teacher = logits_of(inputs)
    theirs = GKDTrainer.generalized_jsd_loss(
        student[None], teacher[None], beta=beta, temperature=temperature, reduction="sum"
    )
    assert_same(ours(inputs, divergence="jsd", beta=beta, temperature=temperature), theirs, inputs)


def test_trls_mean_is_the_sum_over_labelled_tokens_once_divided() -> None:
    inputs = make_inputs()
    student, teacher = logits_of(inputs)
    theirs = GKDTrainer.generalized_jsd_loss(student[None], teacher[None], inputs.labels[None])
    labelled = inputs.labels != -100
    found = ours(inputs, divergence="jsd", token_weights=labelled.float()) / labelled.sum()
    assert_same(found, theirs, inputs)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("beta", BETAS)
def test_jsd_is_trls_chunked_one_with_bias_scale_and_softcap(beta: float, temperature: float) -> None:
    inputs = make_inputs()
    touches: dict[str, Any] = {"temperature": temperature}
    theirs, _, count = trl_chunked_loss(
        inputs.student_hidden[None],
        inputs.teacher_hidden[None],
        inputs.student_head,
        inputs.teacher_head,
        torch.ones(1, 507),
        beta,
        num_items_in_batch=1,
        student_lm_head_bias=inputs.student_bias,
        teacher_lm_head_bias=inputs.teacher_bias,
        student_logit_scale=0.7,
        teacher_logit_scale=1.3,
        student_final_logit_softcapping=4.0,
        teacher_final_logit_softcapping=6.0,
        **touches,
    )
    touches |= {"student_bias": inputs.student_bias, "teacher_bias": inputs.teacher_bias}
    touches |= {"student_scale": 0.7, "teacher_scale": 1.3, "student_softcap": 4.0, "teacher_softcap": 6.0}
    assert int(count) == 507
    assert_same(ours(inputs, divergence="jsd", beta=beta, **touches), theirs, inputs)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("beta", BETAS)
def test_jsd_with_cross_entropy_is_ligers_fused_one(beta: float, temperature: float) -> None:
    inputs = make_inputs()
    labels = torch.arange(507) % 251
    theirs = liger.LigerFusedLinearJSDLoss(
        weight_hard_loss=0.3, weight_soft_loss=0.7, beta=beta, temperature=temperature, compiled=False, chunk_size=128
    )(inputs.student_hidden, inputs.student_head, inputs.teacher_hidden, inputs.teacher_head, labels)
    found = ours(inputs, labels, divergence="jsd", beta=beta, temperature=temperature, kd_weight=0.7) / 507
    assert_same(found, theirs, inputs)


def test_trls_preset_is_what_its_trainer_computes() -> None:
    """GKDTrainer.compute_loss hands its loss beta alone: the temperature of its config is that of sampling."""
    inputs = make_inputs()
    student, teacher = logits_of(inputs)
    theirs = GKDTrainer.generalized_jsd_loss(student[None], teacher[None], reduction="sum")
    assert_same(ours(inputs, inputs.labels, **arguments_of(LossSpec(preset="trl"))), theirs, inputs)
