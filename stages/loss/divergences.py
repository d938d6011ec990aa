"""DIVERGENCES: the one table of what `divergence=` may name, with the options of each.

To add one: its definition in dense.py, its fused twin in pointwise.py, a line here; the tests run over the table.
T teacher, S student, both softmax(logits / temperature).
"""

import numbers
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeGuard

from torch import Tensor

import kdpipe.stages.loss.dense as dense
import kdpipe.stages.loss.pointwise as pointwise
from kdpipe.manifests.errors import ConfigError
from kdpipe.manifests.nearest import nearest
from kdpipe.manifests.sidecar import Sidecar


def is_number(value: object) -> TypeGuard[float]:
    """Python's and numpy's numbers; True is none."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


@dataclass(frozen=True, kw_only=True, slots=True)
class Option:
    """A number a divergence takes: default, closed range, meaning, and whether it must be whole."""

    default: float
    low: float
    high: float
    meaning: str
    whole: bool = False
    smallest: float = 0.0
    """A number between 0 and this is refused: the formula would lose what it is to keep."""

    def holds(self, value: object) -> bool:
        """Whether it is a number of this range."""
        if not is_number(value) or not self.low <= value <= self.high or 0.0 < abs(value) < self.smallest:
            return False  # nan is in no range
        return not self.whole or value == int(value)

    def __str__(self) -> str:
        gap = f"0 or {self.smallest:g}" if self.smallest else f"{self.low:g}"
        return f"{'a whole number' if self.whole else 'a number'} in {gap}..{self.high:g}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Divergence:
    """A divergence: dense definition, fused value and gradient, options.

    reference(log_p_teacher, log_p_student, **options) -> values [T]
    value_and_grad(rows, **options) -> values [R], gradient [R, V] with respect to the scaled student logits
    """

    name: str
    formula: str
    source: str
    reference: Callable[..., Tensor]
    value_and_grad: Callable[..., tuple[Tensor, Tensor]]
    options: Mapping[str, Option] = field(default_factory=dict)
    draws: str | None = None
    """The option that says how many uniform numbers a token's draw takes; the dense definition takes them by name."""
    entries: str | int | None = None
    """How many of the teacher's likeliest tokens it looks at one by one, or the option that says so; None for all."""
    linear: bool = False
    """Whether it is linear in T but for a term without S: it can be had, on average, of tokens drawn from T."""
    of_token: bool = False
    """Whether it looks at the token that follows alone: `draws` are these then, [T, 1], below 0 for none."""

    def is_of(self, sidecar: Sidecar, given: Mapping[str, float]) -> bool:
        """Whether it can be had of what the rows of a side-car have."""
        options = self.resolve(given)
        if sidecar.kind == "logprob":
            return self.of_token
        if sidecar.kind == "sampled":
            as_drawn = options.get(self.draws or "", sidecar.entries) == sidecar.entries
            return self.linear and as_drawn and options.get("power", 1.0) == 1.0
        if self.entries is None:
            return False
        return (self.entries if isinstance(self.entries, int) else options[self.entries]) <= sidecar.entries

    def resolve(self, given: Mapping[str, float]) -> dict[str, float]:
        """Every option with its value; ConfigError for an unknown name or a value out of range."""
        where = f"divergence {self.name}"
        for name, value in given.items():
            if name not in self.options:
                known = ", ".join(self.options) or "none"
                hint = nearest(name, self.options)
                raise ConfigError(f"unknown option '{name}', it takes: {known}{hint}", where=where)
            option = self.options[name]
            if not option.holds(value):
                raise ConfigError(f"{name} ({option.meaning}) must be {option}, got {value!r}", where=where)
        return {name: float(given.get(name, option.default)) for name, option in self.options.items()}


INSIDE = 1e-6
"""How far a share stays from 0 and 1 where the formula ends there."""
K = Option(default=64, low=1, high=65536, meaning="entries taken of a row", whole=True)

