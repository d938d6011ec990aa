"""Prefill: prompts whose hidden states the sink keeps, as the engine is asked for them."""

# Shapes: n prompt tokens.

from dataclasses import dataclass
from typing import Any

import numpy as np

from kdpipe.stages.sglang.sink import Order

ARGUMENTS = {
    # A prefix found in the radix cache has no hidden states.
    "disable_radix_cache": True,
    "enable_return_hidden_states": True,
}
"""What an engine for it is started with."""

Key = tuple[int, int, int]
"""Number of the run it belongs to, sample, and position of the prompt's last token in it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """One request on its way to SGLang.

    key: by which its answer is known
    token_ids: int32 [n]
    order: what the sink writes; None where only the log-probability is asked for
    scored: ids whose log-probability after the prompt is reported; empty for none
    """

    key: Key
    token_ids: np.ndarray
    order: Order | None
    scored: tuple[int, ...]

    @property
    def number(self) -> int:
        return self.key[0]

    @property
    def who(self) -> str:
        return f"sample {self.key[1]}"

    async def ask(self, engine: Any) -> "Answer":
        """The answer of a sglang.Engine."""
        result = await engine.async_generate(
            input_ids=self.token_ids.tolist(),
            # One new token: with none SGLang runs nothing. At temperature 1 log-probabilities are the model's own.
            sampling_params={"max_new_tokens": 1, "temperature": 1.0}
            | ({"custom_params": self.order.to_params()} if self.order else {}),
            return_hidden_states=self.order is not None,
            return_logprob=bool(self.scored),
            token_ids_logprob=list(self.scored) or None,
        )
        return _answer(self, result["meta_info"])


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """What SGLang made of a prompt.

    receipt: the sink's, as floats; None where there was no order, or the engine answered with something else
    logprobs: log p(id | token_ids) of the scored ids, by the engine's own logits
    """

    key: Key
    receipt: list[float] | None
    logprobs: tuple[float, ...]


def _answer(prompt: Prompt, info: dict[str, Any]) -> Answer:
    states = info.get("hidden_states") or []
    is_receipt = len(states) == 1 and states[0] and not isinstance(states[0][0], list)
    return Answer(
        key=prompt.key,
        receipt=states[0] if is_receipt else None,
        logprobs=tuple(logprob for logprob, *_ in info["output_token_ids_logprobs"][0]) if prompt.scored else (),
    )
