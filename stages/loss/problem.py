"""Problem: the checked arguments of one loss, shared by the dense reference and the fused code.

Invariant: a Problem that exists has shapes that fit, a vocabulary both heads have, and options the divergence knows.
"""

# Shapes: T tokens, V shared vocabulary, D student width, E teacher width.

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from kdpipe.manifests.errors import ConfigError
from kdpipe.manifests.sample import IGNORED
from kdpipe.manifests.sidecar import Sidecar
from kdpipe.manifests.specs import LossSpec
from kdpipe.stages.draws import uniform
from kdpipe.stages.loss.divergences import Divergence, find, is_number
from kdpipe.stages.loss.head import Side
from kdpipe.stages.loss.sparse import DrawnSide
from kdpipe.stages.models.head import Head

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
    num_taught: how many tokens the entropy is over; across tokenizers the rows of the student's that are compared
    num_ranked: how many tokens agreement and mass are over, every RANKED_EVERY-th; across tokenizers of those that are
        one token on each side, both models over the tokens that they share
    """

    teacher_entropy: Tensor
    top1_agree: Tensor
    top_k_mass: Tensor
    num_taught: int
    num_ranked: int


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Problem:
    """What is to be computed. teachers is empty exactly when kd_weight is 0; the temperature is then 1."""

    student: Side
    teachers: tuple[Side, ...]
    teacher_weights: tuple[float, ...]
    """Of each teacher; their sum is 1."""
    teacher_mix: Literal["distributions", "losses"]
    """The student is compared with the weighted sum of the teachers' distributions, or with each, and that summed."""
    labels: Tensor | None
    weights: Tensor | None
    draws: Tensor | None
    """Uniform numbers [T, K] of a sampled divergence; the tokens [T, 1] of one that looks at these."""
    offset: Tensor | None
    """What is added to a token's divergence [T], where its teacher was drawn from; the student has no part in it."""
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

    @property
    def is_ranked(self) -> bool:
        """Whether there are likeliest tokens to compare."""
        return bool(self.teachers) and all(teacher.is_ranked for teacher in self.teachers)

    def offsets(self) -> Tensor:
        """What is added to the divergence of each token, its weight and the loss's own scale included [T]."""
        assert self.offset is not None
        scaled = self.offset * self.kd_scale
        return scaled if self.weights is None else scaled * self.weights

    def total(self, kd: Tensor, ce: Tensor, z: Tensor) -> Tensor:
        """The loss of these sums."""
        total = self.kd_weight * kd + (1.0 - self.kd_weight) * ce
        return (total + self.z_loss * z if self.z_loss else total) * self.loss_scale


