"""The fused loss against fp64: no further from the truth than the naive implementation in the same dtype."""

import copy
import math
from typing import Any

import pytest
import torch
from tests.stages.loss.cases import CROSS_ENTROPIES, SAMPLED, Inputs, errors, make_inputs, naive, outcome, truth

from kdpipe.stages.loss import DIVERGENCES, fused_distill_loss, reference_distill_loss

# Relative slack by dtype: what summation order alone may change.
SLACK = {torch.float32: 3e-7, torch.bfloat16: 2e-4}
DTYPES = list(SLACK)
LOG_P_ERROR = 5e-7  # of a log-probability near 10 in fp32: what a token's value can be off, however small it is
BF16_ROUNDING = 1.7e-3  # relative, root mean square


def assert_no_further_than_naive(inputs: Inputs, **arguments: Any) -> None:
    """Every error of the fused loss is within 10 % and the slack of the naive one's."""
    right = truth(inputs, **without_chunks(arguments))
    ours = errors(outcome(fused_distill_loss, inputs, **arguments), right)
    theirs = errors(outcome(naive, inputs, **without_chunks(arguments)), right)
    dtype, num_tokens = inputs.student_hidden.dtype, len(inputs.labels)
    allowed = [1.1 * error + SLACK[dtype] for error in theirs]
    kd = float(right.out.kd) / arguments.get("temperature", 1.0) ** (2 * arguments.get("scale_t2", False))
    allowed[0] += LOG_P_ERROR * num_tokens / max(kd, 1e-9)
    chunk_tokens = arguments.get("chunk_tokens")
    if chunk_tokens is not None and dtype == torch.bfloat16 and inputs.student_head.requires_grad:
        # Each chunk's share of the head's gradient is rounded once more, and each sum where that is bf16 too.
        summed = num_tokens / chunk_tokens / 2 if "head_grad_fp32" in arguments else 0
        allowed[5] += math.hypot(theirs[5], BF16_ROUNDING * math.sqrt(1 + summed)) - theirs[5]
    assert all(a <= b for a, b in zip(ours, allowed, strict=True)), (ours, theirs)


def without_chunks(arguments: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in arguments.items() if name not in ("chunk_tokens", "head_grad_fp32")}


EVERYTHING: dict[str, Any] = {
    "temperature": 1.5,
    "scale_t2": True,
    "bias": True,
    "student_softcap": 2.0,
    "teacher_softcap": 5.0,
    "student_scale": 1.5,
    "teacher_scale": 0.5,
    "label_smoothing": 0.1,
    "z_loss": 1e-3,
}
TOUCHES: dict[str, dict[str, Any]] = {
    "plain": {"kd_weight": 1.0, "labels": False},
    "mixed": {},
    "cross-entropy": {"kd_weight": 0.0},
    "temperature": {"temperature": 2.5},
    "T2": {"temperature": 2.5, "scale_t2": True},
    "bias": {"bias": True},
    "softcap": {"student_softcap": 3.0, "teacher_softcap": 5.0},
    "scale": {"student_scale": 0.3, "teacher_scale": 1.7},
    "weights": {"weighted": True},
    "smoothing": {"label_smoothing": 0.1},
    "z-loss": {"z_loss": 1e-3},
    "frozen": {"frozen": True},
    "chunks": {"chunk_tokens": 100},
    "bf16 sum": {"chunk_tokens": 100, "head_grad_fp32": False},
    "everything": EVERYTHING | {"weighted": True, "chunk_tokens": 100},
}


def arguments_of(touch: str, inputs: Inputs) -> dict[str, Any]:
    """Arguments of a case; cross-entropy has half of the loss where the case does not say."""
    arguments: dict[str, Any] = {"kd_weight": 0.5} | TOUCHES[touch]
    if arguments.pop("weighted", False):
        arguments["token_weights"] = torch.arange(float(len(inputs.labels))) % 5 / 2
    if arguments.pop("frozen", False):
        inputs.student_head.requires_grad_(False)
    return arguments


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("touch", TOUCHES)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_every_divergence_takes_every_touch(divergence: str, touch: str, dtype: torch.dtype) -> None:
    inputs = make_inputs(dtype=dtype)
    assert_no_further_than_naive(inputs, divergence=divergence, **arguments_of(touch, inputs))


