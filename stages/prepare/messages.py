"""Messages: a list of chat messages as people write it -> turns in one spelling, each with its mark.

Invariant: a turn has `role` and `content` (text), and where given `reasoning_content`, `tool_calls` (function.arguments
an object), `tool_call_id` and `name`; nothing else of a message is kept, and each key that held something and was
neither read nor refused is in `Reading.unread`. All text that is kept can be encoded. The same conversation gives the
same turns in each of these spellings:

    role, content                  OpenAI; parts of type text are joined, function_call is a tool call, developer system
    from, value                    ShareGPT, with human, gpt, function_call, observation and others
    a list of objects              as JSON, as the text of it, or as one object of lists (datasets' form)
    tool calls                     arguments as an object, or as the text of one
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from kdpipe.manifests.errors import DataError
from kdpipe.manifests.nearest import nearest
from kdpipe.stages.prepare.columns import (
    ASSISTANT_KEYS,
    CALL_KEYS,
    CHATS,
    MARKS,
    MESSAGE_KEYS,
    MESSAGE_MEDIA,
    PART_KEYS,
    READ,
    THOUGHTS,
)
from kdpipe.stages.prepare.json_stream import DECODER, DEEPEST, Doubled, is_too_deep, kind_of

ROLES = ("system", "user", "assistant", "tool")
SAME_ROLE = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "developer": "system",
    "function": "tool",
    "observation": "tool",
    "function_response": "tool",
    "tool_response": "tool",
}
CALLS = ("function_call", "tool_call")
"""Roles of ShareGPT whose value is the assistant's tool call."""
_SAYS = {"content", "value", *ASSISTANT_KEYS}
TEXT_PARTS = ("text", "input_text", "output_text")

Message = dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Turn:
    """A message, and whether its own mark lets it be learnt."""

    message: Message
    learnt: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """A record that is being read.

    unread: names of what it holds and was not read, "messages.id" for a message's
    prompts: its last answer may be missing
    """

    place: str
    unread: set[str] = field(default_factory=set)
    prompts: bool = False

    def error(self, message: str) -> DataError:
        return DataError(message, where=self.place)


def read_turns(value: object, column: str, reading: Reading) -> list[Turn]:
    """The messages in `value`, in order. Raises DataError naming column, message and key, never the text."""
    items = rows_of(value, f"column '{column}'", "messages", reading)
    if not items:
        raise reading.error(f"column '{column}': the list of messages is empty")
    waits = len(items) - 1 if reading.prompts else None
    return [_turn(item, f"{column}[{at}]", column, reading, waits=at == waits) for at, item in enumerate(items)]


def rows_of(value: object, name: str, what: str, reading: Reading) -> list[Any]:
    """A list of objects in any of its spellings: as it is, as JSON text, or as one object of lists of equal length."""
    found = value
    if isinstance(value, str):
        found = from_json(value, name, reading) if value.lstrip()[:1] in ("[", "{") else value
    if isinstance(found, dict) and found and _is_columns(found):
        check_once(found, name, reading)
        lengths = {len(each) for each in found.values()}
        if len(lengths) > 1:
            raise reading.error(f"{name}: an object of lists of {min(lengths)} to {max(lengths)} items; expected equal")
        found = [dict(zip(found, row, strict=True)) for row in zip(*found.values(), strict=True)]
    if not isinstance(found, list):
        raise reading.error(f"{name}: expected a list of {what}, found {kind_of(found)}")
    return found


def from_json(text: str, name: str, reading: Reading) -> Any:
    """The value that `text` is as JSON."""
    try:
        found = DECODER.decode(text)
    except json.JSONDecodeError as err:
        raise reading.error(f"{name}: text that is not JSON: {err.msg} at character {err.pos}") from None
    except RecursionError:
        raise reading.error(f"{name}: JSON that cannot be read: brackets are nested too deep") from None
    check_depth(found, name, reading)
    return found


