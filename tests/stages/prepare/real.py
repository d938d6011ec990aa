"""How the models of the ten templates in templates/ want messages written.

The templates are those of real models, cut to what shapes a conversation.

The ways are stated here by hand, from the models' own documentation: the code has to find them out by itself.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "templates"


@dataclass(frozen=True, kw_only=True)
class Real:
    """A template and how its model's documentation wants messages.

    eos: the tokenizer's end of text; stops: what else ends generation
    thought: the key of thoughts, None where there is no place for them
    empty: the content of a turn that only calls; arguments: how they are passed
    """

    source: str
    eos: str
    stops: tuple[str, ...] = ()
    thought: str | None = None
    empty: str | None = ""
    arguments: Callable[[Any], Any] = field(default=lambda value: value)

    def write(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Messages in the OpenAI format, written as this model's documentation says."""
        return [self._write(message) for message in messages]

    def _write(self, message: dict[str, Any]) -> dict[str, Any]:
        written = {key: value for key, value in message.items() if key != "reasoning_content"}
        if self.thought and "reasoning_content" in message:
            written[self.thought] = message["reasoning_content"]
        if "tool_calls" in message:
            written["content"] = message["content"] or self.empty
            written["tool_calls"] = [
                {**call, "function": {**call["function"], "arguments": self.arguments(call["function"]["arguments"])}}
                for call in message["tool_calls"]
            ]
        return written


def special_tokens(real: Real) -> tuple[str, ...]:
    """The special tokens of the tokenizer that the template is made for: those that it prints, and those that stop."""
    # DeepSeek's have bars of full width.
    kinds = (
        r"<\|\w+\|>",
        "<\uff5c[^\uff5c]+\uff5c>",
        "<(?:start|end)_of_turn>",
        r"\[gMASK\]|<sop>",
        r"\[/?[A-Z_]{4,}\]",
    )
    found = re.findall("|".join(kinds), real.source)
    return tuple(dict.fromkeys(["<s>", *found, real.eos, *real.stops]))


def _template(name: str) -> str:
    return (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


REAL = {
    "chatml": Real(source=_template("chatml"), eos="<|im_end|>"),
    "llama3": Real(
        source=_template("llama3"),
        eos="<|eot_id|>",
        stops=("<|end_of_text|>", "<|eom_id|>"),
    ),
    "gemma": Real(source=_template("gemma"), eos="<eos>", stops=("<end_of_turn>",)),
    "mistral": Real(source=_template("mistral"), eos="</s>"),
    "qwen3": Real(source=_template("qwen3"), eos="<|im_end|>", thought="reasoning_content"),
    "deepseek_r1": Real(
        source=_template("deepseek_r1"),
        eos="<\uff5cend\u2581of\u2581sentence\uff5c>",
        empty=None,
        arguments=_json,
    ),
    "glm": Real(
        source=_template("glm"),
        eos="<|endoftext|>",
        stops=("<|user|>", "<|observation|>"),
        thought="reasoning_content",
    ),
    "gpt_oss": Real(
        source=_template("gpt_oss"),
        eos="<|return|>",
        stops=("<|endoftext|>", "<|call|>"),
        thought="thinking",
    ),
    "cohere": Real(source=_template("cohere"), eos="<|END_OF_TURN_TOKEN|>"),
    "plain": Real(source=_template("plain"), eos="</s>"),
}