@pytest.mark.parametrize("num_tokens", [19, pytest.param(507, marks=[pytest.mark.slow, pytest.mark.timeout(900)])])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_every_divergence_takes_a_large_odd_vocabulary(divergence: str, dtype: torch.dtype, num_tokens: int) -> None:
    if divergence == "sampled_kl" and num_tokens > 100:
        pytest.skip("of so many draws some fall between the cumulative sums of fp32 and of fp64")
    inputs = make_inputs(num_tokens, 32771, dtype=dtype)
    assert_no_further_than_naive(inputs, divergence=divergence, kd_weight=0.5, temperature=2.0, bias=True)
    assert_no_further_than_naive(inputs, divergence=divergence, **arguments_of("everything", inputs))


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_temperature_leaves_the_cross_entropy_alone(divergence: str) -> None:
    arguments: dict[str, Any] = {"divergence": divergence, "kd_weight": 0.7, "label_smoothing": 0.1}
    cool, warm = (outcome(fused_distill_loss, make_inputs(), temperature=t, **arguments).out for t in (1.0, 2.5))
    torch.testing.assert_close(cool.ce, warm.ce)
    torch.testing.assert_close(cool.z, warm.z)


@pytest.mark.parametrize("certain", [("teacher",), ("student",), ("teacher", "student")], ids="-".join)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_models_that_are_certain_of_one_token(divergence: str, certain: tuple[str, ...]) -> None:
    """One logit of 3e4 and else zeros: one-hot rows, every other probability 0 in fp64 too."""
    inputs = make_inputs(71, 127)
    for owner in certain:
        hidden, head = (getattr(inputs, f"{owner}_{part}").detach() for part in ("hidden", "head"))
        tokens = torch.arange(71)
        hidden.zero_()[tokens, tokens] = 1.0
        head.zero_()[tokens * 5 % 127, tokens] = 3e4  # a token of its own for each
    assert_no_further_than_naive(inputs, divergence=divergence, kd_weight=0.5)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("chunk_tokens", [None, 100, 7])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_metrics_are_those_of_the_reference(dtype: torch.dtype, chunk_tokens: int | None, temperature: float) -> None:
    inputs = make_inputs(dtype=dtype)
    arguments: dict[str, Any] = {"temperature": temperature, "bias": True, "teacher_softcap": 3.0}
    found = outcome(fused_distill_loss, inputs, chunk_tokens=chunk_tokens, **arguments).out.metrics
    right = outcome(naive, inputs, **arguments).out.metrics
    assert found.num_ranked == right.num_ranked == 32
    for name in ("teacher_entropy", "top1_agree", "top_k_mass"):
        assert float(getattr(found, name)) == pytest.approx(float(getattr(right, name)), rel=1e-5), name
    assert 0 < float(found.teacher_entropy) < 507 * math.log(251)
    assert 0 < float(found.top_k_mass) < 32


def test_a_sampled_divergence_is_right_on_average() -> None:
    """Over many draws: the mean of values and gradients is the exact KL's, within four of its standard errors."""
    inputs = make_inputs(5, 37).to(torch.float64)
    exact = outcome(fused_distill_loss, inputs)
    for power in (1.0, 0.7):
        drawn = [
            outcome(fused_distill_loss, inputs, divergence="sampled_kl", samples=20, power=power, seed=seed)
            for seed in range(400)
        ]
        for each in (lambda one: one.out.kd.double(), lambda one: one.gradients[0].double()):
            values = torch.stack([each(one) for one in drawn])
            error = (values.mean(0) - each(exact)) / (values.std(0) / 20)
            assert error.square().mean().sqrt() < 1.5
            assert error.abs().max() < 5


def test_a_draw_is_a_function_of_seed_and_key() -> None:
    inputs = make_inputs()
    keys = torch.arange(507) * 3 + 5
    tensors = (inputs.student_hidden, inputs.student_head, inputs.teacher_hidden, inputs.teacher_head)

    def kd(some: slice, **arguments: Any) -> float:
        hidden, head, rows, teacher_head = tensors
        out = fused_distill_loss(hidden[some], head, rows[some], teacher_head, divergence="sampled_kl", **arguments)
        return float(out.kd)

    whole = kd(slice(None), token_keys=keys, seed=1)
    parts = [kd(some, token_keys=keys[some], seed=1) for some in (slice(0, 200), slice(200, None))]
    assert sum(parts) == pytest.approx(whole, rel=1e-6)
    assert kd(slice(None), token_keys=keys, seed=1, chunk_tokens=33) == pytest.approx(whole, rel=1e-6)
    assert kd(slice(None), token_keys=keys, seed=2) != pytest.approx(whole, rel=1e-6)
    assert kd(slice(None), token_keys=keys + 1, seed=1) != pytest.approx(whole, rel=1e-6)


