"""What is refused before anything is computed: wrong arguments and tensors that do not fit."""

import math
from typing import Any

import pytest
import torch
from tests.stages.loss.cases import make_inputs, outcome, truth

from kdpipe.manifests.errors import ConfigError
from kdpipe.stages.loss import fused_distill_loss


def test_a_student_in_float16_is_refused_where_gradients_are_wanted() -> None:
    inputs = make_inputs(dtype=torch.float16)
    tensors = (inputs.student_hidden, inputs.student_head, inputs.teacher_hidden, inputs.teacher_head)
    with pytest.raises(ConfigError, match="float16 loses small gradients"):
        fused_distill_loss(*tensors)
    with torch.no_grad():
        found = fused_distill_loss(*tensors).kd
    torch.testing.assert_close(found, truth(inputs).out.kd.float(), rtol=1e-3, atol=0.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"divergence": "foward_kl"}, "did you mean 'forward_kl'"),
        ({"divergence": "jsd", "betta": 0.5}, "did you mean 'beta'"),
        ({"beta": 0.5}, "unknown option 'beta', it takes: none"),
        ({"divergence": "jsd", "beta": 1.5}, "must be a number in 0..1, got 1.5"),
        ({"divergence": "top_k_kl", "k": 2.5}, "must be a whole number in 1..65536, got 2.5"),
        ({"label_smoothing": 1.5}, "label_smoothing must be a number in 0..1"),
        ({"z_loss": -1.0}, "z_loss must be a number in 0..1e+06"),
        ({"token_keys": torch.arange(3)}, "expected 507 int64 keys, got torch.int64 [3]"),
        ({"divergence": "alpha_beta", "alpha": 1e-6}, "must be a number in 0 or 0.001..4, got 1e-06"),
        ({"divergence": ["jsd"]}, "unknown divergence"),
        ({"temperature": "hot"}, "temperature must be a number in 0.001..1000, got 'hot'"),
        ({"temperature": 1e-40}, "temperature must be a number in 0.001..1000, got 1e-40"),
        ({"kd_weight": True}, "kd_weight must be a number"),
        ({"student_softcap": math.inf}, "softcap must be a number above 0"),
        ({"teacher_scale": math.nan}, "scale must be a number other than 0"),
        ({"chunk_tokens": 2.5}, "chunk_tokens must be a whole number"),
        ({"vocab_size": 2.5}, "vocab_size is 2.5"),
        ({"seed": "a"}, "seed must be a whole number, got 'a'"),
        ({"token_weights": torch.full((507,), math.nan)}, "every weight must be finite"),
        ({"token_weights": torch.ones(507, dtype=torch.int64)}, "expected 507 floating-point weights, got torch.int64"),
        ({"kd_weight": 1.5}, "kd_weight must be a number in 0..1"),
        ({"kd_weight": 0.5, "labels": False}, "needs labels"),
        ({"temperature": 0.0}, "temperature must be a number in 0.001..1000"),
        ({"chunk_tokens": 0}, "chunk_tokens must be a whole number from 1 on"),
        ({"vocab_size": 252}, "the head has 251 rows, vocab_size is 252"),
        ({"student_softcap": 0.0}, "softcap must be a number above 0"),
        ({"student_bias": torch.zeros(250)}, "expected a bias of 251 numbers"),
    ],
)
def test_a_wrong_argument_is_one_line_that_names_it(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        outcome(fused_distill_loss, make_inputs(), **change)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("position", "wrong", "message"),
    [
        (0, torch.zeros(507, 122), "122 wide, the head takes 123"),
        (0, torch.zeros(507, 123, dtype=torch.float64), "the head is torch.float32"),
        (0, torch.zeros(1, 507, 123), "expected hidden [T, width]"),
        (2, torch.zeros(506, 77), "507 student rows and 506 teacher rows"),
        (2, None, "needs teacher_hidden and teacher_head"),
        (3, torch.zeros(251, 78), "E-CONFIG teacher: hidden states are 77 wide"),
        (4, torch.zeros(506, dtype=torch.int64), "expected 507 integer labels"),
        (4, torch.ones(507, dtype=torch.bool), "expected 507 integer labels, got torch.bool"),
        (4, [1] * 507, "expected 507 integer labels, got list"),
        (0, torch.zeros(507, 123, dtype=torch.complex64), "expected floating-point numbers, got torch.complex64"),
        (0, None, "expected a tensor, got NoneType"),
        (4, torch.full((507,), 251), "label 251 is outside the vocabulary of 251"),
        (4, torch.full((507,), -1), "label -1 is outside"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(position: int, wrong: torch.Tensor | None, message: str) -> None:
    inputs = make_inputs()
    tensors: list[Any] = [
        inputs.student_hidden,
        inputs.student_head,
        inputs.teacher_hidden,
        inputs.teacher_head,
        inputs.labels,
    ]
    tensors[position] = wrong
    with pytest.raises(ConfigError) as caught:
        fused_distill_loss(*tensors)
    assert message in str(caught.value)
