"""Problem: the checked arguments of one loss, shared by the dense reference and the fused code.

Invariant: a Problem that exists has shapes that fit, a vocabulary both heads have, and options the divergence knows.
"""

# Shapes: T tokens, V shared vocabulary, D student width, E teacher width.

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from kdpipe.manifests.errors import ConfigError
from kdpipe.stages.loss.divergences import Divergence, find
from kdpipe.stages.loss.head import Head, Side

IGNORED = -100  # the label of a token without cross-entropy, as in torch and transformers


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class DistillLoss:
    """Sums over tokens: kd and ce are detached scalars, loss = kd_weight * kd + (1 - kd_weight) * ce has gradients."""

    kd: Tensor
    ce: Tensor
    loss: Tensor


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Problem:
    """What is to be computed. teacher is None exactly when kd_weight is 0; the temperature is then 1."""

    student: Side
    teacher: Side | None
    labels: Tensor | None
    weights: Tensor | None
    vocab_size: int
    divergence: Divergence
    options: Mapping[str, float]
    temperature: float
    kd_weight: float
    kd_scale: float

    @property
    def num_tokens(self) -> int:
        return self.student.hidden.shape[0]


def side(
    hidden: Tensor | None, weight: Tensor | None, bias: Tensor | None, softcap: float | None, scale: float
) -> Side | None:
    return None if hidden is None or weight is None else Side(hidden, Head(weight, bias, softcap, scale))


def pose(
    student: Side,
    teacher: Side | None,
    labels: Tensor | None,
    *,
    divergence: str,
    options: Mapping[str, float],
    temperature: float,
    kd_weight: float,
    vocab_size: int | None,
    scale_t2: bool,
    token_weights: Tensor | None,
) -> Problem:
    """Check every argument against the others; ConfigError in one line where two disagree."""
    chosen = find(divergence)
    resolved = chosen.resolve(options)
    if not 0.0 <= kd_weight <= 1.0:
        raise ConfigError(f"kd_weight must be in 0..1, got {kd_weight}", where="loss")
    if not 0.0 < temperature < float("inf"):
        raise ConfigError(f"temperature must be above 0, got {temperature}", where="loss")
    if teacher is None and kd_weight > 0.0:
        raise ConfigError(f"kd_weight {kd_weight} needs teacher_hidden and teacher_head; only 0 does not", where="loss")
    if labels is None and kd_weight < 1.0:
        raise ConfigError(f"kd_weight {kd_weight} mixes in cross-entropy and so needs labels", where="loss")
    if kd_weight == 0.0:
        teacher, temperature = None, 1.0
    vocab_size = shared_vocab(student, teacher, vocab_size)
    if labels is not None:
        labels = checked_labels(labels, student.hidden.shape[0], vocab_size)
    if token_weights is not None:
        token_weights = checked_weights(token_weights, student.hidden.shape[0])
    return Problem(
        student=student,
        teacher=teacher,
        labels=labels,
        weights=token_weights,
        vocab_size=vocab_size,
        divergence=chosen,
        options=resolved,
        temperature=temperature,
        kd_weight=kd_weight,
        kd_scale=temperature**2 if scale_t2 else 1.0,
    )


def shared_vocab(student: Side, teacher: Side | None, vocab_size: int | None) -> int:
    """The vocabulary both heads are cut to, after checking both; by default the rows of the smaller head.

    Cutting is right because the rows beyond the tokenizer's size are padding and come last."""
    sides = {"student": student} if teacher is None else {"student": student, "teacher": teacher}
    if vocab_size is None:
        vocab_size = min(each.head.weight.shape[0] for each in sides.values())
    for owner, each in sides.items():
        each.check(vocab_size, owner)
    if len({each.hidden.shape[0] for each in sides.values()}) > 1:
        counts = " and ".join(f"{each.hidden.shape[0]} {owner} rows" for owner, each in sides.items())
        raise ConfigError(f"{counts}; give one of each for every supervised token", where="loss")
    return vocab_size


def checked_labels(labels: Tensor, num_tokens: int, vocab_size: int) -> Tensor:
    """Labels as int64; refused with another shape or, on a CPU where looking is free, outside the vocabulary."""
    if labels.shape != (num_tokens,) or labels.is_floating_point():
        raise ConfigError(
            f"expected {num_tokens} integer labels, got {labels.dtype} {list(labels.shape)}", where="labels"
        )
    if labels.device.type == "cpu" and num_tokens:
        wrong = labels[(labels != IGNORED) & ((labels < 0) | (labels >= vocab_size))]
        if wrong.numel():
            raise ConfigError(
                f"label {int(wrong[0])} is outside the vocabulary of {vocab_size}; {IGNORED} means no cross-entropy",
                where="labels",
            )
    return labels.long()


def checked_weights(weights: Tensor, num_tokens: int) -> Tensor:
    """Weights as fp32 constants; refused with another shape or dtype."""
    if weights.shape != (num_tokens,) or not weights.is_floating_point():
        raise ConfigError(
            f"expected {num_tokens} weights, got {weights.dtype} {list(weights.shape)}", where="token_weights"
        )
    return weights.detach().float()
