"""Forms: a raw record -> a conversation, a prompt and its completion, or plain text.

Invariant: equal content gives an equal `content()` whatever the form or file it came in, so it gives an equal id; a
record that fits no form, or has a value of the wrong type, is a DataError naming file, line, column or role and never
the text. The forms, first match wins:

    messages                                  chat; a `prompt` beside it is ignored (TRL's GKD recipes)
    conversations                             ShareGPT: from and value, or role and content
    prompt + completion | response | output   strings, or lists of messages (TRL's prompt-completion)
    instruction [+ input] + output            alpaca
    text                                      plain language modelling
"""

from dataclasses import dataclass
from typing import Any

from kdpipe.manifests.errors import DataError, nearest
from kdpipe.manifests.sample import IncidentKind
from kdpipe.stages.prepare.json_stream import kind_of
from kdpipe.stages.prepare.sources import RawRecord

COMPLETIONS = ("completion", "response", "output")
COLUMNS = ("messages", "conversations", "prompt", *COMPLETIONS, "instruction", "text")
KNOWN = "messages; conversations; prompt with completion, response or output; instruction with output; text"
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}
# What a template may read besides role and content; leaving it out would train on another conversation.
MESSAGE_EXTRAS = ("tool_calls", "tool_call_id", "name", "reasoning_content")
# Which roles may follow a role; None is the start.
NEXT_ROLES: dict[str | None, tuple[str, ...]] = {
    None: ("system", "user"),
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("tool", "assistant"),
}
ROLES = ("system", "user", "assistant", "tool")

Message = dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Chat:
    """A conversation; its completion begins at message `completion_from`, or is the last assistant turn."""

    messages: list[Message]
    tools: list[Any] | None = None
    completion_from: int | None = None

    def content(self) -> object:
        return {"messages": self.messages, "tools": self.tools} if self.tools else {"messages": self.messages}

    def emptiness(self) -> tuple[IncidentKind, str] | None:
        """Why there is nothing to learn: an assistant turn says nothing and calls no tool."""
        turns = [message for message in self.messages if message["role"] == "assistant"]
        for number, turn in enumerate(turns, start=1):
            if not turn["content"].strip() and not turn.get("tool_calls"):
                return "empty_completion", f"assistant turn {number} of {len(turns)} is empty"
        return None


@dataclass(frozen=True, kw_only=True, slots=True)
class Pair:
    """A prompt and its completion as strings: one exchange of a chat, or prompt + glue + completion as running text."""

    prompt: str
    completion: str
    glue: str = ""

    def chat(self) -> Chat:
        user, assistant = ({"role": "user", "content": self.prompt}, {"role": "assistant", "content": self.completion})
        return Chat(messages=[user, assistant])

    def content(self) -> object:
        return self.chat().content()

    def emptiness(self) -> tuple[IncidentKind, str] | None:
        return None if self.completion.strip() else ("empty_completion", "the completion is empty")


@dataclass(frozen=True, kw_only=True, slots=True)
class Text:
    """Running text."""

    text: str

    def content(self) -> object:
        return {"text": self.text}

    def emptiness(self) -> tuple[IncidentKind, str] | None:
        return None if self.text.strip() else ("empty_text", "the text is empty")


Form = Chat | Pair | Text


def read_form(record: RawRecord) -> Form:
    """What a record says, normalised; null columns count as absent. Raises DataError (see the module's invariant)."""
    fields = {name: value for name, value in record.fields.items() if value is not None}
    place = record.place
    for column in ("messages", "conversations"):
        if column in fields:
            return _chat(_messages(fields[column], column, place), fields, place)
    if "prompt" in fields:
        found = [column for column in COMPLETIONS if column in fields]
        if len(found) > 1:
            raise DataError(f"which is the answer to 'prompt': '{found[0]}' or '{found[1]}'? Keep one", where=place)
        if found:
            return _prompt_completion(fields, found[0], place)
    if "instruction" in fields and "output" in fields:
        return _alpaca(fields, place)
    if "text" in fields:
        return Text(text=_string(fields["text"], "column 'text'", place))
    raise _unrecognised(record)


def _unrecognised(record: RawRecord) -> DataError:
    columns = list(record.fields)
    problem = "no known form of record"
    near = ""
    nulls = [column for column in columns if column in COLUMNS and record.fields[column] is None]
    if nulls:
        near = f"; '{nulls[0]}' is null"
    else:
        for column in columns:
            if not near and column not in (*COLUMNS, "input"):
                near = nearest(column, COLUMNS)
    if "prompt" in columns:
        problem = f"'prompt' without an answer ({', '.join(COMPLETIONS)})"
    elif "instruction" in columns:
        problem = "'instruction' without 'output'"
    listed = ", ".join(str(column)[:40] for column in columns[:20]) or "none"
    return DataError(f"{problem}; columns: {listed}{near} (known forms: {KNOWN})", where=record.place)