def pose(
    student: Side,
    teachers: Sequence[Side],
    labels: Tensor | None,
    *,
    loss: LossSpec,
    vocab_size: int | None = None,
    weights: Tensor | None = None,
    keys: Tensor | None = None,
    tokens: Tensor | None = None,
    seed: int = 0,
    loss_scale: Tensor | float = 1.0,
) -> Problem:
    """Check all of a loss against each other; ConfigError in one line where two disagree.

    labels, weights, keys, tokens: one for each of the T tokens, as in fused_distill_loss
    """
    chosen = find(loss.divergence)
    resolved, offset = chosen.resolve(loss.options), None
    for name, low, high in (
        ("kd_weight", 0.0, 1.0),
        ("label_smoothing", 0.0, 1.0),
        ("temperature", *TEMPERATURES),
        ("z_loss", 0.0, 1e6),
    ):
        value = getattr(loss, name)
        if not is_number(value) or not low <= value <= high:
            raise ConfigError(f"{name} must be a number in {low:g}..{high:g}, got {value!r}", where="loss")
    if not isinstance(seed, int):
        raise ConfigError(f"seed must be a whole number, got {seed!r}", where="loss")
    if not teachers and loss.kd_weight > 0.0:
        raise ConfigError(
            f"kd_weight {loss.kd_weight} needs teacher_hidden and teacher_head; only 0 does not", where="loss"
        )
    if len(teachers) > 1 and loss.kd_weight > 0.0 and loss.teacher_mix not in ("distributions", "losses"):
        raise ConfigError(
            f"{len(teachers)} teachers of the same rows and teacher_mix {loss.teacher_mix!r}; it averages their "
            "'distributions' or their 'losses'",
            where="loss",
        )
    if labels is None and loss.kd_weight < 1.0:
        raise ConfigError(f"kd_weight {loss.kd_weight} mixes in cross-entropy and so needs labels", where="loss")
    taught = loss.kd_weight > 0.0
    if taught and any(isinstance(teacher, DrawnSide) for teacher in teachers):
        offset = of_drawn(chosen, loss, teachers)
        chosen, resolved = find("soft_cross_entropy"), {}
    temperature = loss.temperature if taught else 1.0
    vocab_size = shared_vocab(student, teachers if taught else (), vocab_size)
    num_tokens = student.hidden.shape[0]
    draws = drawn(chosen, resolved, keys, seed, student.hidden) if taught else None
    if taught and chosen.of_token:
        draws = looked_at(chosen, labels if tokens is None else tokens, num_tokens, vocab_size)
    return Problem(
        student=student,
        teachers=tuple(teachers) if taught else (),
        teacher_weights=shares(loss.teacher_weights, len(teachers)) if taught else (),
        teacher_mix=loss.teacher_mix if loss.teacher_mix == "losses" else "distributions",
        labels=None if labels is None else checked_labels(labels, num_tokens, vocab_size),
        weights=None if weights is None else checked_weights(weights, num_tokens),
        draws=draws,
        offset=offset,
        vocab_size=vocab_size,
        divergence=chosen,
        options=resolved,
        temperature=float(temperature),
        kd_weight=float(loss.kd_weight),
        kd_scale=temperature**2 if loss.scale_t2 else 1.0,
        label_smoothing=float(loss.label_smoothing),
        z_loss=float(loss.z_loss),
        loss_scale=loss_scale,
    )


def pose_tensors(
    student_hidden: Tensor,
    student_head: Tensor,
    teacher_hidden: Tensor | Sequence[Tensor] | None,
    teacher_head: Tensor | Sequence[Tensor] | None,
    labels: Tensor | None,
    *,
    vocab_size: int | None = None,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | Sequence[Tensor | None] | None = None,
    student_softcap: float | None = None,
    teacher_softcap: float | Sequence[float | None] | None = None,
    student_scale: float = 1.0,
    teacher_scale: float | Sequence[float] = 1.0,
    loss_scale: Tensor | float = 1.0,
    token_weights: Tensor | None = None,
    token_keys: Tensor | None = None,
    next_tokens: Tensor | None = None,
    seed: int = 0,
    **spec: Any,
) -> Problem:
    """The Problem of fused_distill_loss's arguments; spec: fields of LossSpec, and options of the divergence."""
    for name, tensor in (("student_hidden", student_hidden), ("student_head", student_head)):
        if not isinstance(tensor, Tensor):
            raise ConfigError(f"expected a tensor, got {_told(tensor)}", where=name)
    student = Side(student_hidden, Head(student_head, student_bias, student_softcap, student_scale))
    teachers = []
    if teacher_hidden is not None and teacher_head is not None:
        teachers = teacher_sides(teacher_hidden, teacher_head, teacher_bias, teacher_softcap, teacher_scale)
    options = {name: spec.pop(name) for name in list(spec) if name not in LossSpec.model_fields}
    return pose(
        student,
        teachers,
        labels,
        # Not validated: `pose` says what is wrong in the words of this surface.
        loss=LossSpec.model_construct(**spec, options=options),
        vocab_size=vocab_size,
        weights=token_weights,
        keys=token_keys,
        tokens=next_tokens,
        seed=seed,
        loss_scale=loss_scale,
    )