@pytest.mark.parametrize(
    ("divergence", "options"),
    [
        ("alpha_beta", {"alpha": 0.0, "beta": 0.0}),
        ("alpha_beta", {"alpha": 0.0, "beta": 0.5}),
        ("alpha_beta", {"alpha": 0.5, "beta": 0.0}),
        ("alpha_beta", {"alpha": 1.0, "beta": 1.0}),
        ("adaptive_kl", {"alpha": 0.01}),
        ("adaptive_kl", {"alpha": 0.99}),
        ("top_k_kl", {"k": 1}),
        ("top_k_kl", {"k": 300}),
        ("top_k_reverse_kl", {"k": 250}),
        ("top_k_reverse_kl", {"k": 300}),
        ("hierarchical_ranking", {"k": 1}),
        ("hierarchical_ranking", {"k": 20}),
        ("symmetric_kl", {"forward_share": 0.2}),
        ("skew_kl", {"alpha": 0.9}),
        ("skew_reverse_kl", {"alpha": 0.9}),
        ("sampled_kl", {"samples": 1}),
        ("sampled_kl", {"samples": 300, "power": 0.5}),
        ("sampled_kl", {"power": 0.0}),
    ],
    ids=str,
)
def test_options_are_those_of_the_definition(divergence: str, options: dict[str, float]) -> None:
    assert_no_further_than_naive(make_inputs(), divergence=divergence, temperature=0.7, **options)


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.9, 1.0])
def test_jsd_takes_every_beta(beta: float) -> None:
    assert_no_further_than_naive(make_inputs(), divergence="jsd", beta=beta, temperature=0.7)


@pytest.mark.parametrize(("student_rows", "teacher_rows"), [(251, 264), (264, 251), (300, 264)])
@pytest.mark.parametrize("chunk_tokens", [None, 100])
def test_padding_rows_of_either_head_are_cut_and_get_no_gradient(
    student_rows: int, teacher_rows: int, chunk_tokens: int | None
) -> None:
    padded = make_inputs(student_rows=student_rows, teacher_rows=teacher_rows)
    arguments: dict[str, Any] = {"vocab_size": 251, "kd_weight": 0.5, "bias": True, "chunk_tokens": chunk_tokens}
    found, right = outcome(fused_distill_loss, padded, **arguments), truth(padded, **arguments)
    assert max(errors(found, right)) < 1e-6
    for gradient in found.gradients[1:]:
        assert gradient is not None
        assert gradient.shape[0] == student_rows
        assert not gradient[251:].any()


@pytest.mark.parametrize("chunk_tokens", [1, 50, 506, 507, 10_000])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_chunk_size_does_not_change_the_result(chunk_tokens: int, dtype: torch.dtype) -> None:
    inputs = make_inputs(dtype=dtype)
    arguments: dict[str, Any] = {"divergence": "jsd", "kd_weight": 0.5, "bias": True}
    right = truth(inputs, **arguments)
    whole = errors(outcome(fused_distill_loss, inputs, **arguments), right)
    parts = errors(outcome(fused_distill_loss, inputs, chunk_tokens=chunk_tokens, **arguments), right)
    # Each chunk's share of the head's gradient is rounded to bf16 once more; the sum is fp32.
    slack = 1e-3 if dtype == torch.bfloat16 else 3e-7
    assert all(a <= 1.1 * b + slack for a, b in zip(parts, whole, strict=True)), (parts, whole)


def test_a_thousand_chunks_of_bf16_lose_no_more_than_one() -> None:
    # A bf16 running sum would be wrong by percents here: it stops growing.
    inputs = make_inputs(1021, 33, dtype=torch.bfloat16)
    found = outcome(fused_distill_loss, inputs, chunk_tokens=1, kd_weight=0.5)
    assert errors(found, truth(inputs, kd_weight=0.5))[4] < 5e-3


def test_a_sum_in_the_heads_own_dtype_is_taken_where_it_is_asked_for() -> None:
    """A thousand chunks show it: a bf16 running sum is off by percents, and nothing else is."""
    inputs = make_inputs(1021, 33, dtype=torch.bfloat16)
    found = outcome(fused_distill_loss, inputs, chunk_tokens=1, kd_weight=0.5, head_grad_fp32=False)
    off = errors(found, truth(inputs, kd_weight=0.5))
    assert off[5] > 2e-2
    assert off[4] < 5e-3


@pytest.mark.parametrize("magnitude", [1e3, 1e4])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_logits_of_ten_thousand_stay_exact(divergence: str, magnitude: float) -> None:
    inputs = make_inputs(101, scale=magnitude / 3)
    assert_no_further_than_naive(inputs, divergence=divergence, kd_weight=0.5)
    assert_no_further_than_naive(inputs, divergence=divergence, kd_weight=0.5, temperature=3.0)


