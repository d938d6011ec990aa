"""Every method across tokenizers, fused, against its dense definition in fp64: values and gradients."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.stages.loss.cross.cases import Case, errors, make_case, outcome
from torch.utils._python_dispatch import TorchDispatchMode

from kdpipe.manifests.errors import ConfigError
from kdpipe.manifests.specs import LossSpec
from kdpipe.stages.loss import DIVERGENCES, Side
from kdpipe.stages.loss.cross import METHODS, distill_across, extra_of, find_method, reference
from kdpipe.stages.loss.cross.reference import reference_across
from kdpipe.stages.loss.memory import keep_heap
from kdpipe.stages.loss.spans import Spans

EXACT = 3e-6
"""Relative, of fp32 against fp64."""
EVERYTHING: dict[str, Any] = {"temperature": 1.5, "scale_t2": True, "label_smoothing": 0.1, "z_loss": 1e-3}
COMBINATIONS = [(method.name, name) for method in METHODS.values() for name in method.divergences]
OPTIONS: list[tuple[str, dict[str, float], str]] = [
    ("gold", {"first_row": 1}, "jsd"),
    ("gold", {"matched_weight": 0.3, "unmatched_weight": 2.0}, "jsd"),
    ("gold", {"matched_weight": 1.0}, "forward_kl"),
    ("gold", {"beta": 0.2}, "jsd"),
    ("xtoken", {"decay": 0.0}, "forward_kl"),
    ("xtoken", {"decay": 1.0, "top_k": 2}, "jsd"),
    ("xtoken", {"hybrid": 1}, "forward_kl"),
    ("xtoken", {"hybrid": 1, "threshold": 0.95}, "reverse_kl"),
    ("xtoken", {"hybrid": 1, "threshold": 0.0, "decay": 0.7, "beta": 0.3}, "jsd"),
    ("chunk", {"tau": 1.0}, "forward_kl"),
    ("chunk", {"tau": 1e4}, "tvd"),
    ("dskd", {"only_right": 0}, "forward_kl"),
]


def assert_right(case: Case, method: str, *, allowed: float = EXACT, **spec: Any) -> None:
    chunked = spec.pop("chunk_tokens", None)
    right = outcome(reference_across, case.to(torch.float64), method, **spec)
    off = errors(outcome(distill_across, case, method, chunk_tokens=chunked, **spec), right)
    assert max(off.values()) < allowed, off


@pytest.mark.parametrize("chunk_tokens", [None, 7])
@pytest.mark.parametrize("kd_weight", [1.0, 0.6])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_its_definition(method: str, kd_weight: float, chunk_tokens: int | None) -> None:
    assert_right(make_case(), method, kd_weight=kd_weight, chunk_tokens=chunk_tokens)
    case = make_case(padding=(5, 3), sizes=(61, 53))
    more = {"weights": torch.arange(float(len(case.labels))) % 5 / 2, "loss_scale": 0.37}
    assert_right(case, method, kd_weight=kd_weight, chunk_tokens=chunk_tokens, more=more, **EVERYTHING)


@pytest.mark.parametrize(("method", "divergence"), COMBINATIONS)
def test_every_method_takes_its_divergences(method: str, divergence: str) -> None:
    options = {"k": 5} if "k" in DIVERGENCES[divergence].options else {}
    # A pair of nearly equal logarithms apart from each other: what fp32 has of them decides a coin's distance.
    allowed = 3e-4 if method == "chunk" else 2e-5
    assert_right(make_case(11), method, allowed=allowed, divergence=divergence, temperature=1.3, options=options)


@pytest.mark.parametrize(("method", "options", "divergence"), OPTIONS, ids=str)
def test_options_are_those_of_the_definition(method: str, options: dict[str, float], divergence: str) -> None:
    assert_right(
        make_case(), method, allowed=2e-4 if method == "chunk" else 5e-6, options=options, divergence=divergence
    )


@pytest.mark.parametrize("method", METHODS)
def test_the_fused_form_is_no_further_from_the_truth_than_the_naive_one_in_bf16(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Naive: products in bf16, the rest in fp32, autograd."""
    case = make_case(97, dtype=torch.bfloat16)
    right = outcome(reference_across, case.to(torch.float64), method, kd_weight=0.5)
    ours = errors(outcome(distill_across, case, method, kd_weight=0.5), right)
    several = errors(outcome(distill_across, case, method, kd_weight=0.5, chunk_tokens=40), right)

    def naive(side: Side, size: int) -> torch.Tensor:
        hidden = side.hidden.to(side.head.weight.dtype)  # what a projector made is rounded too
        return side.head.finish.apply((hidden @ side.head.weight[:size].T).float(), side.head.bias)

    monkeypatch.setattr(reference, "logits_of", naive)
    theirs = errors(outcome(reference_across, case, method, kd_weight=0.5), right)
    for name, error in theirs.items():
        assert ours[name] <= 1.25 * error + 3e-4, (name, ours, theirs)
        # Each chunk's share of the head's gradient is rounded once more.
        assert several[name] <= 1.25 * error + 2.5e-3, (name, several, theirs)