def _chat(messages: list[Message], fields: dict[str, Any], place: str, completion_from: int | None = None) -> Chat:
    _check_order(messages, place)
    tools = fields.get("tools") or None
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise DataError(f"column 'tools': expected a list of objects, found {kind_of(tools)}", where=place)
    return Chat(messages=messages, tools=_without_nulls(tools), completion_from=completion_from)


def _prompt_completion(fields: dict[str, Any], column: str, place: str) -> Form:
    prompt, completion = fields["prompt"], fields[column]
    if isinstance(prompt, str) and isinstance(completion, str):
        text = _string(prompt, "column 'prompt'", place)
        return Pair(prompt=text, completion=_string(completion, f"column '{column}'", place))
    head = _turns(prompt, "user", "prompt", place)
    return _chat([*head, *_turns(completion, "assistant", column, place)], fields, place, completion_from=len(head))


def _turns(value: object, role: str, column: str, place: str) -> list[Message]:
    """A column that holds messages, or the text of one message of `role`."""
    if isinstance(value, str):
        return [{"role": role, "content": _string(value, f"column '{column}'", place)}]
    return _messages(value, column, place)


def _alpaca(fields: dict[str, Any], place: str) -> Pair:
    asked = [_string(fields[c], f"column '{c}'", place) for c in ("instruction", "input") if c in fields]
    completion = _string(fields["output"], "column 'output'", place)
    return Pair(prompt="\n\n".join(part for part in asked if part), completion=completion, glue="\n\n")


def _messages(value: object, column: str, place: str) -> list[Message]:
    if not isinstance(value, list):
        raise DataError(f"column '{column}': expected a list of messages, found {kind_of(value)}", where=place)
    if not value:
        raise DataError(f"column '{column}': the list of messages is empty", where=place)
    return [_message(item, f"{column}[{index}]", column, place) for index, item in enumerate(value)]


def _message(item: object, name: str, column: str, place: str) -> Message:
    """One message as role, content and whatever else a template reads."""
    if not isinstance(item, dict):
        raise DataError(f"{name}: expected an object, found {kind_of(item)}", where=place)
    sharegpt = column == "conversations" and "role" not in item
    role_key, content_key = ("from", "value") if sharegpt else ("role", "content")
    role = item.get(role_key)
    if not isinstance(role, str):
        raise DataError(f"{name}: expected a role under '{role_key}', found {_found(item, role_key)}", where=place)
    role = SHAREGPT_ROLES.get(role, role) if sharegpt else role
    if role not in ROLES:
        known = (*SHAREGPT_ROLES, *ROLES) if sharegpt else ROLES
        # Only what is a word can be a role misspelt; anything else may be text of the data, which is not told.
        said = f"'{role}'{nearest(role, known)}" if role.isidentifier() and len(role) <= 20 else "a longer text"
        raise DataError(f"{name}: unknown role {said} (known: {', '.join(known)})", where=place)
    extras = {key: _without_nulls(item[key]) for key in MESSAGE_EXTRAS if item.get(key)}
    content = item.get(content_key)
    if content is None and extras.get("tool_calls"):
        content = ""
    if content is None:
        raise DataError(f"{name} ({role}): '{content_key}' is {_found(item, content_key)}", where=place)
    return {"role": role, "content": _content(content, f"{name} ({role}): '{content_key}'", place), **extras}


def _found(item: dict[str, Any], key: str) -> str:
    if key in item:
        return kind_of(item[key])
    listed = ", ".join(str(name)[:40] for name in list(item)[:20]) or "none"
    return f"missing (keys: {listed})"


def _content(value: object, name: str, place: str) -> str:
    """The text of a message: a string, or the texts of its parts joined."""
    if not isinstance(value, list):
        return _string(value, name, place)
    texts = []
    for part in value:
        if not isinstance(part, dict) or part.get("type") != "text":
            came = f"a part of type '{str(part.get('type'))[:40]}'" if isinstance(part, dict) else kind_of(part)
            raise DataError(f"{name}: expected parts of type 'text', found {came}", where=place)
        texts.append(_string(part.get("text"), f"{name}: 'text'", place))
    return "".join(texts)


def _string(value: object, name: str, place: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{name}: expected text, found {kind_of(value)}", where=place)
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as err:
            raise DataError(f"{name}: half a surrogate pair at character {err.start}", where=place) from None
    return value


def _without_nulls(value: Any) -> Any:
    """`value` less the null entries that a columnar file adds to objects of one column, so that all files agree."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _check_order(messages: list[Message], place: str) -> None:
    before: str | None = None
    for number, message in enumerate(messages, start=1):
        role = message["role"]
        if role not in NEXT_ROLES[before]:
            came = f"'{role}' after '{before}'" if before else f"'{role}' at the start"
            wanted = " or ".join(f"'{name}'" for name in NEXT_ROLES[before])
            raise DataError(f"roles out of order: message {number} is {came}, expected {wanted}", where=place)
        before = role
    if all(message["role"] != "assistant" for message in messages):
        raise DataError("no assistant turn in the conversation: there is nothing to learn from it", where=place)