@pytest.mark.parametrize("divergence", sorted(DIVERGENCES.keys() - CROSS_ENTROPIES - SAMPLED))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_student_equal_to_its_teacher_has_no_loss_and_no_gradient(divergence: str, dtype: torch.dtype) -> None:
    inputs = make_inputs(dtype=dtype)
    twin = Inputs(
        inputs.student_hidden,
        inputs.student_head,
        inputs.student_hidden.detach(),
        inputs.student_head.detach(),
        inputs.labels,
        inputs.student_bias,
        inputs.student_bias.detach(),
    )
    found = outcome(fused_distill_loss, twin, divergence=divergence, bias=True)
    size = outcome(fused_distill_loss, inputs, divergence=divergence, bias=True)
    assert abs(float(found.out.loss.detach())) < 1e-6 * float(size.out.loss.detach()) + 1e-4
    for gradient, usual in zip(found.gradients, size.gradients, strict=True):
        assert gradient is not None
        assert usual is not None
        assert gradient.norm() < 1e-6 * usual.norm()


def test_a_frozen_head_gets_no_gradient_and_the_rest_the_same() -> None:
    inputs = make_inputs()
    full = outcome(fused_distill_loss, inputs, kd_weight=0.5)
    inputs.student_head.requires_grad_(False)
    frozen = outcome(fused_distill_loss, inputs, kd_weight=0.5)
    assert frozen.gradients[1] is None
    torch.testing.assert_close(frozen.gradients[0], full.gradients[0])


def test_without_gradients_the_values_are_the_same() -> None:
    inputs = make_inputs()
    with_gradients = outcome(fused_distill_loss, inputs, kd_weight=0.5).out
    with torch.no_grad():
        tensors = (inputs.student_hidden, inputs.student_head, inputs.teacher_hidden, inputs.teacher_head)
        without = fused_distill_loss(*tensors, inputs.labels, kd_weight=0.5)
    assert not without.loss.requires_grad
    torch.testing.assert_close(without.loss, with_gradients.loss.detach())


def test_backward_twice_gives_the_same_gradients_twice() -> None:
    inputs = make_inputs()
    tensors = (inputs.student_hidden, inputs.student_head, inputs.teacher_hidden, inputs.teacher_head)
    loss = fused_distill_loss(*tensors).loss
    first = torch.autograd.grad(loss, inputs.leaves[:2], retain_graph=True)
    second = torch.autograd.grad(loss, inputs.leaves[:2])
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("kd_weight", [0.0, 0.5])
def test_tokens_without_a_label_have_no_cross_entropy(kd_weight: float) -> None:
    inputs = make_inputs()
    inputs.labels.fill_(-100)
    found = outcome(fused_distill_loss, inputs, kd_weight=kd_weight)
    assert float(found.out.ce) == 0.0
    assert max(errors(found, truth(inputs, kd_weight=kd_weight))) < 1e-6


@pytest.mark.parametrize("kd_weight", [0.0, 0.5, 1.0])
def test_an_empty_batch_has_loss_zero_and_gradients_of_zeros(kd_weight: float) -> None:
    found = outcome(fused_distill_loss, make_inputs(0), kd_weight=kd_weight, temperature=2.0, bias=True)
    assert float(found.out.loss.detach()) == 0.0
    for gradient, leaf in zip(found.gradients, make_inputs(0).leaves, strict=True):
        assert gradient is not None
        assert gradient.shape == leaf.shape
        assert not gradient.any()


def test_pure_cross_entropy_needs_no_teacher_and_reports_no_divergence() -> None:
    inputs = make_inputs()
    alone = fused_distill_loss(inputs.student_hidden, inputs.student_head, None, None, inputs.labels, kd_weight=0.0)
    assert float(alone.kd) == 0.0
    torch.testing.assert_close(alone.loss, truth(inputs, kd_weight=0.0).out.ce.float())


def test_cross_entropy_is_reported_beside_a_pure_divergence() -> None:
    inputs = make_inputs()
    for temperature in (1.0, 2.0):
        found = outcome(fused_distill_loss, inputs, temperature=temperature)
        torch.testing.assert_close(found.out.ce, truth(inputs).out.ce.float())
        assert max(errors(found, truth(inputs, temperature=temperature))) < 1e-6
        unlabelled = outcome(fused_distill_loss, inputs, temperature=temperature, labels=False)
        assert float(unlabelled.out.ce) == 0.0


