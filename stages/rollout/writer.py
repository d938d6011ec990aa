"""Writers: what is asked of a model that writes answers, and what comes back.

Token ids in, token ids out: no answer is ever tokenised again.
"""

# Shapes: n tokens of a prompt, m of an answer.

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from kdpipe.stages.rollout.sampling import Sampling


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Prompt:
    """What is to be answered.

    key: an int64 that no other answer of the run has: its tokens are drawn by it
    token_ids: int32 [n], up to and with the generation prompt
    """

    key: int
    token_ids: np.ndarray


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Answer:
    """What was written.

    token_ids: int32 [m], the stop token included where it came to one
    logprobs: float32 [m], of each token, as Picked has them
    entropies: float32 [m], of the whole distribution at each token in nats, temperature 1; empty where nobody measured
    ended: it came to a stop token; otherwise it was cut at the longest length, and has no end
    """

    token_ids: np.ndarray
    logprobs: np.ndarray
    entropies: np.ndarray
    ended: bool


class Writer(Protocol):
    """Writes answers with the weights it has now."""

    def write(self, prompts: Sequence[Prompt], sampling: Sampling, seed: int) -> list[Answer]:
        """One answer a prompt, in order; another seed gives others. Raises TeacherError, EngineError."""
