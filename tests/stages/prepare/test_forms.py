"""Each form of record is understood alike; what is wrong with one is said with its place and without its text."""

import json
import re
from typing import Any

import pytest

from kdpipe.manifests.errors import DataError
from kdpipe.manifests.sample import content_id
from kdpipe.stages.prepare.forms import Chat, Pair, Text, read_form
from kdpipe.stages.prepare.sources import RawRecord


def form(fields: dict[str, Any]) -> Chat | Pair | Text:
    return read_form(RawRecord(source="d.jsonl", line=7, place="d.jsonl:7", fields=fields))


def user(text: Any) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


SYSTEM = {"role": "system", "content": "be brief"}
SAME_EXCHANGE: dict[str, dict[str, Any]] = {
    "messages": {"messages": [user("hi"), assistant("hello")]},
    "parts": {"messages": [user([{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]), assistant("hello")]},
    "other columns": {
        "id": 3,
        "source": None,
        "messages": [{**user("hi"), "weight": 1, "name": None}, assistant("hello")],
    },
    "gkd recipe": {"messages": [user("hi"), assistant("hello")], "prompt": [user("hi")]},
    "completion": {"prompt": "hi", "completion": "hello"},
    "response": {"prompt": "hi", "response": "hello", "completion": None},
    "output": {"prompt": "hi", "output": "hello"},
    "messages in both": {"prompt": [user("hi")], "completion": [assistant("hello")]},
    "messages and text": {"prompt": [user("hi")], "completion": "hello"},
    "sharegpt": {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]},
    "sharegpt roles": {"conversations": [{"from": "user", "value": "hi"}, {"from": "assistant", "value": "hello"}]},
    "conversations": {"conversations": [user("hi"), assistant("hello")]},
    "alpaca": {"instruction": "hi", "output": "hello", "text": "### Instruction:\nhi\n\n### Response:\nhello"},
    "alpaca, no input": {"instruction": "hi", "input": "", "output": "hello"},
}


@pytest.mark.parametrize("name", SAME_EXCHANGE)
def test_one_exchange_has_one_id_in_every_form(name: str) -> None:
    expected = {"messages": [user("hi"), assistant("hello")]}
    assert form(SAME_EXCHANGE[name]).content() == expected
    assert content_id(form(SAME_EXCHANGE[name]).content()) == content_id(expected)


def test_alpaca_joins_instruction_and_input() -> None:
    pair = form({"instruction": "add", "input": "1 2", "output": "3"})
    assert pair == Pair(prompt="add\n\n1 2", completion="3", glue="\n\n")


def test_what_a_template_reads_besides_text_is_kept_and_nulls_of_columnar_files_are_not() -> None:
    call = {"function": {"name": "add", "arguments": {"a": 1, "b": None}}}
    fields = {
        "messages": [user("hi"), {**assistant(None), "tool_calls": [call]}],
        "tools": [{"name": "add", "x": None}],
    }
    chat = form(fields)
    assert isinstance(chat, Chat)
    bare = {"function": {"name": "add", "arguments": {"a": 1}}}
    assert chat.messages[1] == {"role": "assistant", "content": "", "tool_calls": [bare]}
    assert chat.tools == [{"name": "add"}]
    assert chat.emptiness() is None
    other = form({"messages": fields["messages"]})
    assert content_id(other.content()) != content_id(chat.content())


def call(arguments: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "add", "arguments": arguments}}


