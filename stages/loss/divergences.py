"""DIVERGENCES: the one table of what `divergence=` may name, with the options of each.

To add one: its definition in dense.py, its fused twin in pointwise.py, a line here; the tests run over the table.
T teacher, S student, both softmax(logits / temperature).
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

import kdpipe.stages.loss.dense as dense
import kdpipe.stages.loss.pointwise as pointwise
from kdpipe.manifests.errors import ConfigError, nearest


@dataclass(frozen=True, kw_only=True, slots=True)
class Option:
    """A number a divergence takes: default, closed range, meaning."""

    default: float
    low: float
    high: float
    meaning: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Divergence:
    """A divergence: dense definition, fused value and gradient, options.

    reference(log_p_teacher, log_p_student, **options) -> values [T]
    value_and_grad(rows, grad, **options) -> values [R], gradient with respect to the scaled student logits into grad
    """

    name: str
    formula: str
    source: str
    reference: Callable[..., Tensor]
    value_and_grad: Callable[..., Tensor]
    options: Mapping[str, Option] = field(default_factory=dict)

    def resolve(self, given: Mapping[str, float]) -> dict[str, float]:
        """Every option with its value; ConfigError for an unknown name or a value out of range."""
        where = f"divergence {self.name}"
        for name, value in given.items():
            if name not in self.options:
                known = ", ".join(self.options) or "none"
                hint = nearest(name, self.options)
                raise ConfigError(f"unknown option '{name}', it takes: {known}{hint}", where=where)
            option = self.options[name]
            number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
            if not number or not option.low <= value <= option.high:
                raise ConfigError(
                    f"{name} ({option.meaning}) must be in {option.low}..{option.high}, got {value!r}", where=where
                )
        return {name: given.get(name, option.default) for name, option in self.options.items()}


DIVERGENCES: Mapping[str, Divergence] = {
    divergence.name: divergence
    for divergence in (
        Divergence(
            name="forward_kl",
            formula="KL(T || S) = sum T (log T - log S)",
            source="Hinton et al. 2015, arXiv 1503.02531",
            reference=dense.forward_kl,
            value_and_grad=pointwise.forward_kl,
        ),
        Divergence(
            name="reverse_kl",
            formula="KL(S || T) = sum S (log S - log T)",
            source="Gu et al. 2023 (MiniLLM), arXiv 2306.08543",
            reference=dense.reverse_kl,
            value_and_grad=pointwise.reverse_kl,
        ),
        Divergence(
            name="jsd",
            formula="beta KL(T || M) + (1 - beta) KL(S || M), M = (1 - beta) S + beta T; "
            "beta = 0 is KL(T || S), beta = 1 is KL(S || T)",
            source="Agarwal et al. 2023 (GKD), arXiv 2306.13649; orientation and ends as in TRL",
            reference=dense.jsd,
            value_and_grad=pointwise.jsd,
            options={"beta": Option(default=0.5, low=0.0, high=1.0, meaning="the teacher's share of M")},
        ),
    )
}


def find(name: str) -> Divergence:
    """The divergence of this name; ConfigError names the nearest known one."""
    if name not in DIVERGENCES:
        raise ConfigError(
            f"unknown divergence '{name}', known: {', '.join(DIVERGENCES)}{nearest(name, DIVERGENCES)}", where="loss"
        )
    return DIVERGENCES[name]
