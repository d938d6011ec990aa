"""Forms: a raw record -> a conversation, a prompt and its completion, or plain text.

Invariant: equal content gives an equal `content()` whatever the form or file it came in, so it gives an equal id; a
record that fits no form, has a value of the wrong type, or can be read in two ways, is a DataError naming file, line,
column or role and never the text. What else it holds is read, refused or counted (columns.py). Forms, first match wins:

    messages | conversations                              chat, OpenAI's or ShareGPT's spelling (messages.py)
    prompt [+ input] + completion | response | output     texts, or lists of messages (TRL's prompt-completion)
    instruction [+ input] + output | ...                  alpaca
    text                                                  plain language modelling

A conversation takes `system` (or `system_prompt`), `tools` (or `functions`); alpaca and prompt forms also `history`, a
list of earlier [question, answer], and the answer's thought. A column of another form beside these must say the same
(TRL's GKD recipes keep the `prompt` beside messages).

Where prompts are asked for, a record that has no answer yet is one: a conversation that ends with the user, a tool or
an empty assistant turn, a `prompt` or `instruction` alone. Every other record is what it is without them.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from kdpipe.manifests.errors import DataError
from kdpipe.manifests.nearest import nearest
from kdpipe.manifests.sample import IncidentKind
from kdpipe.stages.prepare.columns import (
    ANSWERS,
    CHATS,
    CUT,
    JSON_COLUMNS,
    LABELS,
    MARKS,
    NO_WEIGHTS,
    OTHER_NAMES,
    PROVENANCE,
    READ,
    RECORD_COLUMNS,
    SAMPLE_WEIGHTS,
    SYSTEMS,
    THOUGHTS,
    TOOLS,
)
from kdpipe.stages.prepare.json_stream import kind_of
from kdpipe.stages.prepare.messages import (
    Message,
    Reading,
    Turn,
    check_depth,
    check_once,
    either,
    is_absent,
    is_messages,
    read_tools,
    read_turns,
    rows_of,
    text_of,
)
from kdpipe.stages.prepare.sources import RawRecord

ATTRIBUTE = re.compile(r"""\.([A-Za-z_]\w*)|\[\s*['"](\w+)['"]\s*\]""")
"""What a template takes from an object: `message.name` or `message['name']`."""
TOOL_KEYS = frozenset(
    ("id", "type", "function", "arguments", "parameters", "properties", "description", "required", "title", "default")
)
"""Of tools and their calls: where a message has a key of that name, no template means it."""

FORM_COLUMNS = (*CHATS, "prompt", *ANSWERS, "instruction", "text")
NO = ("false", "no", "0")
EMPTY_JSON = ("", "[]", "{}", "null")
KNOWN = "messages; conversations; prompt with completion, response or output; instruction with the same; text"
# Which roles may follow a role; None is the start.
NEXT_ROLES: dict[str | None, tuple[str, ...]] = {
    None: ("system", "user"),
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("tool", "assistant"),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Chat:
    """A conversation; its completion begins at message `completion_from`, or is the last assistant turn.

    unsupervised: numbers of the messages whose own marks say that they are not to be learnt
    is_prompt: it waits for its next answer, and nothing in it is to be learnt
    is_cut: its last answer does not end where its text does, so no end of it is to be learnt
    """

    messages: list[Message]
    tools: list[Any] | None = None
    completion_from: int | None = None
    unsupervised: frozenset[int] = frozenset()
    is_prompt: bool = False
    is_cut: bool = False

    def content(self) -> object:
        return {"messages": self.messages, "tools": self.tools} if self.tools else {"messages": self.messages}

    def emptiness(self) -> tuple[IncidentKind, str] | None:
        """Why there is nothing to learn: an assistant turn says nothing, thinks nothing and calls no tool.

        Of a prompt: why there is nothing to answer.
        """
        last = self.messages[-1]
        if self.is_prompt and last["role"] == "user" and not last["content"].strip():
            return "empty_text", "the prompt is empty"
        turns = [index for index, message in enumerate(self.messages) if message["role"] == "assistant"]
        for number, index in enumerate(turns, start=1):
            if not _says(self.messages[index]) and index not in self.unsupervised:
                return "empty_completion", f"assistant turn {number} of {len(turns)} is empty"
        return None


@dataclass(frozen=True, kw_only=True, slots=True)
class Pair:
    """A prompt and its completion as strings: one exchange of a chat, or prompt + glue + completion as running text.

    completion: None where the prompt waits for one
    """

    prompt: str
    completion: str | None
    glue: str = ""
    is_cut: bool = False

    @property
    def is_prompt(self) -> bool:
        return self.completion is None

    def chat(self) -> Chat:
        user = {"role": "user", "content": self.prompt}
        if self.completion is None:
            return Chat(messages=[user], is_prompt=True)
        return Chat(messages=[user, {"role": "assistant", "content": self.completion}], is_cut=self.is_cut)

    def content(self) -> object:
        return self.chat().content()

    def emptiness(self) -> tuple[IncidentKind, str] | None:
        if self.completion is None:
            return self.chat().emptiness()
        return None if self.completion.strip() else ("empty_completion", "the completion is empty")


@dataclass(frozen=True, kw_only=True, slots=True)
class Text:
    """Running text."""

    text: str
    is_prompt: ClassVar[bool] = False

    def content(self) -> object:
        return {"text": self.text}

    def emptiness(self) -> tuple[IncidentKind, str] | None:
        return None if self.text.strip() else ("empty_text", "the text is empty")


Form = Chat | Pair | Text


def read_form(record: RawRecord, unread: set[str] | None = None, *, prompts: bool = False) -> Form:
    """What a record says, normalised; null columns count as absent. Raises DataError (see the module's invariant).

    prompts: a record without an answer is a prompt, not an error
    The names of columns, and of keys of messages, that hold something and are not read are added to `unread`.
    """
    if record.error is not None:
        raise record.error
    reading = Reading(place=record.place, unread=set() if unread is None else unread, prompts=prompts)
    reading.unread.update(record.unread)
    check_once(record.fields, "the record", reading)
    for name in record.fields.keys() & RECORD_COLUMNS.keys():
        check_depth(record.fields[name], f"column '{name}'", reading)
    # What is read is taken out of `left`; what stays says nothing, says the same, or is refused.
    left = {name: value for name, value in record.fields.items() if not _is_null(name, value)}
    asked = [column for column in ("prompt", "instruction") if column in left]
    answers = [column for column in ANSWERS if column in left]
    if chat := next((column for column in CHATS if column in left), None):
        form: Form = _conversation(chat, left, reading)
    elif asked and (answers or (prompts and "text" not in left)):
        answer = _one(answers, left, f"the answer to '{asked[0]}'", reading)
        form = _exchange(asked[0], answer, left, reading)
    elif "text" in left:
        chat = "text"
        form = Text(text=text_of(left.pop("text"), "column 'text'", reading))
    else:
        raise _unrecognised(record)
    _settle(left, form, chat or asked[0], reading)
    if not isinstance(form, Text) and not form.is_prompt and record.fields.get(CUT) == "length":
        return replace(form, is_cut=True)
    return form


def prompt_in(form: Form, place: str) -> Form:
    """What a record's last answer follows, as a prompt; a prompt itself. Raises DataError for running text."""
    if isinstance(form, Text):
        raise DataError(
            "running text has no prompt, every token of it is learnt; give prompts, instructions or messages",
            where=place,
        )
    if form.is_prompt:
        return form
    if isinstance(form, Pair):
        return replace(form, completion=None, is_cut=False)
    unsupervised = form.unsupervised - {len(form.messages) - 1}
    return Chat(messages=form.messages[:-1], tools=form.tools, unsupervised=unsupervised, is_prompt=True)


def _is_null(name: str, value: object) -> bool:
    """Null, or the JSON text of nothing where JSON is expected."""
    return value is None or (name in JSON_COLUMNS and isinstance(value, str) and value.strip() in EMPTY_JSON)


def _unrecognised(record: RawRecord) -> DataError:
    columns = [*record.fields, *record.unread]
    problem = "no known form of record"
    near = ""
    others = [column for column in columns if column in OTHER_NAMES]
    nulls = [column for column in columns if column in FORM_COLUMNS and record.fields.get(column) is None]
    if nulls:
        near = f"; '{nulls[0]}' is null"
    elif others:
        near = "; rename " + " and ".join(f"'{column}' to '{OTHER_NAMES[column]}'" for column in others)
    else:
        for column in columns:
            if not near and column not in RECORD_COLUMNS:
                near = nearest(column, FORM_COLUMNS)
    if "chosen" in columns:
        problem = (
            "preference data; to learn what was chosen, rename 'chosen' to 'completion' (a list of both: 'messages')"
        )
    elif "prompt" in columns:
        problem = f"'prompt' without an answer ({', '.join(ANSWERS)})"
    elif "instruction" in columns:
        problem = "'instruction' without 'output'"
    listed = ", ".join(str(column)[:40] for column in columns[:20]) or "none"
    return DataError(f"{problem}; columns: {listed}{near} (known forms: {KNOWN})", where=record.place)


def _conversation(column: str, left: dict[str, Any], reading: Reading) -> Chat:
    turns = read_turns(left.pop(column), column, reading)
    return _chat([*_system(turns, left, reading), *turns], left, reading)


def _exchange(asked: str, answer: str | None, left: dict[str, Any], reading: Reading) -> Form:
    """A prompt and its answer, or the prompt alone. answer: the column that holds it"""
    prompt, completion = left.pop(asked), "" if answer is None else left.pop(answer)
    head, glue = _head(prompt, asked, left, reading)
    tail = [] if answer is None else _turns(completion, "assistant", answer, reading)
    thought = _one([name for name in THOUGHTS if not is_absent(left.get(name))], left, "the thought", reading)
    if thought and answer is None:
        raise reading.error(f"column '{thought}': a thought without an answer ({', '.join(ANSWERS)})")
    if thought and isinstance(completion, str):
        tail[0].message[THOUGHTS[0]] = text_of(left.pop(thought), f"column '{thought}'", reading)
    head = [*_system(head, left, reading), *head]
    chat = _chat([*head, *tail], left, reading, completion_from=len(head))
    if answer is None and not chat.is_prompt:
        raise reading.error(f"column '{asked}': it ends with an answer; rename it to 'messages'")
    if isinstance(prompt, str) and isinstance(completion, str) and len(head) == 1 and not (chat.tools or thought):
        said = None if chat.is_prompt else completion
        return Pair(prompt=head[0].message["content"], completion=said, glue=glue)
    return chat


def _head(prompt: object, column: str, left: dict[str, Any], reading: Reading) -> tuple[list[Turn], str]:
    """What stands before the answer, and what joins the two as running text."""
    if not isinstance(prompt, str):
        return read_turns(prompt, column, reading), ""
    parts = [_plain(prompt, f"column '{column}'", reading)]
    if "input" in left:
        parts.append(_plain(left.pop("input"), "column 'input'", reading))
    glue = "\n\n" if column == "instruction" or any(parts[1:]) else ""
    asked = Turn(message={"role": "user", "content": "\n\n".join(part for part in parts if part)})
    return [*_history(left, reading), asked], glue


def _plain(value: object, name: str, reading: Reading) -> str:
    """Text that is not messages as JSON: whether they are meant cannot be known."""
    text = text_of(value, name, reading)
    if is_messages(text):
        raise reading.error(f"{name}: is it text, or the messages that it is as JSON? Give a list of messages")
    return text


def _history(left: dict[str, Any], reading: Reading) -> list[Turn]:
    """Earlier questions and answers as turns."""
    value = left.pop("history", None)
    if is_absent(value):
        return []
    turns = []
    for index, pair in enumerate(rows_of(value, "column 'history'", "pairs [question, answer]", reading)):
        if not (isinstance(pair, list) and len(pair) == 2):
            raise reading.error(f"history[{index}]: expected a pair [question, answer], found {kind_of(pair)}")
        for role, text in zip(("user", "assistant"), pair, strict=True):
            turns.append(Turn(message={"role": role, "content": _plain(text, f"history[{index}] ({role})", reading)}))
    return turns


def _turns(value: object, role: str, column: str, reading: Reading) -> list[Turn]:
    """A column that holds messages, or the text of one message of `role`."""
    if isinstance(value, str):
        return [Turn(message={"role": role, "content": _plain(value, f"column '{column}'", reading)})]
    return read_turns(value, column, reading)


def _system(turns: list[Turn], left: dict[str, Any], reading: Reading) -> list[Turn]:
    """The system message that stands in a column of its own, unless it is the first of `turns` already."""
    column = _one([name for name in SYSTEMS if not is_absent(left.get(name))], left, "the system prompt", reading)
    if column is None:
        return []
    text = text_of(left.pop(column), f"column '{column}'", reading)
    if turns[0].message["role"] != "system":
        return [Turn(message={"role": "system", "content": text})]
    if turns[0].message["content"] != text:
        raise reading.error(f"which is the system prompt, column '{column}' or that of the messages? Keep one")
    return []


def _one(names: list[str], left: dict[str, Any], what: str, reading: Reading) -> str | None:
    """The one column of `names`, or None without any; those that say the same count as one."""
    if len(names) > 1 and any(left[name] != left[names[0]] for name in names[1:]):
        raise reading.error(f"which is {what}, {either(names)}? Keep one")
    return names[0] if names else None


def _chat(turns: list[Turn], left: dict[str, Any], reading: Reading, completion_from: int | None = None) -> Chat:
    messages = [turn.message for turn in turns]
    last = messages[-1]
    is_prompt = reading.prompts and (last["role"] in ("user", "tool") or _is_silent(last))
    _check_order(messages, reading, answered=not is_prompt)
    if is_prompt and _is_silent(last):
        messages.pop()
    column = _one([name for name in TOOLS if not is_absent(left.get(name))], left, "the list of tools", reading)
    tools = read_tools(left.pop(column), f"column '{column}'", reading) if column else None
    if column == "functions":
        tools = [{"type": "function", "function": function} for function in tools or ()]
    unsupervised = frozenset(index for index in range(len(messages)) if not turns[index].learnt)
    return Chat(
        messages=messages,
        tools=tools or None,
        completion_from=completion_from,
        unsupervised=unsupervised,
        is_prompt=is_prompt,
    )


def _says(message: Message) -> bool:
    return bool(message["content"].strip() or message.get(THOUGHTS[0]) or message.get("tool_calls"))


def _is_silent(message: Message) -> bool:
    """Whether it is an assistant turn that is still to be written."""
    return message["role"] == "assistant" and not _says(message)


def _check_order(messages: list[Message], reading: Reading, *, answered: bool) -> None:
    before: str | None = None
    for number, message in enumerate(messages, start=1):
        role = message["role"]
        if role not in NEXT_ROLES[before]:
            found = f"'{role}' after '{before}'" if before else f"'{role}' at the start"
            raise reading.error(
                f"roles out of order: message {number} is {found}, expected {either(NEXT_ROLES[before])}"
            )
        before = role
    if answered and all(message["role"] != "assistant" for message in messages):
        raise reading.error("no assistant turn in the conversation: there is nothing to learn from it")


def _settle(left: dict[str, Any], form: Form, column: str, reading: Reading) -> None:
    """Columns beside the form `column`: bookkeeping is noted, what would change the conversation must say the same."""
    no_answer = isinstance(form, Text) or form.is_prompt
    for name, value in left.items():
        fate = RECORD_COLUMNS.get(name)
        if fate is not None and is_absent(value):
            continue
        if fate is None or (no_answer and (fate == NO_WEIGHTS or name in LABELS)):
            reading.unread.add(name)  # nothing that could be marked: they are labels of a classifier
        elif form.is_prompt and name == "chosen":
            reading.unread.add(name)
        elif name == PROVENANCE and isinstance(value, dict):
            continue
        elif name in (CUT, PROVENANCE):
            if isinstance(form, Text) or not isinstance(value, str):
                reading.unread.add(name)
        elif fate != READ:
            raise reading.error(f"column '{name}': {fate}")
        elif name in LABELS or name in MARKS or name in SAMPLE_WEIGHTS:
            _check_mark(name, value, reading)
        elif not _says_same(name, value, form):
            raise reading.error(f"which is meant, '{name}' or '{column}'? They stand side by side and differ; keep one")


def _check_mark(name: str, value: object, reading: Reading) -> None:
    """A mark of the whole record must let it be learnt as any other."""
    if name in SAMPLE_WEIGHTS and value != 1:
        raise reading.error(f"column '{name}': samples cannot be weighted; give 1, or leave such records out")
    if value == 0 or (isinstance(value, str) and value.strip().lower() in NO):
        raise reading.error(f"column '{name}': it says that the answer is not to be learnt; leave such records out")
    if name not in SAMPLE_WEIGHTS and value is not True:
        reading.unread.add(name)


def _says_same(column: str, value: object, form: Form) -> bool:
    """Whether a column repeats what the form says, or a part of it."""
    if isinstance(form, Text):
        return isinstance(value, str) and value.strip() in form.text
    messages = (form.chat() if isinstance(form, Pair) else form).messages
    if isinstance(value, str):
        return _is_said(column, value, messages)
    try:
        told = [turn.message for turn in read_turns(value, column, Reading(place=""))]
    except DataError:
        return False
    if column in (*ANSWERS, "chosen"):
        return messages[-len(told) :] == told
    if column == "prompt":
        bare = messages[1:] if messages[0]["role"] == "system" != told[0]["role"] else messages
        return bare[: len(told)] == told
    return messages == told


def _is_said(column: str, value: str, messages: list[Message]) -> bool:
    contents = [message["content"] for message in messages]
    if column == "text":  # the whole conversation, formatted
        paragraphs = [each.strip() for content in contents for each in content.split("\n\n")]
        for paragraph in filter(None, paragraphs):  # alpaca writes "### Input:" between instruction and input
            _, found, value = value.partition(paragraph)
            if not found:
                return False
        return True
    if column == "prompt":
        return value == next(message["content"] for message in messages if message["role"] == "user")
    if column in (*ANSWERS, "chosen"):
        return value == contents[-1]
    if column in THOUGHTS:
        return value == messages[-1].get(THOUGHTS[0])
    if column in ("instruction", "input"):
        return value in contents
    return any(value.strip() in content for content in contents)


def template_keys(template: str | dict[str, str] | None) -> frozenset[str]:
    """Names that a chat template (or one of several) looks for in messages, and some that it looks for elsewhere."""
    text = " ".join(template.values()) if isinstance(template, dict) else template or ""
    return frozenset(first or second for first, second in ATTRIBUTE.findall(text)) - TOOL_KEYS


def check_unread(unread: Iterable[str], wanted: frozenset[str], place: str) -> None:
    """Raise DataError for a key of messages that was not read and that the chat template looks for."""
    for name in unread:
        _, of_message, key = name.rpartition(".")
        if of_message and key in wanted:
            raise DataError(f"the chat template reads '{key}' of a message, which kdpipe does not know", where=place)
