"""Token metrics against the dense formulas in fp64."""

import pytest
import torch
from tests.stages.loss.cases import make_inputs

from kdpipe.manifests.errors import ConfigError
from kdpipe.stages.loss import Head, Side, reference_distill_loss, token_metrics
from kdpipe.stages.loss.metrics import HEAD_ROWS


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_metrics_are_sums_over_the_labelled_tokens(dtype: torch.dtype) -> None:
    inputs = make_inputs(1031, teacher_rows=264, dtype=dtype)  # more than two chunks
    student = Head(inputs.student_head, inputs.student_bias, softcap=5.0)
    teacher = Head(inputs.teacher_head, inputs.teacher_bias, scale=0.8)
    found = token_metrics(Side(inputs.student_hidden, student), [Side(inputs.teacher_hidden, teacher)], inputs.labels)

    kept = inputs.labels != -100
    exact = inputs.to(torch.float64)
    logits = {
        "student": Head(exact.student_head, exact.student_bias, softcap=5.0).logits(exact.student_hidden[kept], 251),
        "teacher": Head(exact.teacher_head, exact.teacher_bias, scale=0.8).logits(exact.teacher_hidden[kept], 251),
    }
    eye, labels = torch.eye(251, dtype=torch.float64), inputs.labels[kept]
    forward = reference_distill_loss(logits["student"], eye, logits["teacher"], eye, labels)
    reverse = reference_distill_loss(logits["student"], eye, logits["teacher"], eye, divergence="reverse_kl")
    teacher_ce = reference_distill_loss(logits["teacher"], eye, None, None, labels, kd_weight=0.0).ce
    agree = (logits["student"].argmax(-1) == logits["teacher"].argmax(-1)).sum()

    for name, right in {
        "forward_kl": forward.kd,
        "reverse_kl": reverse.kd,
        "ce": forward.ce,
        "teacher_ce": teacher_ce,
    }.items():
        torch.testing.assert_close(getattr(found, name), right.double(), rtol=1e-6, atol=0.0)
    assert float(found.top1_agree) == float(agree)
    assert float(found.num_tokens) == int(kept.sum())


def test_without_a_teacher_the_cross_entropy_is_measured_alone() -> None:
    """The same bits as beside a teacher; what has to do with one is no number."""
    inputs = make_inputs(1031, teacher_rows=264)
    student, teacher = Head(inputs.student_head, inputs.student_bias), Head(inputs.teacher_head)
    alone = token_metrics(Side(inputs.student_hidden, student), [], inputs.labels, vocab_size=251)
    both = token_metrics(
        Side(inputs.student_hidden, student), [Side(inputs.teacher_hidden, teacher)], inputs.labels, vocab_size=251
    )
    assert (float(alone.ce), float(alone.num_tokens)) == (float(both.ce), float(both.num_tokens))
    for name in ("forward_kl", "reverse_kl", "top1_agree", "teacher_ce"):
        assert getattr(alone, name).isnan(), name


def test_a_head_that_is_widened_in_parts_is_whole() -> None:
    inputs = make_inputs(23, HEAD_ROWS * 2 + 5)
    found = token_metrics(
        Side(inputs.student_hidden, Head(inputs.student_head)),
        [Side(inputs.teacher_hidden, Head(inputs.teacher_head))],
        inputs.labels,
    )
    s, t = (
        (getattr(inputs, f"{owner}_hidden") @ getattr(inputs, f"{owner}_head").T).detach().double().log_softmax(-1)
        for owner in ("student", "teacher")
    )
    kept = inputs.labels != -100
    kl = (t.exp() * (t - s)).sum(-1)[kept].sum()
    ce = -s.gather(1, inputs.labels.clamp_min(0)[:, None])[kept].sum()
    torch.testing.assert_close(found.forward_kl, kl, rtol=1e-5, atol=0.0)
    torch.testing.assert_close(found.ce, ce, rtol=1e-5, atol=0.0)


def test_no_tokens_are_sums_of_zero() -> None:
    inputs = make_inputs(0)
    found = token_metrics(
        Side(inputs.student_hidden, Head(inputs.student_head)),
        [Side(inputs.teacher_hidden, Head(inputs.teacher_head))],
        inputs.labels,
    )
    assert torch.equal(found.flat(), torch.zeros(6, dtype=torch.float64))


def test_a_teacher_of_other_rows_is_refused() -> None:
    inputs = make_inputs()
    heads = Head(inputs.student_head), Head(inputs.teacher_head)
    with pytest.raises(ConfigError, match="507 student rows and 506 teacher rows"):
        token_metrics(Side(inputs.student_hidden, heads[0]), [Side(inputs.teacher_hidden[1:], heads[1])], inputs.labels)
