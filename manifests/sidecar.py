"""Side-cars: caches whose rows are a few numbers of the teacher's distribution each, and no hidden states.

    topk       the k likeliest tokens: k log-probabilities, falling, then the k ids; float32 [2 k]
    sampled    n tokens drawn: the mean of their log-probabilities, float32, then n ids of 2 or 3 bytes; uint8 [4 + ...]
    logprob    the log-probability of the token that follows in the text; float32 [1]

They are made of a cache, or imported. What a loss may ask of one is said by stages/loss/divergences.py.
Invariant: the architecture in a head's record tells the kind, and the width of a row how many tokens it has.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Kind = Literal["topk", "sampled", "logprob"]
ARCHITECTURES: Mapping[str, Kind] = {"TopK": "topk", "Sampled": "sampled", "Logprob": "logprob"}
"""What stands in a head's record in place of a model's architecture."""
TOP_K = "TopK"
MEAN_BYTES = 4
"""Of a drawn row, before its ids: the mean of their log-probabilities."""
LARGEST_ID = 1 << 24
"""From here on neither three bytes nor float32 hold every token id."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sidecar:
    """What the rows of a cache without hidden states have; entries: tokens of a row."""

    kind: Kind
    entries: int

    @property
    def has(self) -> str:
        """In words, of a row."""
        return {
            "topk": f"{self.entries} tokens of a row",
            "sampled": f"{self.entries} drawn tokens of a row",
            "logprob": "the log-probability of the text's own tokens",
        }[self.kind]

    @property
    def serves(self) -> str:
        """The divergences that can be had of it, beside cross-entropy; at temperature 1."""
        return {
            "topk": f"top_k_kl or top_k_reverse_kl with loss.options.k of at most {self.entries}, or top1_ce",
            "sampled": f"forward_kl, soft_cross_entropy, or sampled_kl with loss.options.samples={self.entries}",
            "logprob": "token_reverse_kl",
        }[self.kind]

    @property
    def bias(self) -> str:
        """What a loss on it is, beside one on whole rows."""
        return {
            "topk": f"biased: of all but {self.entries} tokens of a row the sum alone is known",
            "sampled": f"unbiased: values and gradients are right on average over draws, with the noise of "
            f"{self.entries} a row",
            "logprob": "exact at the text's own tokens; a reverse KL on average where the student wrote them",
        }[self.kind]


def sidecar_of(architecture: str, width: int, vocab_size: int) -> Sidecar | None:
    """The side-car of a head's record; None for a teacher's own."""
    kind = ARCHITECTURES.get(architecture)
    if kind is None:
        return None
    entries = {"topk": width // 2, "sampled": (width - MEAN_BYTES) // id_bytes(vocab_size), "logprob": 1}
    return Sidecar(kind=kind, entries=entries[kind])


def row_width(sidecar: Sidecar, vocab_size: int) -> int:
    """Numbers of a row, of the dtype that its kind has."""
    widths = {"topk": 2 * sidecar.entries, "sampled": MEAN_BYTES + sidecar.entries * id_bytes(vocab_size), "logprob": 1}
    return widths[sidecar.kind]


def id_bytes(vocab_size: int) -> int:
    """Bytes of a drawn token's id."""
    return 2 if vocab_size <= 1 << 16 else 3