DIVERGENCES: Mapping[str, Divergence] = {
    divergence.name: divergence
    for divergence in (
        Divergence(
            name="forward_kl",
            formula="KL(T || S) = sum T (log T - log S)",
            source="Hinton et al. 2015, arXiv 1503.02531",
            reference=dense.forward_kl,
            value_and_grad=pointwise.forward_kl,
            linear=True,
        ),
        Divergence(
            name="soft_cross_entropy",
            formula="-sum T log S = KL(T || S) + the teacher's entropy",
            source="Hinton et al. 2015, arXiv 1503.02531; torchtune's ForwardKLLoss",
            reference=dense.soft_cross_entropy,
            value_and_grad=pointwise.soft_cross_entropy,
            linear=True,
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
        Divergence(
            name="skew_kl",
            formula="KL(T || alpha T + (1 - alpha) S)",
            source="Ko et al. 2024 (DistiLLM), arXiv 2402.03898",
            reference=dense.skew_kl,
            value_and_grad=pointwise.skew_kl,
            options={
                "alpha": Option(
                    default=0.1, low=INSIDE, high=1.0 - INSIDE, meaning="the teacher's share of the mixture"
                )
            },
        ),
        Divergence(
            name="skew_reverse_kl",
            formula="KL(S || alpha S + (1 - alpha) T)",
            source="Ko et al. 2024 (DistiLLM), arXiv 2402.03898",
            reference=dense.skew_reverse_kl,
            value_and_grad=pointwise.skew_reverse_kl,
            options={
                "alpha": Option(
                    default=0.1, low=INSIDE, high=1.0 - INSIDE, meaning="the student's share of the mixture"
                )
            },
        ),
        Divergence(
            name="symmetric_kl",
            formula="r KL(T || S) + (1 - r) KL(S || T), r = forward_share",
            source="Jeffreys 1946; weights as in torchtune's SymmetricKLLoss",
            reference=dense.symmetric_kl,
            value_and_grad=pointwise.symmetric_kl,
            options={"forward_share": Option(default=0.5, low=0.0, high=1.0, meaning="weight of the forward KL")},
        ),
        Divergence(
            name="adaptive_kl",
            formula="h / (h + t) KL(T || S) + t / (h + t) KL(S || T), h and t the sums of |T - S| over the teacher's "
            "head and tail; the tail are the smallest probabilities whose sum is at most alpha; h, t are constants",
            source="Wu et al. 2024, arXiv 2404.02657; head and tail as in KDFlow",
            reference=dense.adaptive_kl,
            value_and_grad=pointwise.adaptive_kl,
            options={"alpha": Option(default=0.5, low=INSIDE, high=1.0 - INSIDE, meaning="mass of the teacher's tail")},
        ),
        Divergence(
            name="tvd",
            formula="sum |T - S| / 2",
            source="Wen et al. 2023 (f-distill), arXiv 2307.15190",
            reference=dense.tvd,
            value_and_grad=pointwise.tvd,
        ),
        Divergence(
            name="top1_ce",
            formula="-T[i] log S[i], i the teacher's likeliest token",
            source="KDFlow's top1_ce",
            reference=dense.top1_ce,
            value_and_grad=pointwise.top1_ce,
            entries=1,
        ),
        Divergence(
            name="alpha_beta",
            formula="sum (alpha T^(a+b) + beta S^(a+b) - (a+b) T^a S^b) / (a b (a+b)), a = alpha, b = beta, with its "
            "limits at 0; (1, 0) is KL(T || S), (0, 1) is KL(S || T)",
            source="Wang et al. 2025 (ABKD), arXiv 2505.04560; Cichocki et al. 2011",
            reference=dense.alpha_beta,
            value_and_grad=pointwise.alpha_beta,
            options={
                "alpha": Option(default=0.2, low=0.0, high=4.0, meaning="power of the teacher", smallest=1e-3),
                "beta": Option(default=0.7, low=0.0, high=4.0, meaning="power of the student", smallest=1e-3),
            },
        ),
        Divergence(
            name="top_k_kl",
            formula="KL(T' || S') over the teacher's k likeliest tokens and one bucket for all others",
            source="top-k distillation with the mass outside kept, as one outcome more",
            reference=dense.top_k_kl,
            value_and_grad=pointwise.top_k_kl,
            options={"k": K},
            entries="k",
        ),
        Divergence(
            name="top_k_reverse_kl",
            formula="KL(S' || T') over the teacher's k likeliest tokens and one bucket for all others",
            source="as top_k_kl",
            reference=dense.top_k_reverse_kl,
            value_and_grad=pointwise.top_k_reverse_kl,
            options={"k": K},
            entries="k",
        ),
        Divergence(
            name="sampled_kl",
            formula="mean over a sample of T / Q (log T - log S), the sample drawn with replacement from Q ~ T^power: "
            "KL(T || S) and its gradient on average; one value may be below 0",
            source="Anshumann et al. 2025 (Random Sampling KD), arXiv 2503.16870",
            reference=dense.sampled_kl,
            value_and_grad=pointwise.sampled_kl,
            options={
                "samples": Option(default=50, low=1, high=65536, meaning="tokens drawn of a row", whole=True),
                "power": Option(default=1.0, low=0.0, high=4.0, meaning="of the teacher in what is drawn from"),
            },
            draws="samples",
            linear=True,
        ),
        Divergence(
            name="token_reverse_kl",
            formula="log S[y] - log T[y] of the token y that follows, with gradient (log S[y] - log T[y]) d log S[y]: "
            "KL(S || T) and its gradient on average, where the student wrote y",
            source="policy gradient of the reverse KL; of stored tokens, offline: arXiv 2604.13010",
            reference=dense.token_reverse_kl,
            value_and_grad=pointwise.token_reverse_kl,
            of_token=True,
        ),
        Divergence(
            name="hierarchical_ranking",
            formula="hinge losses on the student's probabilities where they rank the k likeliest tokens of both models "
            "otherwise than the teacher does; see dense.hierarchical_ranking",
            source="KDFlow's hrl",
            reference=dense.hierarchical_ranking,
            value_and_grad=pointwise.hierarchical_ranking,
            options={"k": Option(default=5, low=1, high=64, meaning="entries taken of a row", whole=True)},
        ),
    )
}


def find(name: str) -> Divergence:
    """The divergence of this name; ConfigError names the nearest known one."""
    if not isinstance(name, str) or name not in DIVERGENCES:
        raise ConfigError(
            f"unknown divergence '{name}', known: {', '.join(DIVERGENCES)}{nearest(str(name), DIVERGENCES)}",
            where="loss",
        )
    return DIVERGENCES[name]