def json_value(text: str) -> Any:
    """The list or object that a text is as JSON; None where it is something else."""
    if text.lstrip()[:1] not in ("[", "{"):
        return None
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def json_rows(value: Any) -> list[dict[str, Any]]:
    """The objects in a value or the JSON text of one: a list of them, one, or one of lists; [] for something else."""
    found = json_value(value) if isinstance(value, str) else value
    if isinstance(found, dict) and found and _is_columns(found):
        found = [dict(zip(found, row, strict=False)) for row in zip(*found.values(), strict=False)]
    rows = [found] if isinstance(found, dict) else found if isinstance(found, list) else []
    return rows if all(isinstance(row, dict) for row in rows) else []


def is_messages(text: str) -> bool:
    """Whether a text is messages as JSON, in any of their spellings, or records that hold them."""
    found = json_value(text)
    records = [each for each in (found if isinstance(found, list) else [found]) if isinstance(each, dict)]
    return any(map(_are_messages, (found, *(record[name] for record in records for name in CHATS if name in record))))


def _are_messages(value: Any) -> bool:
    rows = json_rows(value)
    kept = all(("role" in row and row.keys() & _SAYS) or {"from", "value"} <= row.keys() for row in rows)
    known = (*ROLES, *SAME_ROLE, *CALLS)
    return kept and any(row.get("role") in known or row.get("from") in known for row in rows)


def check_depth(value: object, name: str, reading: Reading) -> None:
    """Raise DataError for a value whose brackets are nested deeper than anything here, or a template, follows."""
    if is_too_deep(value):
        raise reading.error(f"{name}: brackets are nested too deep (at most {DEEPEST} levels)")


def text_of(value: object, name: str, reading: Reading) -> str:
    """`value`, which must be text that can be encoded."""
    if not isinstance(value, str):
        raise reading.error(f"{name}: expected text, found {kind_of(value)}")
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as err:
            raise reading.error(f"{name}: half a surrogate pair at character {err.start}") from None
    return value


def check_texts(value: object, name: str, reading: Reading) -> None:
    """Raise DataError unless `value` is JSON whose texts can all be encoded."""
    if isinstance(value, dict):
        check_once(value, name, reading)
        for key, item in value.items():
            text_of(key, f"{name}: a key", reading)
            check_texts(item, name, reading)
    elif isinstance(value, list):
        for item in value:
            check_texts(item, name, reading)
    elif value is not None and not isinstance(value, bool | int | float):
        text_of(value, name, reading)


