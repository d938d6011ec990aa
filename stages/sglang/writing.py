"""Writing: answers and log-probabilities, as the engine is asked for them. Token ids in, token ids out."""

# Shapes: n tokens of a prompt or text, m written.

from dataclasses import dataclass
from typing import Any

import numpy as np

FOLDER_WEIGHTS = "folder"
"""The version of the weights that an engine starts with."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Write:
    """A prompt to be answered; a Message of the host.

    place: by which its answer is known
    token_ids: int32 [n]
    sampling: SGLang's own parameters
    """

    number: int
    place: int
    token_ids: np.ndarray
    sampling: dict[str, Any]

    @property
    def who(self) -> str:
        return f"prompt {self.place}"

    async def ask(self, engine: Any) -> "Written":
        """The answer of a sglang.Engine."""
        result = await engine.async_generate(
            input_ids=self.token_ids.tolist(), sampling_params=self.sampling, return_logprob=True
        )
        info = result["meta_info"]
        return Written(
            number=self.number,
            place=self.place,
            token_ids=np.array(result["output_ids"], np.int32),
            scored_ids=np.array([token_id for _, token_id, *_ in info["output_token_logprobs"]], np.int32),
            logprobs=np.array([logprob for logprob, *_ in info["output_token_logprobs"]], np.float32),
            reason=info["finish_reason"]["type"],
            version=info["weight_version"],
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Written:
    """What SGLang wrote.

    token_ids: int32 [m]
    scored_ids, logprobs: int32, float32 [m], the tokens that it gives log-probabilities of
    reason: "stop" at a stop token or an end of text of the model's own, "length", "abort"
    version: of the weights at the last token
    """

    number: int
    place: int
    token_ids: np.ndarray
    scored_ids: np.ndarray
    logprobs: np.ndarray
    reason: str
    version: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """A text int32 [n] whose tokens' log-probabilities are wanted; a Message of the host."""

    number: int
    token_ids: np.ndarray

    @property
    def who(self) -> str:
        return "the log-probabilities of a text"

    async def ask(self, engine: Any) -> "Scored":
        """The answer of a sglang.Engine."""
        result = await engine.async_generate(
            input_ids=self.token_ids.tolist(),
            sampling_params={"max_new_tokens": 1, "temperature": 1.0},
            return_logprob=True,
            logprob_start_len=0,
        )
        info = result["meta_info"]
        _, *scored = info["input_token_logprobs"]  # nothing comes before the first token
        return Scored(
            number=self.number,
            token_ids=np.array([token_id for _, token_id, *_ in scored], np.int32),
            logprobs=np.array([logprob for logprob, *_ in scored], np.float32),
            version=info["weight_version"],
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Scored:
    """Tokens int32 [n-1], the log-probability of each after those before it, float32 [n-1]; version: of the weights."""

    number: int
    token_ids: np.ndarray
    logprobs: np.ndarray
    version: str
