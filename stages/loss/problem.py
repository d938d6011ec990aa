"""Problem: the checked arguments of one loss, shared by the dense reference and the fused code.

Invariant: a Problem that exists has shapes that fit, a vocabulary both heads have, and options the divergence knows.
"""

# Shapes: T tokens, V shared vocabulary, D student width, E teacher width.

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from kdpipe.manifests.errors import ConfigError
from kdpipe.stages.draws import uniform
from kdpipe.stages.loss.divergences import Divergence, find, is_number
from kdpipe.stages.loss.head import Side
from kdpipe.stages.models.head import Head

IGNORED = -100  # the label of a token without cross-entropy, as in torch and transformers
LABEL_DTYPES = {torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8}
TEMPERATURES = (1e-3, 1e3)
TOP_K = 10
RANKED_EVERY = 16
"""Ranking one row in 16 costs next to nothing; comparing the first of every row, 6 % of the loss on a CPU."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class DistillLoss:
    """Sums over tokens, fp32 scalars: loss has gradients, the rest is for reading.

    loss = loss_scale * (kd_weight * kd + (1 - kd_weight) * ce + z_loss * z)
    kd: the divergence, times temperature squared where that is asked for
    ce: cross-entropy, smoothed where that is asked for
    z: squared logarithm of the softmax's denominator
    """

    kd: Tensor
    ce: Tensor
    loss: Tensor
    z: Tensor
    metrics: "Metrics"


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Metrics:
    """What the pass sees on its way: unweighted sums at the loss's temperature; 0 without a teacher.

    teacher_entropy: of the teacher's distribution over all tokens, nats
    top1_agree: tokens for which the student likes no other token better than the teacher's likeliest
    top_k_mass: the student's probability of the teacher's TOP_K likeliest tokens
    num_ranked: how many tokens the last two are over, every RANKED_EVERY-th
    """

    teacher_entropy: Tensor
    top1_agree: Tensor
    top_k_mass: Tensor
    num_ranked: int


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Problem:
    """What is to be computed. teacher is None exactly when kd_weight is 0; the temperature is then 1."""

    student: Side
    teacher: Side | None
    labels: Tensor | None
    weights: Tensor | None
    draws: Tensor | None
    """Uniform numbers [T, K] of a sampled divergence."""
    vocab_size: int
    divergence: Divergence
    options: Mapping[str, float]
    temperature: float
    kd_weight: float
    kd_scale: float
    label_smoothing: float
    z_loss: float
    loss_scale: Tensor | float

    @property
    def num_tokens(self) -> int:
        return self.student.hidden.shape[0]

    def total(self, kd: Tensor, ce: Tensor, z: Tensor) -> Tensor:
        """The loss of these sums."""
        total = self.kd_weight * kd + (1.0 - self.kd_weight) * ce
        return (total + self.z_loss * z if self.z_loss else total) * self.loss_scale


def pose(
    student_hidden: Tensor,
    student_head: Tensor,
    teacher_hidden: Tensor | None,
    teacher_head: Tensor | None,
    labels: Tensor | None,
    *,
    divergence: str = "forward_kl",
    temperature: float = 1.0,
    kd_weight: float = 1.0,
    vocab_size: int | None = None,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
    student_scale: float = 1.0,
    teacher_scale: float = 1.0,
    scale_t2: bool = False,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    loss_scale: Tensor | float = 1.0,
    token_weights: Tensor | None = None,
    token_keys: Tensor | None = None,
    seed: int = 0,
    **options: float,
) -> Problem:
    """Check every argument of a loss against the others; ConfigError in one line where two disagree."""
    student = Side(student_hidden, Head(student_head, student_bias, student_softcap, student_scale))
    teacher = None
    for name, tensor in (("student_hidden", student_hidden), ("student_head", student_head)):
        if not isinstance(tensor, Tensor):
            raise ConfigError(f"expected a tensor, got {_told(tensor)}", where=name)
    if teacher_hidden is not None and teacher_head is not None:
        teacher = Side(teacher_hidden, Head(teacher_head, teacher_bias, teacher_softcap, teacher_scale))
    chosen = find(divergence)
    resolved = chosen.resolve(options)
    for name, value, low, high in (
        ("kd_weight", kd_weight, 0.0, 1.0),
        ("label_smoothing", label_smoothing, 0.0, 1.0),
        ("temperature", temperature, *TEMPERATURES),
        ("z_loss", z_loss, 0.0, 1e6),
    ):
        if not is_number(value) or not low <= value <= high:
            raise ConfigError(f"{name} must be a number in {low:g}..{high:g}, got {value!r}", where="loss")
    if not isinstance(seed, int):
        raise ConfigError(f"seed must be a whole number, got {seed!r}", where="loss")
    if teacher is None and kd_weight > 0.0:
        raise ConfigError(f"kd_weight {kd_weight} needs teacher_hidden and teacher_head; only 0 does not", where="loss")
    if labels is None and kd_weight < 1.0:
        raise ConfigError(f"kd_weight {kd_weight} mixes in cross-entropy and so needs labels", where="loss")
    if kd_weight == 0.0:
        teacher, temperature = None, 1.0
    vocab_size = shared_vocab(student, teacher, vocab_size)
    num_tokens = student_hidden.shape[0]
    return Problem(
        student=student,
        teacher=teacher,
        labels=None if labels is None else checked_labels(labels, num_tokens, vocab_size),
        weights=None if token_weights is None else checked_weights(token_weights, num_tokens),
        draws=None if teacher is None else drawn(chosen, resolved, token_keys, seed, student_hidden),
        vocab_size=vocab_size,
        divergence=chosen,
        options=resolved,
        temperature=float(temperature),
        kd_weight=float(kd_weight),
        kd_scale=temperature**2 if scale_t2 else 1.0,
        label_smoothing=float(label_smoothing),
        z_loss=float(z_loss),
        loss_scale=loss_scale,
    )


def drawn(
    divergence: Divergence, options: Mapping[str, float], keys: Tensor | None, seed: int, hidden: Tensor
) -> Tensor | None:
    """The uniform numbers [T, K] that a sampled divergence takes; by default a token's key is its place."""
    num_tokens = hidden.shape[0]
    if keys is not None and (not isinstance(keys, Tensor) or keys.shape != (num_tokens,) or keys.dtype != torch.int64):
        raise ConfigError(f"expected {num_tokens} int64 keys, got {_told(keys)}", where="token_keys")
    if divergence.draws is None:
        return None
    if keys is None:
        keys = torch.arange(num_tokens, device=hidden.device)
    return uniform(keys, int(options[divergence.draws]), seed)


