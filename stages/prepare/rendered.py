r"""Rendered: what a template's text has of the conversation that went in.

Invariant: every answer, thought, call, tool and prompt of a conversation is looked for in its text, an assistant's in
the characters of its own turn; what is not there is a finding. Templates may trim blanks, write text as JSON and show
arguments as they like: a call is there when its name, its keys and its values are.
Cost: a search of each message, no rendering.
"""

import json
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from kdpipe.manifests.sample import IncidentKind
from kdpipe.stages.prepare.forms import Chat, Message
from kdpipe.stages.prepare.template import Span

QUOTED = str.maketrans({"\\": r"\\", "'": r"\'", "\n": r"\n", "\r": r"\r"})
"""How LFM2's template writes a text within single quotes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """Something about a record that becomes an incident once the record's file and line are known."""

    kind: IncidentKind
    detail: str


def position(text: str, piece: str, within: Span | None = None, *, last: bool = False) -> Span | None:
    """Where `piece`, less the blanks around it, stands in `text`, as it is or written as JSON; None where it does not.

    last: its last place instead of its first
    """
    start, end = within or (0, len(text))
    find = text.rfind if last else text.find
    body = piece.strip()
    if not body:
        return (end, end) if last else (start, start)
    at = find(body, start, end)
    if at >= 0:
        return at, at + len(body)
    for ascii_only in (False, True):
        coded = json.dumps(body, ensure_ascii=ascii_only)[1:-1]
        if coded != body and (at := find(coded, start, end)) >= 0:
            return at, at + len(coded)
    return None


@dataclass(slots=True)
class Pieces:
    """What of one assistant turn is in its span. end: where the last piece found ends"""

    end: int
    thought: bool = True
    content: bool = True
    calls: bool = True


def inline_thought(content: str) -> tuple[str, str]:
    """The thought that is written into an answer, as DeepSeek-R1 writes it, and the answer itself."""
    inner, tag, said = content.rpartition("</think>")
    return (inner.partition("<think>")[2] or inner, said) if tag else ("", content)


def look(text: str, span: Span, message: Message) -> Pieces:
    """Look for the pieces of an assistant message in its span, one behind the other."""
    start, limit = span
    found = Pieces(end=start)
    content, thought = message["content"], message.get("reasoning_content") or ""

    def step(*pieces: str) -> bool:
        end = found.end
        for piece in pieces:
            at = position(text, piece, (end, limit))
            if at is None:
                return False
            end = at[1]
        found.end = end
        return True

    inline, said = inline_thought(content)
    # The answer counts first: the words of a thought that is left out may recur in it.
    if not (step(thought, content) or step(content, thought) or (inline and step(inline, said))):
        found.thought = not (thought or inline).strip()
        found.content = step(said)
        if not found.content and not found.thought:
            found.thought = step(thought or inline)
    for call in message.get("tool_calls") or ():
        function = call.get("function") if isinstance(call.get("function"), dict) else call
        if not step(str(function.get("name") or "")):
            found.calls = False
            continue
        within = (found.end, limit)  # the arguments may come in any order
        spans = [_first_position(text, leaf, within) for leaf in _leaves(function.get("arguments", {}))]
        found.end = max([found.end, *(span[1] for span in spans if span)])
        found.calls = found.calls and None not in spans
    return found


def left_out(text: str, turns: Sequence[Span], chat: Chat, learnt: Collection[int]) -> Iterator[Finding]:
    """What of a conversation is not in its text.

    turns: spans of the assistant turns; one over all of the text where they are not known
    learnt: which of the turns are supervised, counted from 0
    """
    number = -1
    before = 0
    thoughts: list[int] = []
    for index, message in enumerate(chat.messages):
        role = message["role"]
        if role != "assistant":
            after = turns[number + 1][0] if number + 1 < len(turns) else len(text)
            within = (0, len(text)) if role == "system" or after <= before else (before, after)
            if position(text, message["content"], within) is None:
                yield Finding(kind="prompt_changed", detail=f"message {index + 1} ({role}) is not in the text as it is")
            continue
        number += 1
        span = turns[min(number, len(turns) - 1)]
        before = span[1]
        found = look(text, span, message)
        name = f"assistant turn {number + 1}"
        if not found.thought:
            thoughts.append(number + 1)
        says = inline_thought(message["content"])[1].strip() or message.get("tool_calls")
        if not (found.thought or says) and number in learnt:
            yield Finding(kind="answer_changed", detail=f"{name} is nothing but a thought, which is not in the text")
        elif not found.content:
            kind: IncidentKind = "answer_changed" if number in learnt else "prompt_changed"
            yield Finding(kind=kind, detail=f"{name} is not in the text as it is: {_missing(text, span, message)}")
        if not found.calls:
            kind = "tool_call_left_out" if number in learnt else "prompt_changed"
            yield Finding(kind=kind, detail=f"{name}: a tool call or part of its arguments is not in the text")
    if thoughts:
        which = ", ".join(map(str, thoughts[:12]))
        yield Finding(kind="thought_left_out", detail=f"the thought of assistant turn {which} is not in the text")
    if chat.tools:
        shown = sum(all(position(text, said) for said in _said_of(tool)) for tool in chat.tools)
        if shown < len(chat.tools):
            detail = f"{len(chat.tools) - shown} of {len(chat.tools)} tools are not in the text with all they say"
            yield Finding(kind="tools_left_out", detail=detail)


def _missing(text: str, span: Span, message: Message) -> str:
    """How much of an answer is missing, by its longest beginning that is in the text."""
    body = message["content"].strip()
    low, high = 0, len(body)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if position(text, body[:middle], span) else (low, middle - 1)
    return f"{len(body) - low} of its {len(body)} characters are left out or other"


def _first_position(text: str, spellings: Collection[str], within: Span) -> Span | None:
    """Where the first of the spellings stands; the same words may come once more in a later call."""
    return min(filter(None, (position(text, spelling, within) for spelling in spellings)), default=None)


def _leaves(value: Any) -> Iterator[Collection[str]]:
    """The keys and values of JSON, each in the ways it may be written: as text, as JSON or as Python writes it."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield _spellings(key)
            yield from _leaves(item)
    elif isinstance(value, list):
        for item in value:
            yield from _leaves(item)
    elif isinstance(value, str):
        yield _spellings(value)
    else:
        yield (json.dumps(value), str(value))


def _spellings(text: str) -> Collection[str]:
    body = text.strip()
    coded = (json.dumps(body, ensure_ascii=only)[1:-1] for only in (False, True))
    python = (repr(body)[1:-1], repr(body + '"')[1:-2])  # the second one: within single quotes whatever is in it
    return {body, *coded, *python, body.translate(QUOTED)}


def _said_of(value: Any, key: str = "") -> Iterator[str]:
    """What a tool's definition says: names and descriptions, and the names and choices of its parameters."""
    if isinstance(value, dict):
        for name, item in value.items():
            if key == "properties":
                yield name
            yield from _said_of(item, name if key != "properties" else "")
    elif isinstance(value, list):
        for item in value:
            yield from _said_of(item, key)
    elif isinstance(value, str) and key in ("name", "description", "enum"):
        yield value