@pytest.mark.parametrize("method", METHODS)
def test_how_rows_are_chunked_does_not_change_the_result(method: str) -> None:
    case = make_case(40)
    whole = outcome(distill_across, case, method, kd_weight=0.5)
    for chunk_tokens in (1, 13, 10_000):
        off = errors(outcome(distill_across, case, method, kd_weight=0.5, chunk_tokens=chunk_tokens), whole)
        assert max(off.values()) < 2e-6, (chunk_tokens, off)


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operator returned."""

    size = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = function(*args, **(kwargs or {}))
        for each in found if isinstance(found, (tuple, list)) else [found]:
            if isinstance(each, torch.Tensor) and each.untyped_storage().nbytes():
                self.size = max(self.size, each.numel())
        return found


@pytest.mark.parametrize("method", METHODS)
def test_no_array_of_all_rows_and_a_whole_vocabulary_is_made(method: str) -> None:
    case = make_case(200, sizes=(211, 199), num_shared=150)
    keep_heap()  # which allocates once, to free it
    with Largest() as largest:
        outcome(distill_across, case, method, kd_weight=0.5, chunk_tokens=8)
    assert 23 * 211 <= largest.size < len(case.labels) * 199 / 4
    with Largest() as dense:
        outcome(reference_across, case, method, kd_weight=0.5)
    assert dense.size >= len(case.labels) * 199


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_a_compiled_block_gives_the_same(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case(17)
    plain = outcome(distill_across, case, method, kd_weight=0.5)
    monkeypatch.setattr("kdpipe.stages.loss.layout.WORTH_COMPILING", 0)
    off = errors(outcome(distill_across, case, method, kd_weight=0.5), plain)
    assert max(off.values()) < 2e-6, off


def without_spans(case: Case) -> Case:
    none = torch.zeros(0, 2, dtype=torch.int64)
    tokens = case.spans.student_tokens, case.spans.teacher_tokens
    return replace(case, spans=Spans(student=none, teacher=none, student_tokens=tokens[0], teacher_tokens=tokens[1]))


@pytest.mark.parametrize("method", METHODS)
def test_a_batch_in_which_nothing_aligned_has_its_cross_entropy_alone(method: str) -> None:
    case = without_spans(make_case())
    found = outcome(distill_across, case, method, kd_weight=0.5)
    assert float(found.out.kd) == 0.0
    assert_right(case, method, kd_weight=0.5)


@pytest.mark.parametrize("method", METHODS)
def test_without_gradients_the_values_are_the_same(method: str) -> None:
    case = make_case()
    with_gradients = outcome(distill_across, case, method, kd_weight=0.5).out
    options: dict[str, float] = {}
    torch.manual_seed(0)
    heads = case.student.head, case.teacher.head
    extra = extra_of(method, 23, 31, case.vocabulary, options, heads=heads)
    with torch.no_grad():
        without = distill_across(
            case.student,
            case.teacher,
            case.spans,
            case.labels,
            method=method,
            loss=LossSpec(kd_weight=0.5),
            vocabulary=case.vocabulary,
            extra=extra,
        )
    assert not without.loss.requires_grad
    torch.testing.assert_close(without.loss, with_gradients.loss.detach())


@pytest.mark.parametrize("method", METHODS)
def test_a_frozen_head_gets_no_gradient_and_the_rest_the_same(method: str) -> None:
    case = make_case()
    full = outcome(distill_across, case, method, kd_weight=0.5)
    case.student_head.requires_grad_(False)
    loss = distill_across(
        case.student,
        case.teacher,
        case.spans,
        case.labels,
        method=method,
        loss=LossSpec(kd_weight=0.5),
        vocabulary=case.vocabulary,
        extra=extra_of(method, 23, 31, case.vocabulary, {}, heads=(case.student.head, case.teacher.head)),
    ).loss
    (gradient,) = torch.autograd.grad(4.0 * loss, [case.student_hidden])
    torch.testing.assert_close(gradient, full.gradients[0])


@pytest.mark.parametrize("method", ["shared-vocab", "xtoken", "dskd"])
def test_a_draw_is_a_function_of_seed_and_key(method: str) -> None:
    case = make_case()
    keys = torch.arange(len(case.labels)) * 3 + 5
    spec: dict[str, Any] = {"divergence": "sampled_kl", "more": {"keys": keys, "seed": 3}}
    assert_right(case, method, allowed=2e-5, **spec)
    one, other = (
        float(outcome(distill_across, case, method, **spec | {"more": {"keys": keys, "seed": seed}}).out.kd)
        for seed in (3, 4)
    )
    assert one != pytest.approx(other, rel=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_logits_of_a_thousand_give_finite_losses_and_gradients(method: str) -> None:
    case = make_case(scale=1e3)
    for divergence in METHODS[method].divergences or ("forward_kl",):
        found = outcome(distill_across, case, method, kd_weight=0.5, divergence=divergence)
        assert all(bool(each.isfinite().all()) for each in (found.out.loss, *found.gradients) if each is not None)


def refused(case: Case, method: str, **spec: Any) -> str:
    with pytest.raises(ConfigError) as raised:
        outcome(distill_across, case, method, **spec)
    return str(raised.value)


def test_what_a_method_cannot_take_is_refused_by_name() -> None:
    case = make_case(5)
    assert "jsd" in refused(case, "gold", divergence="tvd")
    assert "distance of its own" in refused(case, "uld", divergence="jsd")
    assert "hybrid = 1" in refused(case, "xtoken", divergence="tvd", options={"hybrid": 1})
    assert "did you mean 'gold'" in refused(case, "golt")
    assert "tau" in refused(case, "chunk", options={"tau": 0.5})
    assert "unknown option 'tou'" in refused(case, "chunk", options={"tou": 5})
    assert "unknown option 'beta'" in refused(case, "uld", options={"beta": 0.5})
    assert "threshold" in refused(case, "xtoken", options={"threshold": 2.0})


def test_a_misspelt_option_is_answered_with_the_nearest_of_method_and_divergence() -> None:
    case = make_case(5)
    assert "did you mean 'matched_weight'" in refused(case, "gold", divergence="jsd", options={"match_weight": 1})
    assert "did you mean 'beta'" in refused(case, "gold", divergence="jsd", options={"betta": 1})


def test_rows_and_spans_of_other_batches_are_refused() -> None:
    case = make_case(5)
    fewer = replace(case, teacher=Side(case.teacher.hidden[1:], case.teacher.head))
    assert "teacher rows" in refused(fewer, "uld")
    assert "labels" in refused(replace(case, labels=case.labels[1:]), "uld")


def test_no_shared_token_is_refused_where_the_method_needs_one() -> None:
    case = make_case(5, num_shared=0)
    for method in ("shared-vocab", "gold"):
        assert "share no token" in refused(case, method)
    assert_right(case, "chunk")
    assert_right(case, "uld")


def test_every_method_says_what_it_is() -> None:
    for method in METHODS.values():
        assert find_method(method.name) is method
        assert all((method.formula, method.source, method.when))
        for option in method.options.values():
            assert option.holds(option.default)


@pytest.mark.parametrize("chunk_tokens", [None, 7])
@pytest.mark.parametrize("method", METHODS)
def test_what_is_ranked_is_every_16th_exact_span_over_the_shared_tokens(method: str, chunk_tokens: int | None) -> None:
    case = make_case(120, num_shared=30)
    found = outcome(distill_across, case, method, temperature=1.5, chunk_tokens=chunk_tokens).out.metrics
    if method in ("chunk", "dskd"):
        assert found.num_ranked == 0, "it has no row of the teacher's own beside one of the student's"
        return
    exact = case.spans.exact.nonzero()[::16, 0]
    student, teacher = (
        reference.logits_of(side, size)[rows][:, ids]
        for side, size, rows, ids in (
            (case.student, 53, case.spans.student[exact, 0], case.vocabulary.student_ids),
            (case.teacher, 61, case.spans.teacher[exact, 0], case.vocabulary.teacher_ids),
        )
    )
    places = teacher.topk(10).indices
    assert found.num_ranked == len(exact) > 3
    assert float(found.top1_agree) == float((student.argmax(-1) == places[:, 0]).sum())
    mass = (student / 1.5).softmax(-1).gather(1, places).sum()
    assert float(found.top_k_mass) == pytest.approx(float(mass.detach()), rel=1e-4)
    compared = case.spans.exact.sum() if method in ("shared-vocab", "xtoken") else len(case.spans)
    assert found.num_taught == int(compared)
    if method != "xtoken":  # over the tokens that pieces are made of
        kept = None if method in ("uld", "gold") else case.vocabulary.teacher_ids
        rows = case.spans.teacher.sum(1) - 1 if method == "gold" else case.spans.teacher[:, 0]
        rows = rows if method in ("uld", "gold") else rows[case.spans.exact]
        logits = reference.logits_of(case.teacher, 61)[rows]
        log_t = ((logits if kept is None else logits[:, kept]) / 1.5).log_softmax(-1)
        assert float(found.teacher_entropy) == pytest.approx(float(-(log_t.exp() * log_t).sum()), rel=1e-4)
