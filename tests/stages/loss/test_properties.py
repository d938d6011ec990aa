"""What holds for any two rows of logits, whatever the divergence."""

# Shapes: T tokens, V vocabulary.

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tests.stages.loss.cases import OF_TOKENS, SAMPLED
from torch import Tensor

from kdpipe.stages.loss import DIVERGENCES, fused_distill_loss
from kdpipe.stages.loss.reference import reference_distill_loss

SIZES = {"num_tokens": st.integers(1, 5), "vocab": st.integers(6, 70), "scale": st.floats(0.1, 20.0)}
SEEDS = st.integers(0, 2**31)
# Their value is 0 wherever rankings agree, or outside of the entries they look at.
BLIND = {"hierarchical_ranking", "top1_ce"}
ROUNDING = 1e-7
"""Of a value that is nearly 0: fp32 sums may end a little below it: the example is 2.2e-8 and comes out as -1.2e-9."""
EXACT = sorted(DIVERGENCES.keys() - SAMPLED)


def logits_of(seed: int, num_tokens: int, vocab: int, scale: float) -> tuple[Tensor, Tensor]:
    """Teacher's and student's logits [T, V]."""
    generator = torch.Generator().manual_seed(seed)
    teacher, student = torch.randn(2, num_tokens, vocab, generator=generator).mul(scale)
    return teacher, student


def kd_of(
    teacher: Tensor, student: Tensor, divergence: str, loss: Callable[..., Any] = fused_distill_loss, **arguments: Any
) -> float:
    eye = torch.eye(teacher.shape[1], dtype=teacher.dtype)
    if "k" in DIVERGENCES[divergence].options:
        arguments["k"] = 4
    if divergence in OF_TOKENS:
        arguments["next_tokens"] = teacher[:, :4].argmax(-1)
    return float(loss(student, eye, teacher, eye, divergence=divergence, **arguments).kd)


@pytest.mark.parametrize("divergence", EXACT)
@settings(max_examples=25, deadline=None)
@given(seed=SEEDS, **SIZES)
@example(seed=56, num_tokens=1, vocab=6, scale=15.0)
def test_it_is_never_negative_and_above_0_for_unequal_models(
    divergence: str, seed: int, num_tokens: int, vocab: int, scale: float
) -> None:
    teacher, student = logits_of(seed, num_tokens, vocab, scale)
    value = kd_of(teacher, student, divergence)
    truth = kd_of(teacher.double(), student.double(), divergence, loss=reference_distill_loss)
    assert value >= 0.0 or abs(value - truth) < ROUNDING > truth
    if divergence not in BLIND:
        assert value > 0.0 or truth < ROUNDING


@pytest.mark.parametrize("divergence", DIVERGENCES)
@settings(max_examples=15, deadline=None)
@given(seed=SEEDS, shift=st.floats(-50.0, 50.0), **SIZES)
def test_a_number_added_to_all_logits_of_a_row_changes_nothing(
    divergence: str, seed: int, num_tokens: int, vocab: int, scale: float, shift: float
) -> None:
    teacher, student = logits_of(seed, num_tokens, vocab, scale)
    moved = kd_of(teacher + shift, student - shift, divergence)
    # The sum rounds the logits themselves.
    assert moved == pytest.approx(kd_of(teacher, student, divergence), rel=1e-3, abs=1e-4 * num_tokens)


@pytest.mark.parametrize("divergence", EXACT)
@settings(max_examples=15, deadline=None)
@given(seed=SEEDS, **SIZES)
def test_the_order_of_the_vocabulary_does_not_matter(
    divergence: str, seed: int, num_tokens: int, vocab: int, scale: float
) -> None:
    teacher, student = logits_of(seed, num_tokens, vocab, scale)
    order = torch.randperm(vocab, generator=torch.Generator().manual_seed(seed))
    shuffled = kd_of(teacher[:, order], student[:, order], divergence)
    assert shuffled == pytest.approx(kd_of(teacher, student, divergence), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@settings(max_examples=15, deadline=None)
@given(seed=SEEDS, chunk_tokens=st.integers(1, 6), **SIZES)
def test_it_is_the_sum_of_its_tokens_in_chunks_of_any_size(
    divergence: str, seed: int, num_tokens: int, vocab: int, scale: float, chunk_tokens: int
) -> None:
    teacher, student = logits_of(seed, num_tokens, vocab, scale)
    single = [
        kd_of(teacher[at : at + 1], student[at : at + 1], divergence, token_keys=torch.tensor([at]))
        for at in range(num_tokens)
    ]
    whole = kd_of(teacher, student, divergence, chunk_tokens=chunk_tokens)
    assert whole == pytest.approx(sum(single), rel=1e-5, abs=1e-7)