def without_nulls(value: Any) -> Any:
    """`value` less the null entries that a columnar file adds to objects of one column, so that all files agree."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def read_tools(value: object, name: str, reading: Reading) -> list[Any]:
    """A list of objects, each of them as it is or as JSON text."""
    items = rows_of(value, name, "objects", reading)
    tools = [from_json(item, name, reading) if isinstance(item, str) else item for item in items]
    for tool in tools:
        if not isinstance(tool, dict):
            raise reading.error(f"{name}: expected a list of objects, found {kind_of(tool)} in it")
    check_texts(tools, name, reading)
    return [without_nulls(tool) for tool in tools]


def sort_out(fields: dict[str, Any], fates: dict[str, str], where: str, reading: Reading) -> None:
    """Raise DataError for a key that `fates` refuses and that says something; note those it does not know as unread."""
    for key, value in fields.items():
        fate = fates.get(key)
        if fate is None and value is not None:
            reading.unread.add(f"{where.partition('[')[0]}.{key}" if where else key)
        elif fate not in (None, READ) and not is_absent(value):
            raise reading.error(f"{where}: '{key}' cannot be honoured: {fate}" if where else f"column '{key}': {fate}")


def check_once(fields: dict[str, Any], where: str, reading: Reading) -> None:
    """Raise DataError for an object with one key twice."""
    if isinstance(fields, Doubled):
        shown = f"'{fields.name}'" if fields.name.isidentifier() and len(fields.name) <= 40 else "a key"
        raise reading.error(f"{where}: {shown} stands there twice; keep one")


def is_absent(value: object) -> bool:
    """Null and what is empty say nothing, nor do the objects and lists of nothing else that columnar files make."""
    if isinstance(value, dict | list):
        items = value.values() if isinstance(value, dict) else value
        return all(each != "" and is_absent(each) for each in items)
    return value is None or value == ""


def _turn(item: object, name: str, column: str, reading: Reading, *, waits: bool) -> Turn:
    """A message as a turn. waits: an answer may be missing"""
    if not isinstance(item, dict):
        raise reading.error(f"{name}: expected an object, found {kind_of(item)}")
    check_once(item, name, reading)
    sort_out(item, MESSAGE_KEYS, name, reading)
    old = "from" in item or ("role" not in item and column == "conversations")  # for what is missing
    roles = {key: _role(item[key], key, name, reading) for key in ("role", "from") if item.get(key) is not None}
    contents = {key: item[key] for key in ("content", "value") if item.get(key) is not None}
    for found, what in ((roles, "role"), (contents, "content")):
        if len(found) > 1 and len({json.dumps(each) for each in found.values()}) > 1:
            raise reading.error(f"{name}: which is the {what}, {either(found)}? Keep one")
    if not roles:
        key = "from" if old else "role"
        raise reading.error(f"{name}: expected a role under '{key}', found {_found(item, key)}")
    role = next(iter(roles.values()))
    key = next(iter(contents), "value" if old else "content")
    where = f"{name} ({role}): '{key}'"
    extras = _extras(item, role, f"{name} ({role})", reading)
    content = contents.get(key)
    if role in CALLS:
        if "tool_calls" in extras:
            raise reading.error(f"{name}: which is the tool call, '{key}' or 'tool_calls'? Keep one")
        extras["tool_calls"] = _in_openai_shape(_calls(content, where, reading))
        role, content = "assistant", ""
    if content is None and (extras.get("tool_calls") or extras.get(THOUGHTS[0]) or (waits and role == "assistant")):
        content = ""
    if content is None:
        raise reading.error(f"{where} is {_found(item, key)}")
    message = {"role": role, "content": _content(content, where, reading), **extras}
    learnt = _learnt(item, name, reading)
    if role != "assistant" and learnt and (marks := [key for key in MARKS if item.get(key)]):
        reading.unread.add(f"{column}.{marks[0]} of {role}")  # only answers are learnt
    return Turn(message=message, learnt=learnt)


def _role(said: object, key: str, name: str, reading: Reading) -> str:
    if not isinstance(said, str):
        raise reading.error(f"{name}: expected a role under '{key}', found {kind_of(said)}")
    role = SAME_ROLE.get(said, said)
    if role not in (*ROLES, *CALLS):
        known = (*ROLES, *SAME_ROLE, *CALLS)
        # Only what is a word can be a role misspelt; anything else may be text of the data, which is not shown.
        shown = f"'{said}'{nearest(said, known)}" if said.isidentifier() and len(said) <= 20 else "a longer text"
        raise reading.error(f"{name}: unknown role {shown} (known: {', '.join(known)})")
    return role


def _extras(item: dict[str, Any], role: str, name: str, reading: Reading) -> Message:
    """What a template may read beside role and content, in one spelling; it belongs to the conversation."""
    extras: Message = {}
    item = {key: value for key, value in item.items() if not is_absent(value)}
    if role not in ("assistant", *CALLS) and (others := [key for key in ASSISTANT_KEYS if key in item]):
        raise reading.error(
            f"{name}: '{others[0]}' cannot be honoured: only the assistant has thoughts and calls tools"
        )
    calls = [key for key in ("tool_calls", "function_call") if key in item]
    if len(calls) > 1:
        raise reading.error(f"{name}: which is the tool call, 'tool_calls' or 'function_call'? Keep one")
    for key in calls:
        if found := _calls(item[key], f"{name}: '{key}'", reading):
            extras["tool_calls"] = found if key == "tool_calls" else _in_openai_shape(found)
    for also in ("tool_call_id", "name"):
        if also in item:
            extras[also] = text_of(item[also], f"{name}: '{also}'", reading)
    thoughts = {key: text_of(item[key], f"{name}: '{key}'", reading) for key in THOUGHTS if key in item}
    if len(set(thoughts.values())) > 1:
        raise reading.error(f"{name}: which is the thought, {either(thoughts)}? Keep one")
    if thoughts:
        extras[THOUGHTS[0]] = next(iter(thoughts.values()))
    return extras


def _calls(value: object, name: str, reading: Reading) -> list[Message]:
    """Tool calls in OpenAI's shape."""
    found = from_json(value, name, reading) if isinstance(value, str) else value
    is_one = isinstance(found, dict) and ("name" in found or "function" in found) and not _is_columns(found)
    calls = read_tools([found] if is_one else found, name, reading)
    return [_call(call, f"{name}[{index}]", reading) for index, call in enumerate(calls)]