def shared_vocab(student: Side, teacher: Side | None, vocab_size: int | None) -> int:
    """The vocabulary both heads are cut to, after checking both; by default the rows of the smaller head.

    Cutting is right because the rows beyond the tokenizer's size are padding and come last."""
    sides = {"student": student} if teacher is None else {"student": student, "teacher": teacher}
    if vocab_size is None:
        vocab_size = min(each.head.weight.shape[0] if each.head.weight.dim() else 0 for each in sides.values())
    for owner, each in sides.items():
        each.check(vocab_size, owner)
    if len({each.hidden.shape[0] for each in sides.values()}) > 1:
        counts = " and ".join(f"{each.hidden.shape[0]} {owner} rows" for owner, each in sides.items())
        raise ConfigError(f"{counts}; give one of each for every supervised token", where="loss")
    return vocab_size


def checked_labels(labels: Tensor, num_tokens: int, vocab_size: int) -> Tensor:
    """Labels as int64; refused with another shape or, on a CPU where looking is free, outside the vocabulary."""
    if not isinstance(labels, Tensor) or labels.shape != (num_tokens,) or labels.dtype not in LABEL_DTYPES:
        raise ConfigError(f"expected {num_tokens} integer labels, got {_told(labels)}", where="labels")
    labels = labels.long()
    if labels.device.type == "cpu" and num_tokens:
        wrong = labels[(labels != IGNORED) & ((labels < 0) | (labels >= vocab_size))]
        if wrong.numel():
            raise ConfigError(
                f"label {int(wrong[0])} is outside the vocabulary of {vocab_size}; {IGNORED} means no cross-entropy",
                where="labels",
            )
    return labels


def checked_weights(weights: Tensor, num_tokens: int) -> Tensor:
    """Weights as fp32 constants; refused with another shape or dtype or, on a CPU, where one is not finite."""
    if not isinstance(weights, Tensor) or weights.shape != (num_tokens,) or not weights.is_floating_point():
        raise ConfigError(f"expected {num_tokens} floating-point weights, got {_told(weights)}", where="token_weights")
    if weights.device.type == "cpu" and not bool(weights.isfinite().all()):
        raise ConfigError("every weight must be finite", where="token_weights")
    return weights.detach().float()


def _told(value: object) -> str:
    """What came, in few words."""
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
