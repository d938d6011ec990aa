"""METHODS: the one table of what student.align may name across tokenizers, with the options of each.

To add one: its dense definition in reference.py, its passes, an entry here; the tests run over the table.
S and T are softmax(logits / temperature) of student and teacher, each over its own vocabulary.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from kdpipe.manifests.errors import ConfigError
from kdpipe.manifests.nearest import nearest
from kdpipe.stages.loss.divergences import DIVERGENCES, Option

DRAWN_OR_RANKED = {"sampled_kl", "hierarchical_ranking", "top_k_kl", "top_k_reverse_kl", "top1_ce", "adaptive_kl"}
EVERY = tuple(name for name, divergence in DIVERGENCES.items() if not divergence.of_token)


@dataclass(frozen=True, kw_only=True, slots=True)
class Method:
    """A way to compare models of other vocabularies: what it computes, which divergences and options it takes.

    divergences: names of DIVERGENCES; () for a method with a distance of its own
    when: in which case to take it
    """

    name: str
    formula: str
    source: str
    when: str
    divergences: tuple[str, ...]
    options: Mapping[str, Option] = field(default_factory=dict)

    def resolve(self, given: Mapping[str, float]) -> dict[str, float]:
        """Every option of the method with its value; those of the divergence are not looked at."""
        for name, value in given.items():
            if name in self.options and not self.options[name].holds(value):
                option = self.options[name]
                raise ConfigError(
                    f"{name} ({option.meaning}) must be {option}, got {value!r}", where=f"method {self.name}"
                )
        return {name: float(given.get(name, option.default)) for name, option in self.options.items()}


METHODS: Mapping[str, Method] = {
    method.name: method
    for method in (
        Method(
            name="shared-vocab",
            formula="D(T', S') of every exact span, T' and S' renormalised over the tokens that both have",
            source="KDFlow's simple_ctkd; here with bytes instead of stripped strings, span by span",
            when="vocabularies that mostly overlap; any divergence",
            divergences=EVERY,
        ),
        Method(
            name="uld",
            formula="sum over ranks of |S - T|, both sorted, at the first rows of every span, where both models have "
            "read the same text; the shorter row is padded with zeros",
            source="Boizard et al. 2024, arXiv 2402.12030",
            when="vocabularies that hardly overlap and no time for another method: ranks say nothing of which token",
            divergences=(),
        ),
        Method(
            name="gold",
            formula="a D(t, q) over the tokens that both have + b sum over ranks of |q - t| over the others, of every "
            "span; q and t are the distribution at its last row times the probabilities of its tokens before",
            source="TRL's GOLD with its hybrid loss; D is its generalised JSD of unnormalised distributions",
            when="as TRL's runs; D is jsd, forward_kl or reverse_kl",
            divergences=("jsd", "forward_kl", "reverse_kl"),
            options={
                "first_row": Option(
                    default=0,
                    low=0,
                    high=1,
                    meaning="1 merges a span into its first row's distribution instead of its last",
                    whole=True,
                ),
                "matched_weight": Option(
                    default=0.0, low=0.0, high=1e3, meaning="a; both weights 0: the share of the teacher's tokens"
                ),
                "unmatched_weight": Option(default=0.0, low=0.0, high=1e3, meaning="b; both weights 0: 1 - that share"),
            },
        ),
        Method(
            name="xtoken",
            formula="D(T, S W) of every exact span, W a sparse projection of the student's tokens onto the teacher's; "
            "hybrid = 1: D over pairs of tokens alike + sum over ranks of |S - T| over the others",
            source="X-Token, arXiv 2605.21699 (P-KL and H-KL)",
            when="tokens that matter are split by the other model, numerals above all",
            divergences=EVERY,
            options={
                "top_k": Option(default=4, low=1, high=64, meaning="pieces of a token that have a weight", whole=True),
                "decay": Option(
                    default=0.1, low=0.0, high=1.0, meaning="weight of a piece over that of the one before"
                ),
                "hybrid": Option(default=0, low=0, high=1, meaning="0 is P-KL, 1 is H-KL", whole=True),
                "threshold": Option(default=0.6, low=0.0, high=1.0, meaning="least weight of a pair alike, for H-KL"),
            },
        ),
        Method(
            name="chunk",
            formula="tau D({p, 1 - p}, {q, 1 - q}) of every span, log p and log q its log-likelihoods over tau",
            source="ALM, Minixhofer et al. 2025, arXiv 2503.20083",
            when="vocabularies with little in common, byte-level students; sees the text's own tokens alone",
            divergences=tuple(name for name in EVERY if name not in DRAWN_OR_RANKED),
            options={"tau": Option(default=100.0, low=1.0, high=1e4, meaning="divides the log-likelihoods")},
        ),
        Method(
            name="dskd",
            formula="of every exact span D(softmax(head_S(h_T A)), S) + CE of the former + "
            "D(T, softmax(head_T(h_S B))), A and B trained projectors",
            source="DSKD v2 with exact token alignment, arXiv 2504.11426",
            when="hidden states carry more than the shared tokens do; adds two matrices to train",
            divergences=EVERY,
            options={
                "only_right": Option(
                    default=1,
                    low=0,
                    high=1,
                    meaning="1 leaves out, in the student's space, rows where the projected teacher is wrong",
                    whole=True,
                )
            },
        ),
    )
}


def find_method(name: str) -> Method:
    """The method of this name; ConfigError names the nearest known one."""
    if not isinstance(name, str) or name not in METHODS:
        raise ConfigError(
            f"unknown method '{name}', known: {', '.join(METHODS)}{nearest(str(name), METHODS)}", where="student.align"
        )
    return METHODS[name]