def _in_openai_shape(calls: list[Message]) -> list[Message]:
    return [call if "function" in call else {"type": "function", "function": call} for call in calls]


def _is_columns(value: dict[str, Any]) -> bool:
    return all(isinstance(each, list) for each in value.values())


def _call(call: Message, name: str, reading: Reading) -> Message:
    """A call with its arguments as an object; a flat one stays flat, as templates that read such calls expect."""
    function = call.get("function", call)
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise reading.error(f"{name}: expected a function with its name and arguments")
    given = [each["arguments"] for each in (function, call) if each.get("arguments") not in (None, "", {})]
    if any(each != given[0] for each in given):
        raise reading.error(f"{name}: which are the arguments, those in 'function' or those beside it? Keep one")
    held = {key: value for key, value in (call | function).items() if not is_absent(value)}
    if "arguments" not in call | function and (others := [key for key in held if CALL_KEYS.get(key) != READ]):
        shown = ", ".join(f"'{key[:40]}'" for key in others[:5])
        raise reading.error(f"{name}: expected the function's 'arguments', found {shown}")
    sort_out(held, CALL_KEYS, name, reading)
    arguments = given[0] if given else {}
    if isinstance(arguments, str):
        # Its nulls were written by somebody, so they stay.
        arguments = from_json(arguments, f"{name}: 'arguments'", reading) if arguments.strip() else {}
        check_texts(arguments, f"{name}: 'arguments'", reading)
    if not isinstance(arguments, dict):
        raise reading.error(f"{name}: 'arguments': expected an object, found {kind_of(arguments)}")
    whole = {**_known(function), "arguments": arguments}
    if function is call:
        return whole
    return {**{key: value for key, value in _known(call).items() if key != "arguments"}, "function": whole}


def _known(call: Message) -> Message:
    return {key: value for key, value in call.items() if CALL_KEYS.get(key) == READ}


def _learnt(item: dict[str, Any], name: str, reading: Reading) -> bool:
    """What the message's own marks say: not to be learnt where they are 0 or false."""
    marks = {key: item[key] for key in MARKS if item.get(key) is not None}
    for key, value in marks.items():
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            shown = f"{value:g}" if isinstance(value, float | int) and abs(value) < 1e6 else kind_of(value)
            raise reading.error(
                f"{name}: '{key}' is {shown}; expected 0 or 1 (false or true), tokens cannot be weighted"
            )
    if len({bool(value) for value in marks.values()}) > 1:
        raise reading.error(f"{name}: is it learnt? {either(marks)} say both; keep one")
    return all(marks.values())


def either(names: Iterable[str]) -> str:
    return " or ".join(f"'{name}'" for name in names)


def _found(item: dict[str, Any], key: str) -> str:
    if key in item:
        return kind_of(item[key])
    listed = ", ".join(str(name)[:40] for name in list(item)[:20]) or "none"
    return f"missing (keys: {listed})"


def _content(value: object, name: str, reading: Reading) -> str:
    """The text of a message: a string, or the texts of its parts joined."""
    if not (isinstance(value, list) or (isinstance(value, dict) and _is_columns(value)) or _is_parts(value)):
        return text_of(value, name, reading)
    texts = []
    for part in rows_of(value, name, "parts", reading):
        if not isinstance(part, dict) or part.get("type") not in TEXT_PARTS:
            found = f"a part of type '{str(part.get('type'))[:40]}'" if isinstance(part, dict) else kind_of(part)
            raise reading.error(f"{name}: expected parts of type 'text', found {found}")
        check_once(part, name, reading)
        sort_out(part, PART_KEYS, name, reading)
        texts.append(text_of(part.get("text"), f"{name}: 'text'", reading))
    return "".join(texts)


def _is_parts(value: object) -> bool:
    """Whether a text is a list of parts as JSON; any other text is what it is."""
    rows = json_rows(value) if isinstance(value, str) else []
    kinds = (*TEXT_PARTS, *MESSAGE_MEDIA)
    return bool(rows) and all(row.get("type") in kinds and row.keys() & (PART_KEYS.keys() - {"type"}) for row in rows)