@pytest.mark.parametrize("count", [507, 3, 4096])
@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_a_mean_taken_by_loss_scale_is_no_further_than_the_naive_one(count: int, scale: float) -> None:
    """A division afterwards would round bf16 gradients once more."""
    inputs = make_inputs(dtype=torch.bfloat16)
    arguments: dict[str, Any] = {"divergence": "jsd", "student_scale": scale}

    def gradients(function: Any, some: Inputs, **more: Any) -> list[torch.Tensor]:
        tensors = (some.student_hidden, some.student_head, some.teacher_hidden, some.teacher_head)
        return list(torch.autograd.grad(function(*tensors, **arguments, **more).loss, some.leaves[:2]))

    right = gradients(reference_distill_loss, inputs.to(torch.float64), loss_scale=1 / count)
    ours = gradients(fused_distill_loss, inputs, loss_scale=1 / count)
    theirs = gradients(naive, inputs, loss_scale=1 / count)
    for found, rival, exact in zip(ours, theirs, right, strict=True):
        assert (found.double() - exact).norm() <= 1.02 * (rival.double() - exact).norm()


def test_loss_scale_multiplies_the_loss_and_nothing_else() -> None:
    inputs = make_inputs()
    plain, scaled = (outcome(fused_distill_loss, inputs, kd_weight=0.5, loss_scale=each) for each in (1.0, 0.125))
    assert float(scaled.out.loss.detach()) == pytest.approx(float(plain.out.loss.detach()) / 8, rel=1e-6)
    assert torch.equal(scaled.out.kd, plain.out.kd)
    assert torch.equal(scaled.gradients[0] * 8, plain.gradients[0])


def test_equal_models_agree_on_every_token_ties_or_not() -> None:
    logits = torch.randint(0, 5, (320, 300), generator=torch.Generator().manual_seed(0)).float()
    eye = torch.eye(300)
    with torch.no_grad():
        metrics = fused_distill_loss(logits, eye, logits, eye).metrics
    assert float(metrics.top1_agree) == metrics.num_ranked == 20


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_bias_may_be_of_another_precision(divergence: str, dtype: torch.dtype) -> None:
    inputs = make_inputs(dtype=torch.bfloat16)
    wide = make_inputs(dtype=dtype)
    arguments: dict[str, Any] = {"divergence": divergence, "kd_weight": 0.5, "temperature": 1.5}
    tensors = (inputs.student_hidden, inputs.student_head, inputs.teacher_hidden, inputs.teacher_head, inputs.labels)
    for biases in (
        {"student_bias": wide.student_bias},
        {"teacher_bias": wide.teacher_bias},
        {"student_bias": wide.student_bias, "teacher_bias": wide.teacher_bias},
    ):
        found = fused_distill_loss(*tensors, **arguments, **biases)
        right = naive(*tensors, **arguments, **{name: bias.float() for name, bias in biases.items()})
        torch.testing.assert_close(found.kd, right.kd, rtol=2e-3, atol=1e-4)


def test_kd_and_ce_are_fp32_and_carry_no_gradient() -> None:
    out = outcome(fused_distill_loss, make_inputs(dtype=torch.bfloat16), kd_weight=0.5).out
    assert (out.kd.dtype, out.ce.dtype, out.loss.dtype) == (torch.float32,) * 3
    assert not out.kd.requires_grad
    assert not out.ce.requires_grad
    assert out.loss.requires_grad


def test_the_sum_of_several_chunks_is_rounded_once_whatever_the_incoming_gradient() -> None:
    inputs = make_inputs(dtype=torch.bfloat16)
    tensors = (inputs.student_hidden, inputs.student_head, inputs.teacher_hidden, inputs.teacher_head)
    loss = fused_distill_loss(*tensors, chunk_tokens=100).loss
    right = truth(inputs).gradients[1]
    assert right is not None

    def error(factor: float) -> float:
        (found,) = torch.autograd.grad(factor * loss, inputs.student_head, retain_graph=True)
        return float((found.double() / factor - right / 4).norm())

    assert error(3.0) < 1.02 * error(4.0)  # a factor of 4 rounds nothing; a second rounding would add some 15 %


def test_inputs_are_left_as_they_were() -> None:
    inputs = make_inputs()
    before = copy.deepcopy(inputs)
    outcome(fused_distill_loss, inputs, kd_weight=0.5, student_softcap=4.0, bias=True)
    for name in Inputs.__slots__:
        assert torch.equal(getattr(inputs, name), getattr(before, name)), name