SAME_CALL: dict[str, dict[str, Any]] = {
    "an object": {"role": "assistant", "content": None, "tool_calls": [call({"a": 1})]},
    "text": {"role": "assistant", "content": "", "tool_calls": [call('{"a": 1}')]},
    "all of it text": {"role": "assistant", "tool_calls": json.dumps([call('{"a": 1}')])},
    "an object of lists": {"role": "assistant", "tool_calls": {k: [v] for k, v in call({"a": 1}).items()}},
    "function_call": {"role": "assistant", "function_call": {"name": "add", "arguments": '{"a": 1}'}},
    "sharegpt": {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'},
}


@pytest.mark.parametrize("name", SAME_CALL)
def test_a_call_of_a_tool_is_the_same_in_each_spelling(name: str) -> None:
    chat = form({"messages": [user("1?"), SAME_CALL[name]]})
    assert isinstance(chat, Chat)
    assert chat.messages[1] == {"role": "assistant", "content": "", "tool_calls": [call({"a": 1})]}


@pytest.mark.parametrize("key", ["thinking", "reasoning", "reasoning_content"])
def test_a_thought_is_read_under_each_of_its_names(key: str) -> None:
    chat = form({"messages": [user("1?"), {**assistant("2"), key: "one more"}]})
    assert isinstance(chat, Chat)
    assert chat.messages[1] == {**assistant("2"), "reasoning_content": "one more"}


@pytest.mark.parametrize("key", ["weight", "train", "loss", "loss_mask"])
@pytest.mark.parametrize("no", [0, False, 0.0])
def test_messages_whose_own_mark_says_so_are_not_supervised(key: str, no: object) -> None:
    messages = [user("q"), {**assistant("BAD"), key: no}, user("again"), {**assistant("good"), key: 1}]
    chat = form({"system": "be brief", "messages": messages})
    assert isinstance(chat, Chat)
    assert chat.unsupervised == {2}
    assert chat.messages[2] == assistant("BAD")


EMPTY: dict[str, tuple[dict[str, Any], str]] = {
    "gkd recipe": ({"messages": [user("hi"), assistant("")], "prompt": [user("hi")]}, "empty_completion"),
    "blank": ({"messages": [user("hi"), assistant(" \n")]}, "empty_completion"),
    "an earlier turn": ({"messages": [user("hi"), assistant(""), user("?"), assistant("a")]}, "empty_completion"),
    "pair": ({"prompt": "hi", "completion": ""}, "empty_completion"),
    "alpaca": ({"instruction": "hi", "output": ""}, "empty_completion"),
    "text": ({"text": " "}, "empty_text"),
}


@pytest.mark.parametrize("name", EMPTY)
def test_an_empty_answer_is_found(name: str) -> None:
    fields, kind = EMPTY[name]
    found = form(fields).emptiness()
    assert found is not None
    assert found[0] == kind


ROLES = {
    "tool": [SYSTEM, user("q"), assistant("a"), {"role": "tool", "content": "3"}, assistant("b"), user("q")],
    "two tools": [user("q"), assistant("a"), *[{"role": "tool", "content": "3"}] * 2, assistant("b")],
}


@pytest.mark.parametrize("name", ROLES)
def test_good_orders_of_roles_are_accepted(name: str) -> None:
    assert isinstance(form({"messages": ROLES[name]}), Chat)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no form": ({"id": 1, "body": "secret"}, r"no known form of record; columns: id, body \(known forms: messages; "),
    "no column": ({}, r"columns: none"),
    "near": ({"mesages": [user("secret")]}, r"columns: mesages; did you mean 'messages'\?"),
    "near completion": ({"prompt": "secret", "completin": "a"}, r"without an answer .*did you mean 'completion'\?"),
    "prompt alone": ({"prompt": "secret"}, r"'prompt' without an answer \(completion, response, output\)"),
    "instruction alone": ({"instruction": "secret", "outptu": "a"}, r"without 'output'.*did you mean 'output'\?"),
    "null": ({"text": None, "id": 1}, r"'text' is null"),
    "two answers": ({"prompt": "a", "completion": "b", "output": "c"}, r"'completion' or 'output'\? Keep one"),
    "messages is text": ({"messages": "secret"}, r"column 'messages': expected a list of messages, found a string"),
    "messages is empty": ({"messages": []}, r"column 'messages': the list of messages is empty"),
    "message is text": ({"messages": ["secret"]}, r"messages\[0\]: expected an object, found a string"),
    "no role": ({"messages": [{"rol": "user", "content": "a"}]}, r"under 'role', found missing \(keys: rol, content\)"),
    "role is a number": ({"messages": [{"role": 3, "content": "a"}]}, r"under 'role', found a number"),
    "unknown role": ({"messages": [{"role": "asistant", "content": "a"}]}, r"'asistant'; did you mean 'assistant'\?"),
    "content is a number": (
        {"messages": [user(3)]},
        r"messages\[0\] \(user\): 'content': expected text, found a number",
    ),
    "content is missing": ({"messages": [{"role": "user"}]}, r"\(user\): 'content' is missing \(keys: role\)"),
    "content is null": ({"messages": [user("a"), assistant(None)]}, r"messages\[1\] \(assistant\): 'content' is null"),
    "image": (
        {"messages": [user([{"type": "image"}])]},
        r"expected parts of type 'text', found a part of type 'image'",
    ),
    "part is text": ({"messages": [user(["secret"])]}, r"expected parts of type 'text', found a string"),
    "part without text": ({"messages": [user([{"type": "text"}])]}, r"'text': expected text, found null"),
    "sharegpt key": ({"conversations": [{"from": "human", "text": "a"}]}, r"'value' is missing \(keys: from, text\)"),
    "sharegpt role": ({"conversations": [{"from": "humn", "value": "a"}]}, r"'humn'; did you mean 'human'\?"),
    "text is a number": ({"text": 3}, r"column 'text': expected text, found a number"),
    "completion is true": ({"prompt": "secret", "completion": True}, r"column 'completion': .* found true or false"),
    "prompt is an object": ({"prompt": {"a": 1}, "completion": "a"}, r"column 'prompt': expected a list of messages"),
    "tools": ({"messages": [user("a"), assistant("b")], "tools": "secret"}, r"column 'tools': expected a list of obj"),
    "surrogate": ({"text": "secret\ud83d"}, r"column 'text': half a surrogate pair at character 6"),
    "two users": ({"messages": [user("a"), user("b")]}, r"message 2 is 'user' after 'user', expected 'assistant'"),
    "assistant first": ({"messages": [assistant("a")]}, r"message 1 is 'assistant' at the start, expected 'system' or"),
    "late system": ({"messages": [user("a"), SYSTEM]}, r"message 2 is 'system' after 'user'"),
    "tool after user": (
        {"messages": [user("a"), {"role": "tool", "content": "b"}]},
        r"message 2 is 'tool' after 'user'",
    ),
    "completion by the user": ({"prompt": [user("a")], "completion": [user("b")]}, r"message 2 is 'user' after 'user'"),
    "nobody answers": ({"messages": [SYSTEM, user("a")]}, r"no assistant turn in the conversation"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_malformed_record_is_refused_with_its_place(name: str) -> None:
    fields, message = BAD[name]
    with pytest.raises(DataError) as caught:
        form(fields)
    assert str(caught.value).startswith("E-DATA d.jsonl:7: ")
    assert re.search(message, str(caught.value)), str(caught.value)
    assert "secret" not in str(caught.value)
