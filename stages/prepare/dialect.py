r"""Dialects: how a chat template wants the parts of a message written.

Templates differ in where they look for a thought, in whether a call's arguments are an object or its JSON text, in what
stands for an empty answer beside a call, and in whether content is text or a list of parts. None of this is declared.
Invariant: of all ways to write a message, the first under which a probe comes out whole is taken; the order of the ways
is that of the OpenAI format. Nothing is known by a model's name.
Cost: 3 to 50 renderings, once a template.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from kdpipe.stages.prepare.forms import Message

THOUGHT_KEYS = ("reasoning_content", "thinking", "reasoning")
INLINE = "<think>\n{thought}\n</think>\n\n{content}"
"""A thought within the content, as DeepSeek-R1 and Qwen 3 write it."""

ANSWER = "kdpipeprobesanswer"
THOUGHT = "kdpipeprobesthought"
NAME, KEY, VALUE = "kdpipeprobestool", "kdpipeprobeskey", "kdpipeprobesvalue"
TOOL = {
    "type": "function",
    "function": {
        "name": NAME,
        "description": "Probe",
        "parameters": {"type": "object", "properties": {KEY: {"type": "string", "description": "Probe"}}},
    },
}
CALL_ID = "kdpipe123"  # Mistral's templates insist on nine letters and digits
# An object printed by Python, or JSON text that was coded once more: no model has seen either.
MISWRITTEN = (f"'{KEY}':", f'\\"{KEY}')

Try = Callable[[list[Message], list[Any] | None], str | None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Dialect:
    """How one template wants messages written.

    thought: the key of a thought; "" where it is written into the content; None where no way was found to show one, and
        it keeps its name
    arguments_as_text: a call's arguments as their JSON text, not as the object
    empty: what stands for the content of a message that only calls tools
    parts: content as a list of parts
    """

    thought: str | None = THOUGHT_KEYS[0]
    arguments_as_text: bool = False
    empty: str | None = ""
    parts: bool = False

    def write(self, messages: list[Message]) -> list[Message]:
        """The messages as the template wants them. Those given are left as they are."""
        return [self._write(message) for message in messages] if self != OPENAI else messages

    def _write(self, message: Message) -> Message:
        written = dict(message)
        thought = written.get("reasoning_content")
        if thought and self.thought is not None:
            del written["reasoning_content"]
        if thought and self.thought:
            written[self.thought] = thought
        elif thought and self.thought == "":
            written["content"] = INLINE.format(thought=thought, content=written["content"])
        if written.get("tool_calls"):
            written["tool_calls"] = [self._call(call) for call in written["tool_calls"]]
            written["content"] = written["content"] or self.empty
        if self.parts and written["content"] is not None:
            written["content"] = [{"type": "text", "text": written["content"]}]
        return written

    def _call(self, call: dict[str, Any]) -> dict[str, Any]:
        function = call.get("function")
        if not self.arguments_as_text or not isinstance(function, dict) or isinstance(function.get("arguments"), str):
            return call
        text = json.dumps(function.get("arguments", {}), ensure_ascii=False)
        return {**call, "function": {**function, "arguments": text}}


OPENAI = Dialect()


def learn_dialect(source: str, render: Try) -> Dialect:
    """The dialect of a template. source: its text; render: None where the template refuses the messages."""

    def shows(dialect: Dialect, messages: list[Message], tools: list[Any] | None, *pieces: str) -> bool:
        written = dialect.write(messages)
        text = render(written, tools)
        if text is None:  # some templates insist on a system prompt
            text = render([*dialect.write([{"role": "system", "content": "Hi"}]), *written], tools)
        return text is not None and all(piece in text for piece in pieces) and not any(m in text for m in MISWRITTEN)

    def first(ways: list[Dialect], otherwise: Dialect, messages: list[Message], *pieces: str) -> Dialect:
        """The first way that shows the pieces; with tools offered only where the template needs that."""
        return next(
            (way for tools in (None, [TOOL]) for way in ways if shows(way, messages, tools, *pieces)), otherwise
        )

    user: Message = {"role": "user", "content": "Hi"}
    answer: Message = {"role": "assistant", "content": ANSWER}
    dialect = first([OPENAI, replace(OPENAI, parts=True)], OPENAI, [user, answer], ANSWER)
    call = {"id": CALL_ID, "type": "function", "function": {"name": NAME, "arguments": {KEY: VALUE}}}
    calling: Message = {"role": "assistant", "content": "", "tool_calls": [call]}
    result: Message = {"role": "tool", "tool_call_id": CALL_ID, "name": NAME, "content": "Hi"}
    ways = [replace(dialect, empty=empty, arguments_as_text=text) for empty, text in product(("", None), (False, True))]
    dialect = first(ways, dialect, [user, calling, result, answer], NAME, KEY, VALUE)
    thought = {"reasoning_content": THOUGHT}
    ways = [replace(dialect, thought=key) for key in (*THOUGHT_KEYS, *([""] if "</think>" in source else []))]
    # Gemma 4 shows the thoughts of turns that call tools, and no others.
    unread = first(ways, replace(dialect, thought=None), [user, {**calling, **thought}], NAME, THOUGHT)
    return first(ways, unread, [user, {**answer, **thought}], ANSWER, THOUGHT)
