"""Side-cars' teachers: drawn tokens are right on average, a text's own tokens are exact, the rest is refused."""

# Shapes: T tokens, V vocabulary, K tokens drawn.

from typing import Any

import pytest
import torch
from torch import Tensor

from kdpipe.manifests.errors import ConfigError
from kdpipe.manifests.sidecar import Sidecar
from kdpipe.manifests.specs import LossSpec
from kdpipe.stages.exchange.kept import Asked, logprob, sampled
from kdpipe.stages.loss import DrawnSide, Head, Side, TokenSide, distill, fused_distill_loss, pose
from kdpipe.stages.loss.reference import loss_of_logits

T, V, DRAWN = 5, 37, 12


def logits_of() -> tuple[Tensor, Tensor]:
    """Teacher's and student's [T, V], no token so rare that it is never drawn."""
    generator = torch.Generator().manual_seed(4)
    teacher, student = torch.randn(2, T, V, generator=generator)
    return teacher, student


def drawn(teacher: Tensor, seed: int, count: int = DRAWN) -> DrawnSide:
    """What a side-car that was drawn with this seed has of rows with these logits."""
    asked = Asked(sidecar=Sidecar(kind="sampled", entries=count), seed=seed)
    rows = sampled(teacher.log_softmax(-1), torch.zeros(T, dtype=torch.int64), torch.arange(T), asked)
    return DrawnSide.of(rows, teacher.shape[1])


def loss_and_gradient(student: Tensor, teacher: Side, **loss: Any) -> tuple[Tensor, Tensor]:
    leaf = student.clone().requires_grad_()
    spec = LossSpec.model_validate({"divergence": "forward_kl"} | loss)
    out = distill(pose(Side(leaf, Head(torch.eye(V))), [teacher], None, loss=spec))
    return out.kd, torch.autograd.grad(out.loss, leaf)[0]


def test_the_drawn_tokens_are_the_teachers_as_often_as_it_takes_them() -> None:
    teacher, _ = logits_of()
    counts = torch.zeros(T, V)
    for seed in range(200):
        ids = drawn(teacher, seed).hidden.long()
        counts.scatter_add_(1, ids, torch.ones(T, DRAWN))
    total, p = 200 * DRAWN, teacher.softmax(-1)
    error = (counts - total * p) / (total * p * (1 - p)).sqrt()
    assert error.abs().max() < 5
    assert error.square().mean().sqrt() < 1.2


@pytest.mark.parametrize("divergence", ["forward_kl", "soft_cross_entropy"])
def test_a_loss_on_drawn_tokens_is_right_on_average(divergence: str) -> None:
    """Over many draws: the mean of values and of gradients is that of whole rows, within its standard error."""
    teacher, student = logits_of()
    right = loss_and_gradient(student, Side(teacher, Head(torch.eye(V))), divergence=divergence)
    found = [loss_and_gradient(student, drawn(teacher, seed), divergence=divergence) for seed in range(225)]
    for part in (0, 1):
        values = torch.stack([each[part].double() for each in found])
        error = (values.mean(0) - right[part].double()) / (values.std(0) / 15)
        assert error.square().mean().sqrt() < (4.0, 1.5)[part]  # of one value, and of 185
        assert error.abs().max() < 5


def test_it_is_the_sampled_kl_of_whole_rows_with_the_same_draws() -> None:
    teacher, student = logits_of()
    eye = torch.eye(V)
    leaf = student.clone().requires_grad_()
    arguments: dict[str, Any] = {"divergence": "sampled_kl", "samples": DRAWN, "seed": 3}
    whole = fused_distill_loss(leaf, eye, teacher, eye, **arguments)
    right = torch.autograd.grad(whole.loss, leaf)[0]
    for loss in ({"divergence": "forward_kl"}, {"divergence": "sampled_kl", "options": {"samples": DRAWN}}):
        value, gradient = loss_and_gradient(student, drawn(teacher, 3), **loss)
        torch.testing.assert_close(value, whole.kd)
        torch.testing.assert_close(gradient, right)


def test_the_dense_form_weights_and_scale_agree_with_the_fused_one() -> None:
    teacher, student = logits_of()
    weights = torch.tensor([0.5, 1.0, 0.0, 2.0, 1.5])
    spec = LossSpec(divergence="forward_kl", kd_weight=0.7, scale_t2=True)
    labels = torch.tensor([1, 2, -100, 4, 5])
    problem = pose(
        Side(student, Head(torch.eye(V))), [drawn(teacher, 1)], labels, loss=spec, weights=weights, loss_scale=0.25
    )
    with torch.no_grad():
        fused = distill(problem, chunk_tokens=2)
    dense = loss_of_logits(problem, student, [problem.teachers[0].dense(V)])
    for name in ("kd", "ce", "loss"):
        torch.testing.assert_close(getattr(fused, name), getattr(dense, name))
    assert fused.metrics.num_ranked == dense.metrics.num_ranked == 0
    alone = [loss_and_gradient(student[t : t + 1], drawn_row(teacher, t))[0] for t in range(T)]
    torch.testing.assert_close(fused.kd, (torch.stack(alone) * weights).sum())


def drawn_row(teacher: Tensor, t: int) -> DrawnSide:
    whole = drawn(teacher, 1)
    assert whole.mean_logprob is not None
    return DrawnSide(whole.hidden[t : t + 1], whole.head, mean_logprob=whole.mean_logprob[t : t + 1])