def teacher_sides(hidden: Any, *head: Any) -> list[Side]:
    """The teachers of fused_distill_loss's arguments: one of a tensor, as many as a sequence has.

    head: weight, bias, softcap and scale, each of all teachers or a sequence of one each
    """
    if isinstance(hidden, Tensor):
        return [Side(hidden, Head(*head))]
    parts = [part if isinstance(part, Sequence) else [part] * len(hidden) for part in head]
    for name, part in zip(("teacher_head", "teacher_bias", "teacher_softcap", "teacher_scale"), parts, strict=True):
        if len(part) != len(hidden):
            raise ConfigError(f"{len(part)} for {len(hidden)} teachers; give one each", where=name)
    return [Side(rows, Head(*own)) for rows, *own in zip(hidden, *parts, strict=True)]


def shares(weights: Sequence[float], count: int) -> tuple[float, ...]:
    """The weights of so many teachers, their sum 1; all equal where none are given."""
    if weights and len(weights) != count:
        raise ConfigError(f"{len(weights)} teacher_weights for {count} teachers; give one each", where="loss")
    for weight in weights:
        if not is_number(weight) or not 0.0 < weight < float("inf"):
            raise ConfigError(f"a teacher's weight must be a number above 0, got {weight!r}", where="loss")
    given = list(weights) or [1.0] * count
    return tuple(weight / sum(given) for weight in given)


def of_drawn(divergence: Divergence, loss: LossSpec, teachers: Sequence[Side]) -> Tensor | None:
    """What makes a divergence from a teacher that was drawn from of the cross-entropy with the draws [T]; None: it is.

    KL(T || S) is, on average, the mean of log T - log S over the draws: their cross-entropy is the second part.
    """
    drawn = next(each for each in teachers if isinstance(each, DrawnSide))
    sidecar = Sidecar(kind="sampled", entries=drawn.hidden.shape[1])
    if len(teachers) > 1 or loss.temperature != 1.0 or not divergence.is_of(sidecar, loss.options):
        raise ConfigError(
            f"a teacher that was drawn from serves {sidecar.serves}, at temperature 1 and beside no other", where="loss"
        )
    return None if divergence.name == "soft_cross_entropy" else drawn.mean_logprob


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


def looked_at(divergence: Divergence, tokens: Tensor | None, num_tokens: int, vocab_size: int) -> Tensor:
    """The tokens [T, 1] that a divergence of the text's own tokens looks at."""
    if tokens is None:
        raise ConfigError(f"{divergence.name} needs next_tokens, or labels", where="loss")
    return checked_labels(tokens, num_tokens, vocab_size, "next_tokens")[:, None]


def shared_vocab(student: Side, teachers: Sequence[Side], vocab_size: int | None) -> int:
    """The vocabulary all heads are cut to, after checking them; by default the rows of the smallest head.

    Cutting is right because the rows beyond the tokenizer's size are padding and come last."""
    sides = [("student", student), *(("teacher", teacher) for teacher in teachers)]
    if vocab_size is None:
        vocab_size = min(each.head.weight.shape[0] if each.head.weight.dim() else 0 for _, each in sides)
    for owner, each in sides:
        each.check(vocab_size, owner)
    if len({each.hidden.shape[0] for _, each in sides}) > 1:
        counts = " and ".join(f"{each.hidden.shape[0]} {owner} rows" for owner, each in sides)
        raise ConfigError(f"{counts}; give one of each for every supervised token", where="loss")
    return vocab_size


def checked_labels(labels: Tensor, num_tokens: int, vocab_size: int, where: str = "labels") -> Tensor:
    """Labels as int64; refused with another shape or, on a CPU where looking is free, outside the vocabulary."""
    if not isinstance(labels, Tensor) or labels.shape != (num_tokens,) or labels.dtype not in LABEL_DTYPES:
        raise ConfigError(f"expected {num_tokens} integer labels, got {_told(labels)}", where=where)
    labels = labels.long()
    if labels.device.type == "cpu" and num_tokens:
        wrong = labels[(labels != IGNORED) & ((labels < 0) | (labels >= vocab_size))]
        if wrong.numel():
            raise ConfigError(
                f"label {int(wrong[0])} is outside the vocabulary of {vocab_size}; {IGNORED} means none",
                where=where,
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
