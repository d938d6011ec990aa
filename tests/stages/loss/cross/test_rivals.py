"""The fused methods against TRL's installed GOLD on the same tensors: equal, with gradients, where definitions are."""

# Shapes: R rows of the student, P rows of the teacher, V and U their vocabularies.

import os
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.stages.loss.cross.cases import Case, make_case
from tokenizers import Tokenizer, models
from torch import Tensor

from kdpipe.manifests.specs import LossSpec
from kdpipe.stages.loss.cross import distill_across

pytest.importorskip("trl", reason="make rivals")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from trl.experimental.gold.gold_trainer import ULDLoss

DEFAULTS: dict[str, Any] = {
    "uld_crossentropy_weight": 0.0,
    "uld_distillation_weight": 1.0,
    "uld_student_temperature": 1.0,
    "uld_teacher_temperature": 1.0,
    "uld_skip_student_eos": False,
    "uld_skip_teacher_eos": False,
    "use_extended_uld": True,
    "uld_token_merge_strategy": "observed",
    "uld_use_hybrid_loss": False,
    "uld_hybrid_matched_weight": None,
    "uld_hybrid_unmatched_weight": None,
    "beta": 0.5,
}
"""GOLDConfig's, but that no end of text is skipped: our spans have none that is to be."""


def logits_of(case: Case) -> tuple[Tensor, Tensor]:
    """[R, V] and [P, U], differentiable."""
    vocabulary = case.vocabulary
    return (
        case.student.head.logits(case.student_hidden, vocabulary.student_size),
        case.teacher.head.logits(case.teacher.hidden, vocabulary.teacher_size),
    )


def vocabularies(case: Case) -> tuple[Tokenizer, Tokenizer]:
    """Two tokenizers in which the shared tokens have one name, and no others."""
    own = {f"student {index}": index for index in range(case.vocabulary.student_size)}
    theirs = {f"teacher {index}": index for index in range(case.vocabulary.teacher_size)}
    for one, other in zip(case.vocabulary.student_ids.tolist(), case.vocabulary.teacher_ids.tolist(), strict=True):
        del own[f"student {one}"], theirs[f"teacher {other}"]
        own[f"shared {one}"] = one
        theirs[f"shared {one}"] = other
    return Tokenizer(models.WordLevel(own)), Tokenizer(models.WordLevel(theirs))


def offsets_of(runs: Tensor, pace: int) -> Tensor:
    """Byte offsets [rows, 2] in a text of 100 bytes a span, whose tokens end every `pace` bytes and at its end."""
    ends = [
        100 * span + (100 if place == count - 1 else pace * (place + 1))
        for span, (_, count) in enumerate(runs.tolist())
        for place in range(count)
    ]
    return torch.tensor([[start, end] for start, end in zip([0, *ends[:-1]], ends, strict=True)])


def trl_loss(case: Case, **changes: Any) -> Tensor:
    """TRL's loss of one sample, by its own code: the mean over groups of tokens.

    bayesian: row j predicts token j of the answer. observed: it takes the row after, so the rows are given one later.
    """
    config = SimpleNamespace(**DEFAULTS | changes)
    first = int(config.uld_token_merge_strategy == "observed")

    def padded(values: Tensor, before: int, after: int, fill: float = 0) -> Tensor:
        return torch.nn.functional.pad(values, (*(0, 0) * (values.dim() - 1), before, after), value=fill)[None]

    spans, (own, theirs) = case.spans, logits_of(case)
    tokens = padded(spans.student_tokens, 1, 0), padded(spans.teacher_tokens, 1, 0)
    labels = padded(spans.student_tokens, 1, 0, -100), padded(spans.teacher_tokens, 1, 0, -100)
    offsets = padded(offsets_of(spans.student, 7), 1, 0), padded(offsets_of(spans.teacher, 11), 1, 0)
    logits = padded(own, first, 1 - first), padded(theirs, first, 1 - first)
    return ULDLoss(config, *vocabularies(case))(*logits, *labels, *tokens, *offsets)


def our_loss(case: Case, method: str, **spec: Any) -> Tensor:
    loss = LossSpec(**{"kd_weight": 1.0} | spec)
    out = distill_across(
        case.student, case.teacher, case.spans, None, method=method, loss=loss, vocabulary=case.vocabulary
    )
    return out.loss / len(case.spans)


def assert_same(case: Case, found: Tensor, theirs: Tensor, rel: float = 3e-6) -> None:
    assert float(found.detach()) == pytest.approx(float(theirs.detach()), rel=rel)
    leaves = [case.student_hidden, case.student_head, case.student_bias]
    mine, others = (torch.autograd.grad(loss, leaves) for loss in (found, theirs))
    for one, other in zip(mine, others, strict=True):
        assert (one - other).norm() <= 3 * rel * other.norm()


def covered(**changes: Any) -> Case:
    return make_case(covered=True, **{"scale": 0.5} | changes)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("sizes", [(53, 61), (61, 53)])
def test_uld_is_trls_on_texts_of_one_cut(sizes: tuple[int, int], temperature: float) -> None:
    """Without its extension TRL pairs rows by their number: the same rows where every span is one token."""
    case = covered(exact=1.0, sizes=sizes)
    warm = {"uld_student_temperature": temperature, "uld_teacher_temperature": temperature}
    theirs = trl_loss(case, use_extended_uld=False, uld_token_merge_strategy="bayesian", **warm)
    assert_same(case, our_loss(case, "uld", preset="trl-uld", temperature=temperature), theirs)


@pytest.mark.parametrize("beta", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize(("strategy", "first_row"), [("bayesian", 0), ("observed", 1)])
def test_gold_is_trls_hybrid_loss_of_merged_spans(strategy: str, first_row: int, beta: float) -> None:
    case = covered()
    theirs = trl_loss(case, uld_use_hybrid_loss=True, uld_token_merge_strategy=strategy, beta=beta)
    options = {"first_row": float(first_row), "beta": beta}
    assert_same(case, our_loss(case, "gold", preset="trl-gold", options=options), theirs)


def test_golds_preset_is_trls_default_but_for_the_row_that_it_starts_from() -> None:
    case = covered(exact=0.3)
    theirs = trl_loss(case, uld_use_hybrid_loss=True, uld_token_merge_strategy="bayesian")
    assert_same(case, our_loss(case, "gold", preset="trl-gold"), theirs)


def test_gold_takes_trls_weights_and_temperature() -> None:
    case = covered()
    weights = {"uld_hybrid_matched_weight": 0.7, "uld_hybrid_unmatched_weight": 0.4}
    warm = {"uld_student_temperature": 1.7, "uld_teacher_temperature": 1.7}
    theirs = trl_loss(case, uld_use_hybrid_loss=True, uld_token_merge_strategy="bayesian", **weights, **warm)
    options = {"beta": 0.5, "matched_weight": 0.7, "unmatched_weight": 0.4}
    assert_same(case, our_loss(case, "gold", preset="trl-gold", temperature=1.7, options=options), theirs)