def test_ids_of_two_and_three_bytes_come_back() -> None:
    for vocab in (1 << 16, (1 << 16) + 1, 151936):
        log_p = torch.full((2, vocab), -50.0)
        log_p[0, vocab - 1] = log_p[1, 70] = 0.0
        asked = Asked(sidecar=Sidecar(kind="sampled", entries=3))
        rows = sampled(log_p, torch.zeros(2, dtype=torch.int64), torch.arange(2), asked)
        assert rows.shape == (2, 4 + 3 * (2 if vocab == 1 << 16 else 3))
        side = DrawnSide.of(rows, vocab)
        assert side.hidden.tolist() == [[vocab - 1] * 3, [70] * 3]
        assert side.mean_logprob is not None
        assert side.mean_logprob.tolist() == [0.0, 0.0]
    assert DrawnSide.of(torch.zeros(0, 28, dtype=torch.uint8), 97).hidden.shape == (0, 12)


@pytest.mark.parametrize(
    "loss",
    [
        {"divergence": "reverse_kl"},
        {"divergence": "sampled_kl"},
        {"divergence": "sampled_kl", "options": {"samples": DRAWN, "power": 0.5}},
        {"divergence": "token_reverse_kl"},
        {"divergence": "top_k_kl", "options": {"k": 3}},
        {"temperature": 2.0},
    ],
)
def test_what_drawn_tokens_do_not_serve_is_refused(loss: dict[str, Any]) -> None:
    teacher, student = logits_of()
    with pytest.raises(ConfigError, match=r"serves forward_kl, soft_cross_entropy, or sampled_kl .*samples=12"):
        loss_and_gradient(student, drawn(teacher, 0), **loss)


def test_beside_another_teacher_drawn_tokens_are_refused() -> None:
    teacher, student = logits_of()
    sides = [drawn(teacher, 0), Side(teacher, Head(torch.eye(V)))]
    with pytest.raises(ConfigError, match="beside no other"):
        pose(Side(student, Head(torch.eye(V))), sides, None, loss=LossSpec(teacher_mix="losses"))


def test_the_log_probability_of_the_texts_own_tokens_is_all_that_token_reverse_kl_needs() -> None:
    teacher, student = logits_of()
    eye, tokens = torch.eye(V), torch.tensor([0, 36, 5, 5, 20])
    leaf = student.clone().requires_grad_()
    whole = fused_distill_loss(leaf, eye, teacher, eye, divergence="token_reverse_kl", next_tokens=tokens)
    apart = (student.log_softmax(-1) - teacher.log_softmax(-1)).gather(1, tokens[:, None])
    torch.testing.assert_close(whole.kd, apart.sum())
    rows = logprob(teacher.log_softmax(-1), tokens, torch.arange(T), Asked(sidecar=Sidecar(kind="logprob", entries=1)))
    side = TokenSide.of_tokens(rows, tokens, V)
    other = student.clone().requires_grad_()
    spec = LossSpec(divergence="token_reverse_kl")
    found = distill(pose(Side(other, Head(eye)), [side], None, loss=spec, tokens=tokens))
    torch.testing.assert_close(found.kd, whole.kd)
    gradients = [torch.autograd.grad(out.loss, each)[0] for out, each in ((whole, leaf), (found, other))]
    torch.testing.assert_close(*gradients)
    assert found.metrics.num_ranked == 0


def test_token_reverse_kl_is_the_reverse_kl_where_the_student_draws_the_tokens() -> None:
    teacher, student = (0.5 * each[:, :7] for each in logits_of())  # each token is drawn some ten times at least
    eye = torch.eye(7)

    def of(**arguments: Any) -> tuple[Tensor, Tensor]:
        leaf = student.clone().requires_grad_()
        out = fused_distill_loss(leaf, eye, teacher, eye, **arguments)
        return out.kd, torch.autograd.grad(out.loss, leaf)[0]

    right = of(divergence="reverse_kl")
    generator = torch.Generator().manual_seed(1)
    draws = torch.multinomial(student.softmax(-1), 400, replacement=True, generator=generator)
    found = [of(divergence="token_reverse_kl", next_tokens=draws[:, number]) for number in range(400)]
    for part in (0, 1):
        values = torch.stack([each[part].double() for each in found])
        error = (values.mean(0) - right[part].double()) / (values.std(0) / 20).clamp_min(1e-9)
        assert error.square().mean().sqrt() < (4.0, 1.5)[part]
        assert error.abs().max() < 5


def test_a_token_below_0_adds_nothing_and_tokens_are_needed() -> None:
    teacher, student = logits_of()
    eye = torch.eye(V)
    tokens = torch.tensor([3, -100, -100, 7, -100])
    some = fused_distill_loss(student, eye, teacher, eye, divergence="token_reverse_kl", next_tokens=tokens)
    two = fused_distill_loss(
        student[[0, 3]], eye, teacher[[0, 3]], eye, torch.tensor([3, 7]), divergence="token_reverse_kl"
    )
    torch.testing.assert_close(some.kd, two.kd)
    with pytest.raises(ConfigError, match="token_reverse_kl needs next_tokens, or labels"):
        fused_distill_loss(student, eye, teacher, eye, divergence="token_reverse_kl")
    with pytest.raises(ConfigError, match="next_tokens: label 37 is outside the vocabulary of 37"):
        fused_distill_loss(
            student, eye, teacher, eye, divergence="token_reverse_kl", next_tokens=torch.tensor([3, 1, 2, 7, 37])
        )
