"""Several teachers of the same rows: their average, or that of the losses, against the definition in fp64."""

# Shapes: T tokens, V vocabulary, D student width, E teacher width.

import math
from typing import Any

import pytest
import torch
from tests.stages.loss.cases import errors, make_inputs, naive, outcome
from torch import Tensor

from kdpipe.manifests.errors import ConfigError
from kdpipe.stages.draws import uniform
from kdpipe.stages.loss import (
    DIVERGENCES,
    Head,
    Side,
    fused_distill_loss,
    layout,
    reference_distill_loss,
    token_metrics,
)

WEIGHTS = (0.2, 0.3, 0.5)
TOKENS, VOCAB = 61, 251
NEXT = torch.arange(TOKENS) * 7 % VOCAB
MIXES = ("distributions", "losses")


def teachers(dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Three teachers of other widths, soft caps, scales and padding; the last has a bias."""
    generator = torch.Generator().manual_seed(5)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    return {
        "teacher_hidden": [draw(TOKENS, width) for width in (77, 40, 19)],
        "teacher_head": [draw(VOCAB + extra, width) * 2 / width**0.5 for width, extra in ((77, 0), (40, 5), (19, 13))],
        "teacher_bias": [None, None, draw(VOCAB + 13)],
        "teacher_softcap": [None, 5.0, None],
        "teacher_scale": [1.0, 0.7, 1.3],
    }


def exactly(given: dict[str, Any]) -> list[Tensor]:
    """Each teacher's logits [T, V] in fp64, as head.Head defines them."""
    found = []
    for hidden, head, bias, softcap, scale in zip(*given.values(), strict=True):
        logits = hidden.double() @ head[:VOCAB].double().T
        logits = (logits if bias is None else logits + bias[:VOCAB].double()) * scale
        found.append(logits if softcap is None else softcap * torch.tanh(logits / softcap))
    return found


def definition(student: Tensor, given: dict[str, Any], mix: str, divergence: str, temperature: float) -> Tensor:
    """The sum over tokens, from the student's logits [T, V] in fp64."""
    chosen = DIVERGENCES[divergence]
    options: dict[str, Any] = {name: option.default for name, option in chosen.options.items()}
    if chosen.of_token:
        options["draws"] = NEXT[:, None]
    if chosen.draws:
        options["draws"] = uniform(torch.arange(TOKENS), int(options[chosen.draws]), 0)
    log_s = (student / temperature).log_softmax(-1)
    each = [(logits / temperature).log_softmax(-1) for logits in exactly(given)]
    if mix == "distributions":
        each = [sum(w * log_t.exp() for w, log_t in zip(WEIGHTS, each, strict=True)).log()]  # type: ignore[union-attr]
    weights = (1.0,) if mix == "distributions" else WEIGHTS
    values = [w * chosen.reference(log_t, log_s, **options).sum() for w, log_t in zip(weights, each, strict=True)]
    return torch.stack(values).sum()


@pytest.mark.parametrize(("mix", "temperature"), [("distributions", 2.5), ("losses", 1.0)])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_several_teachers_equal_the_float64_definition(divergence: str, mix: str, temperature: float) -> None:
    inputs, given = make_inputs(TOKENS, VOCAB), teachers()
    hidden, head = (each.detach().double().requires_grad_() for each in (inputs.student_hidden, inputs.student_head))
    right = definition(hidden @ head.T, given, mix, divergence, temperature)
    gradients = torch.autograd.grad(right, (hidden, head))
    arguments: dict[str, Any] = {"divergence": divergence, "temperature": temperature, "vocab_size": VOCAB}
    arguments |= {"teacher_mix": mix, "teacher_weights": [4.0, 6.0, 10.0], "next_tokens": NEXT}
    for function, chunk_tokens in (
        (fused_distill_loss, None),
        (fused_distill_loss, 25),
        (reference_distill_loss, None),
    ):
        student = inputs.student_hidden, inputs.student_head
        out = function(*student, **given, chunk_tokens=chunk_tokens, **arguments)
        torch.testing.assert_close(out.kd.double(), right, rtol=2e-5, atol=1e-6)
        for found, exact in zip(torch.autograd.grad(out.loss, student), gradients, strict=True):
            assert float((found - exact).norm() / exact.norm()) < 2e-5


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_with_all_touches_no_further_from_the_truth_than_the_naive_loss(dtype: torch.dtype, mix: str) -> None:
    arguments: dict[str, Any] = {"kd_weight": 0.6, "temperature": 1.5, "scale_t2": True, "label_smoothing": 0.1}
    arguments |= {"teacher_mix": mix, "teacher_weights": WEIGHTS, "vocab_size": VOCAB, "z_loss": 1e-3}
    arguments |= {"token_weights": torch.arange(float(TOKENS)) % 3, "student_softcap": 4.0, "divergence": "jsd"}

    def found(function: Any, exact: bool = False, **more: Any) -> Any:
        given, inputs = teachers(dtype), make_inputs(TOKENS, VOCAB, dtype=dtype)
        if exact:
            wide = {name: [each.double() for each in given[name]] for name in ("teacher_hidden", "teacher_head")}
            given, inputs = given | wide, inputs.to(torch.float64)

        def with_teachers(hidden: Tensor, head: Tensor, _hidden: Any, _head: Any, labels: Tensor, **rest: Any) -> Any:
            return function(hidden, head, labels=labels, **given, **rest)

        return outcome(with_teachers, inputs, **arguments, **more)

    right = found(reference_distill_loss, exact=True)
    theirs, ours = errors(found(naive), right), errors(found(fused_distill_loss), right)
    slack = 3e-7 if dtype == torch.float32 else 2e-4
    assert all(a <= 1.1 * b + slack for a, b in zip(ours, theirs, strict=True)), (ours, theirs)
    metrics = [found(each).out.metrics for each in (fused_distill_loss, naive)]
    for name in ("teacher_entropy", "top1_agree", "top_k_mass"):
        ours, theirs = (float(getattr(each, name)) for each in metrics)
        assert ours == pytest.approx(theirs, rel=1e-5), name


@pytest.mark.slow  # it compiles twice
@pytest.mark.parametrize("mix", MIXES)
def test_the_compiled_block_of_several_teachers_gives_what_the_plain_one_gives(
    mix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs, arguments = make_inputs(TOKENS, VOCAB), {"teacher_mix": mix, "temperature": 2.0, "vocab_size": VOCAB}

    def found() -> tuple[Tensor, ...]:
        out = fused_distill_loss(inputs.student_hidden, inputs.student_head, **teachers(), **arguments)
        return out.kd, *torch.autograd.grad(out.loss, (inputs.student_hidden, inputs.student_head))

    plain = found()
    monkeypatch.setattr(layout, "WORTH_COMPILING", 0)
    for ours, theirs in zip(found(), plain, strict=True):
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm()


@pytest.mark.parametrize("mix", MIXES)
def test_one_teacher_given_twice_is_one_teacher(mix: str) -> None:
    inputs = make_inputs(TOKENS, VOCAB)
    once = outcome(fused_distill_loss, inputs, temperature=2.0)
    twice = fused_distill_loss(
        inputs.student_hidden,
        inputs.student_head,
        [inputs.teacher_hidden] * 2,
        [inputs.teacher_head] * 2,
        temperature=2.0,
        teacher_mix=mix,  # type: ignore[arg-type]
    )
    torch.testing.assert_close(twice.kd, once.out.kd, rtol=1e-6, atol=0.0)


def test_an_average_of_teachers_that_are_certain_of_other_tokens_is_finite() -> None:
    """Every other probability of both underflows to 0; the log of their average does not."""
    eye = torch.eye(VOCAB) * 3e4
    places = torch.arange(TOKENS)
    out = fused_distill_loss(
        torch.zeros(TOKENS, VOCAB, requires_grad=True),
        torch.eye(VOCAB),
        [torch.eye(VOCAB)[places], torch.eye(VOCAB)[places + 1]],
        [eye, eye],
        teacher_mix="distributions",
    )
    assert float(out.kd) == pytest.approx(TOKENS * (math.log(VOCAB) - math.log(2)), rel=1e-6)


def test_metrics_are_of_the_average_and_of_each_teacher() -> None:
    inputs, given = make_inputs(TOKENS, VOCAB), teachers()
    sides = [Side(hidden, Head(*head)) for hidden, *head in zip(*given.values(), strict=True)]
    student = Side(inputs.student_hidden, Head(inputs.student_head))
    found = token_metrics(student, sides, inputs.labels, weights=WEIGHTS, vocab_size=VOCAB)
    kept = inputs.labels != -100
    log_s = (inputs.student_hidden.double() @ inputs.student_head.double().T).detach().log_softmax(-1)[kept]
    each = [logits.log_softmax(-1)[kept] for logits in exactly(given)]
    average = sum(w * log_t.exp() for w, log_t in zip(WEIGHTS, each, strict=True)).log()  # type: ignore[union-attr]

    def kl(log_t: Tensor) -> float:
        return float((log_t.exp() * (log_t - log_s)).sum())

    assert float(found.forward_kl) == pytest.approx(kl(average), rel=1e-5)
    assert found.each_kl.tolist() == pytest.approx([kl(log_t) for log_t in each], rel=1e-5)
    assert found.each_tokens.tolist() == [int(kept.sum())] * 3
    assert float(found.teacher_ce) == pytest.approx(
        -float(average.gather(1, inputs.labels[kept][:, None]).sum()), rel=1e-5
    )


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({}, "3 teachers of the same rows and teacher_mix None; it averages their 'distributions' or their 'losses'"),
        ({"teacher_mix": "route"}, "teacher_mix 'route'"),
        ({"teacher_mix": "losses", "teacher_weights": (1.0, 2.0)}, "2 teacher_weights for 3 teachers"),
        ({"teacher_mix": "losses", "teacher_weights": (1.0, 2.0, 0.0)}, "must be a number above 0, got 0.0"),
        ({"teacher_mix": "losses", "teacher_scale": (1.0, 2.0)}, "teacher_scale: 2 for 3 teachers; give one each"),
    ],
)
def test_what_does_not_go_together_is_refused(arguments: dict[str, Any], problem: str) -> None:
    inputs, given = make_inputs(TOKENS, VOCAB), teachers()
    with pytest.raises(ConfigError, match=problem):
        fused_distill_loss(inputs.student_hidden, inputs.student_head, **given | arguments, vocab_size=VOCAB)
