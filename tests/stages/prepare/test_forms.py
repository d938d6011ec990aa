"""Each form of record is understood alike; what is wrong with one is said with its place and without its text."""

import json
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdpipe.manifests.errors import DataError
from kdpipe.manifests.sample import content_id
from kdpipe.stages.prepare.forms import Chat, Pair, Text, prompt_in, read_form
from kdpipe.stages.prepare.json_stream import parse_object
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
    "arguments beside": {
        "role": "assistant",
        "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": None}, "arguments": {"a": 1}}],
    },
    "arguments twice": {"role": "assistant", "tool_calls": [{**call({"a": 1}), "arguments": {"a": 1}}]},
    "keys of nulls": {
        "role": "assistant",
        "tool_calls": [{**call({"a": 1}), "input": None, "parameters": {"b": None}, "server": None}],
        "function_call": {"name": None, "arguments": None},
    },
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


@pytest.mark.parametrize(
    "key", ["weight", "loss_weight", "train", "training", "trainable", "loss", "loss_mask", "loss_scale"]
)
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


EXCHANGE = [user("q"), assistant("a")]
READ: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {
    "system, messages": ({"system": "be brief", "messages": EXCHANGE}, [SYSTEM, *EXCHANGE]),
    "system, the same": ({"system": "be brief", "messages": [SYSTEM, *EXCHANGE]}, [SYSTEM, *EXCHANGE]),
    "system, blank": ({"system": "", "messages": EXCHANGE}, EXCHANGE),
    "system, sharegpt": (
        {"system": "be brief", "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        [SYSTEM, *EXCHANGE],
    ),
    "system_prompt, prompt": ({"system_prompt": "be brief", "prompt": "q", "response": "a"}, [SYSTEM, *EXCHANGE]),
    "system, alpaca": ({"system": "be brief", "instruction": "q", "output": "a"}, [SYSTEM, *EXCHANGE]),
    "system, prompt of messages": (
        {"system": "be brief", "prompt": [user("q")], "completion": "a"},
        [SYSTEM, *EXCHANGE],
    ),
    "history": (
        {"instruction": "q", "output": "a", "history": [["q1", "a1"], ["q2", "a2"]], "system": "be brief"},
        [SYSTEM, user("q1"), assistant("a1"), user("q2"), assistant("a2"), *EXCHANGE],
    ),
    "history as text": (
        {"prompt": "q", "output": "a", "history": '[["q1", "a1"]]'},
        [user("q1"), assistant("a1"), *EXCHANGE],
    ),
    "input beside prompt": ({"prompt": "q", "input": "1 2", "completion": "a"}, [user("q\n\n1 2"), assistant("a")]),
    "dolly": ({"instruction": "q", "context": "", "response": "a", "category": "qa"}, EXCHANGE),
    "thought": (
        {"prompt": "q", "reasoning": "hm", "response": "a"},
        [user("q"), {**assistant("a"), "reasoning_content": "hm"}],
    ),
    "messages as text": ({"messages": json.dumps(EXCHANGE)}, EXCHANGE),
    "messages as an object of lists": (
        {"messages": {"role": ["user", "assistant"], "content": ["q", "a"]}},
        EXCHANGE,
    ),
    "both at once": ({"messages": '{"role": ["user", "assistant"], "content": ["q", "a"]}'}, EXCHANGE),
    "developer": ({"messages": [{"role": "developer", "content": "be brief"}, *EXCHANGE]}, [SYSTEM, *EXCHANGE]),
    "roles of both": ({"messages": [{"role": "human", "content": "q"}, {"from": "bing", "value": "a"}]}, EXCHANGE),
    "observation": (
        {
            "conversations": [
                {"from": "human", "value": "q"},
                {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'},
                {"from": "observation", "value": "1"},
                {"from": "gpt", "value": "a"},
            ],
            "tools": "[]",
        },
        [
            user("q"),
            {**assistant(""), "tool_calls": [call({"a": 1})]},
            {"role": "tool", "content": "1"},
            assistant("a"),
        ],
    ),
    "openai": (
        {"messages": [user("q"), {**assistant("a"), "refusal": None, "audio": None}], "parallel_tool_calls": False},
        EXCHANGE,
    ),
    "ultrachat": (
        {"prompt": "q", "prompt_id": "x", "messages": [*EXCHANGE, user("r"), assistant("b")]},
        [*EXCHANGE, user("r"), assistant("b")],
    ),
    "ultrafeedback": (
        {"prompt": "q", "chosen": EXCHANGE, "rejected": [user("q"), assistant("b")], "messages": EXCHANGE},
        EXCHANGE,
    ),
    "formatted text": ({"messages": EXCHANGE, "text": "<user>q</user><assistant>a</assistant>"}, EXCHANGE),
    "an answer again": ({"messages": EXCHANGE, "output": "a", "input": "q"}, EXCHANGE),
    "a good label": ({"prompt": "q", "completion": "a", "label": True}, EXCHANGE),
    "a sample's weight of 1": ({"messages": EXCHANGE, "weight": 1.0}, EXCHANGE),
    "nulls of columnar files": (
        {
            "messages": [
                {**user("q"), "images": [None], "tool_calls": [None], "reasoning": ""},
                {**assistant("a"), "audio": {"id": None}, "function_call": {"name": None, "arguments": None}},
            ],
            "chat_template_kwargs": {"enable_thinking": None},
            "images": [None, {"bytes": None}],
            "tools": [None],
        },
        EXCHANGE,
    ),
    "nothing as text": ({"messages": EXCHANGE, "tools": "[]", "history": "[]", "chat_template_kwargs": "{}"}, EXCHANGE),
    "calls of nothing as text": ({"messages": [user("q"), {**assistant("a"), "tool_calls": "[]"}]}, EXCHANGE),
    "text that is JSON": (
        {"prompt": '[{"role": "engineer", "name": "Bo"}]', "completion": '{"from": "Berlin", "to": "Paris"}'},
        [user('[{"role": "engineer", "name": "Bo"}]'), assistant('{"from": "Berlin", "to": "Paris"}')],
    ),
    "text that is a JSON object of messages of another kind": (
        {"prompt": '{"messages": ["a", "b"]}', "output": '[{"messages": 3}, 4]'},
        [user('{"messages": ["a", "b"]}'), assistant('[{"messages": 3}, 4]')],
    ),
    "text that begins with a bracket": ({"prompt": "[1", "output": "{"}, [user("[1"), assistant("{")]),
    "alpaca's own text": (
        {
            "instruction": "add",
            "input": "1 2",
            "output": "3",
            "text": "Below is...\n\n### Instruction:\nadd\n\n### Input:\n1 2\n\n### Response:\n3",
        },
        [user("add\n\n1 2"), assistant("3")],
    ),
    "parts as an object of lists": (
        {"messages": [user({"type": ["text", "text"], "text": ["q", ""]}), assistant("a")]},
        EXCHANGE,
    ),
    "parts as text": ({"messages": [user('[{"type": "text", "text": "q"}]'), assistant("a")]}, EXCHANGE),
    "entities": (
        {"messages": [user("q"), assistant('[{"type": "person", "text": "Bo"}]')]},
        [user("q"), assistant('[{"type": "person", "text": "Bo"}]')],
    ),
    "empty media": ({"messages": EXCHANGE, "images": [], "chat_template_kwargs": {}}, EXCHANGE),
}


@pytest.mark.parametrize("name", READ)
def test_what_belongs_to_the_conversation_is_read(name: str) -> None:
    fields, messages = READ[name]
    assert form(fields).content() == {"messages": messages}


def test_tools_are_read_from_objects_from_text_and_beside_a_prompt() -> None:
    tool = {"type": "function", "function": {"name": "add"}}
    for fields in (
        {"tools": [tool]},
        {"tools": json.dumps([tool])},
        {"tools": [json.dumps(tool)]},
        {"tools": {"type": ["function"], "function": [{"name": "add"}]}},
        {"functions": [{"name": "add"}]},
    ):
        for beside in ({"messages": EXCHANGE}, {"prompt": "q", "completion": "a"}):
            chat = form({**beside, **fields})
            assert isinstance(chat, Chat)
            assert chat.tools == [tool]
            assert chat.messages == EXCHANGE


def test_history_and_system_come_before_the_completion() -> None:
    chat = form({"system": "s", "instruction": "q", "output": "a", "history": [["q1", "a1"]]})
    assert isinstance(chat, Chat)
    assert chat.completion_from == 4


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "two systems": ({"system": "b", "messages": [SYSTEM, *EXCHANGE]}, "which is the system prompt"),
    "system and system_prompt": ({"system": "b", "system_prompt": "c", "messages": EXCHANGE}, "which is the system"),
    "system beside text": ({"system": "secret", "text": "a"}, "which is meant, 'system' or 'text'"),
    "history beside messages": ({"history": [["secret", "b"]], "messages": EXCHANGE}, "'history' or 'messages'"),
    "history of three": ({"history": [["secret", "b", "c"]], "instruction": "q", "output": "a"}, r"history\[0\]: exp"),
    "input beside messages": ({"input": "secret", "messages": EXCHANGE}, "'input' or 'messages'"),
    "input beside a list": ({"input": "secret", "prompt": [user("q")], "completion": "a"}, "'input' or 'prompt'"),
    "context": ({"context": "secret", "instruction": "q", "response": "a"}, "'context' or 'instruction'"),
    "another prompt": ({"prompt": "secret", "messages": EXCHANGE}, "'prompt' or 'messages'"),
    "a prompt that is no beginning": ({"prompt": [user("secret")], "messages": EXCHANGE}, "'prompt' or 'messages'"),
    "a whole prompt": ({"prompt": "secret q", "instruction": "q", "output": "a"}, "'instruction' or 'prompt'"),
    "messages and conversations": (
        {"messages": EXCHANGE, "conversations": [user("secret"), assistant("a")]},
        "'conversations' or 'messages'",
    ),
    "another answer": ({"messages": EXCHANGE, "response": "secret"}, "'response' or 'messages'"),
    "another choice": ({"messages": EXCHANGE, "chosen": [user("q"), assistant("secret")]}, "'chosen' or 'messages'"),
    "another text": ({"messages": EXCHANGE, "text": "secret"}, "'text' or 'messages'"),
    "tools beside text": ({"tools": [{"name": "secret"}], "text": "a"}, "'tools' or 'text'"),
    "tools and functions": ({"tools": [{"a": 1}], "functions": [{"b": 1}], "messages": EXCHANGE}, "the list of tools"),
    "another thought": ({"thinking": "secret", "messages": EXCHANGE}, "'thinking' or 'messages'"),
    "preference": ({"prompt": "q", "chosen": "secret", "rejected": "b"}, "preference data; .* rename 'chosen'"),
    "kto": (
        {"prompt": "q", "completion": "secret", "label": False},
        "column 'label': it says that the answer is not",
    ),
    "a sample's weight": ({"messages": EXCHANGE, "weight": 0.5}, "column 'weight': samples cannot be weighted"),
    "a record's mark": ({"messages": EXCHANGE, "train": False}, "column 'train': it says that"),
    "thinking off": ({"messages": EXCHANGE, "enable_thinking": False}, "column 'enable_thinking': one chat template"),
    "a plan": ({"messages": [user("q"), {**assistant("a"), "tool_plan": "secret"}]}, "'tool_plan' cannot be honoured"),
    "arguments under another name": (
        {"messages": [user("q"), {**assistant(None), "tool_calls": [{"name": "f", "input": {"a": "secret"}}]}]},
        "expected the function's 'arguments', found 'input'",
    ),
    "images": ({"messages": EXCHANGE, "images": ["secret.png"]}, "column 'images': images, audio and files cannot"),
    "template arguments": (
        {"messages": EXCHANGE, "chat_template_kwargs": {"enable_thinking": False}},
        "column 'chat_template_kwargs'",
    ),
    "labels": ({"messages": EXCHANGE, "labels": [1]}, "column 'labels': tokens cannot be weighted"),
    "question and answer": (
        {"question": "secret", "answer": "a"},
        "rename 'question' to 'prompt' and 'answer' to 'comp",
    ),
    "a prompt that is JSON": ({"prompt": json.dumps([user("secret")]), "completion": "a"}, "'prompt': is it text, or"),
    "an answer that is JSON": (
        {"prompt": "q", "output": json.dumps([assistant("secret")])},
        "'output': is it text, or",
    ),
    "an answer that is a record as JSON": (
        {"prompt": "q", "output": json.dumps({"messages": [user("q"), assistant("secret")], "id": 3})},
        "'output': is it text, or",
    ),
    "an answer that is a record of messages alone": (
        {"instruction": "q", "output": json.dumps({"messages": [user("q"), assistant("secret")]})},
        "'output': is it text, or",
    ),
    "an answer that is records as JSON": (
        {"prompt": "q", "response": json.dumps([{"id": 1}, {"conversations": [{"from": "gpt", "value": "secret"}]}])},
        "'response': is it text, or",
    ),
    "a prompt that is an object": (
        {"prompt": json.dumps(user("secret")), "completion": "a"},
        "'prompt': is it text, or",
    ),
    "a prompt that is an object of lists": (
        {"prompt": '{"role": ["user"], "content": ["secret"]}', "completion": "a"},
        "'prompt': is it text, or",
    ),
    "sharegpt as JSON": (
        {"instruction": '[{"from": "human", "value": "secret"}]', "output": "a"},
        "'instruction': is it text, or",
    ),
    "an input that is JSON": (
        {"instruction": "q", "input": json.dumps([user("secret")]), "output": "a"},
        "'input': is it text, or",
    ),
    "a history that is JSON": (
        {"instruction": "q", "output": "a", "history": [["q", json.dumps([assistant("secret")])]]},
        r"history\[0\] \(assistant\): is it text, or",
    ),
    "a user's call": (
        {"messages": [{**user("q"), "tool_calls": [call({"a": "secret"})]}, assistant("a")]},
        r"\(user\): 'tool_calls' cannot be honoured: only the assistant",
    ),
    "a user's thought": (
        {"messages": [{**user("q"), "reasoning_content": "secret"}, assistant("a")]},
        "'reasoning_content' cannot be honoured: only the assistant",
    ),
    "a system's thought": ({"messages": [{**SYSTEM, "thinking": "secret"}, *EXCHANGE]}, "'thinking' cannot be"),
    "two arguments": (
        {
            "messages": [
                user("q"),
                {**assistant(None), "tool_calls": [{**call({"a": "secret"}), "arguments": {"b": 1}}]},
            ]
        },
        "which are the arguments",
    ),
    "arguments and parameters": (
        {"messages": [user("q"), {**assistant(None), "tool_calls": [{**call({}), "parameters": {"a": "secret"}}]}]},
        "'parameters' cannot be honoured: give arguments as 'arguments'",
    ),
    "a part with a key twice": (
        parse_object(
            '{"messages": [{"role": "user", "content": [{"type": "text", "text": "secret", "text": ""}]}]}', "x"
        ),
        "'text' stands there twice",
    ),
    "kto of llama-factory": ({"instruction": "q", "output": "secret", "kto_tag": False}, "column 'kto_tag': it says"),
    "a label of 0": ({"prompt": "q", "completion": "secret", "label": 0}, "column 'label': it says that"),
    "a loss of 0": ({"messages": EXCHANGE, "loss": 0}, "column 'loss': it says that"),
    "a loss scale of 0": ({"messages": EXCHANGE, "loss_scale": 0.0}, "column 'loss_scale': it says that"),
    "a mark as text": ({"messages": EXCHANGE, "train": "false"}, "column 'train': it says that"),
    "marks of characters": (
        {"messages": [user("q"), {**assistant("secret"), "train_detail": [{"begin": 0}]}]},
        "'train_detail' cannot be honoured",
    ),
    "messages that are no JSON": ({"messages": "[secret"}, "column 'messages': text that is not JSON"),
    "lists of other lengths": ({"messages": {"role": ["user"], "content": ["secret", "b"]}}, "an object of lists of 1"),
    "two thoughts": (
        {"messages": [user("q"), {**assistant("a"), "thinking": "secret", "reasoning": "b"}]},
        "which is the thought, 'reasoning' or 'thinking'",
    ),
    "two roles": ({"messages": [{"role": "user", "from": "gpt", "content": "secret"}]}, "which is the role"),
    "two contents": ({"messages": [{**user("secret"), "value": "b"}]}, "which is the content, 'content' or 'value'"),
    "half a weight": ({"messages": [user("q"), {**assistant("secret"), "weight": 0.5}]}, "'weight' is 0.5; expected 0"),
    "a mask of tokens": (
        {"messages": [user("q"), {**assistant("secret"), "loss_mask": [0, 1]}]},
        "'loss_mask' is a list",
    ),
    "marks that differ": (
        {"messages": [user("q"), {**assistant("secret"), "weight": 0, "train": True}]},
        "is it learnt",
    ),
    "a mask": ({"messages": [user("q"), {**assistant("secret"), "mask": False}]}, "'mask' cannot be honoured: tokens"),
    "a refusal": ({"messages": [user("q"), {**assistant(""), "refusal": "secret"}]}, "'refusal' cannot be honoured"),
    "a message's tools": (
        {"messages": [{**SYSTEM, "tools": [{"name": "secret"}]}, *EXCHANGE]},
        "record's column 'tools'",
    ),
    "a message's images": ({"messages": [{**user("secret"), "images": ["a"]}, assistant("a")]}, "'images' cannot be"),
    "arguments that are no JSON": (
        {"messages": [user("q"), {**assistant(None), "tool_calls": [call("{secret")]}]},
        r"'tool_calls'\[0\]: 'arguments': text that is not JSON",
    ),
    "arguments that are no object": (
        {"messages": [user("q"), {**assistant(None), "tool_calls": [call('"secret"')]}]},
        "'arguments': expected an object, found a string",
    ),
    "a call without a name": (
        {"messages": [user("q"), {**assistant(None), "tool_calls": [{"function": {"arguments": "secret"}}]}]},
        "expected a function with its name",
    ),
    "half a surrogate pair in a key": (
        {"messages": [user("q"), {**assistant(None), "tool_calls": [call({"secret\ud83d": 1})]}]},
        "a key: half a surrogate pair at character 6",
    ),
    "half a surrogate pair in arguments as text": (
        {"messages": [user("q"), {**assistant(None), "tool_calls": [call('{"a": "secret\\ud83d"}')]}]},
        "'arguments': half a surrogate pair at character 6",
    ),
    "half a surrogate pair in a role": (
        {"messages": [{"role": "secret\ud83d", "content": ""}]},
        "unknown role a longer",
    ),
    "half a surrogate pair in a system": ({"system": "secret\ud83d", "messages": EXCHANGE}, "column 'system': half a"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_honoured_or_can_be_read_in_two_ways_is_refused_by_name(name: str) -> None:
    fields, message = REFUSED[name]
    with pytest.raises(DataError) as caught:
        form(fields)
    assert re.search(message, str(caught.value)), str(caught.value)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    "line",
    [
        '{"messages": [{"role": "user", "content": "a"}], "messages": [{"role": "user", "content": "b"}]}',
        '{"messages": [{"role": "user", "content": "a", "content": "b"}, {"role": "assistant", "content": "c"}]}',
        '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], '
        '"tools": [{"content": 1, "content": 2}]}',
    ],
)
def test_a_key_that_stands_twice_is_refused_where_it_is_read(line: str) -> None:
    with pytest.raises(DataError, match=r"'(messages|content)' stands there twice; keep one"):
        form(parse_object(line, "x"))
    assert form(parse_object('{"text": "a", "meta": {"b": 1, "b": 2}}', "x")) == Text(text="a")


words = st.text(st.characters(codec="utf-8", exclude_characters="\x00"), min_size=1, max_size=8)
marks = st.sampled_from([{}, {}, {"weight": 0}, {"weight": 1}, {"train": False}, {"loss": True}, {"loss_mask": 0.0}])
thoughts = st.one_of(st.just({}), words.map(lambda text: {"reasoning_content": text}))
said = st.tuples(words, words, marks, thoughts)


@settings(max_examples=80, deadline=None)
@given(st.lists(said, min_size=1, max_size=4), st.one_of(st.none(), words.filter(str.strip)))
def test_a_conversation_is_the_same_in_every_spelling(exchanges: list[Any], system: str | None) -> None:
    turns = [[user(q), {**assistant(a), **mark, **thought}] for q, a, mark, thought in exchanges]
    messages = [message for pair in turns for message in pair]
    names = {"role": "from", "content": "value", "reasoning_content": "thinking"}
    people = {"user": "human", "assistant": "gpt"}
    sharegpt = [{names.get(key, key): people.get(value, value) for key, value in m.items()} for m in messages]
    keys = sorted({key for message in messages for key in message})
    beside = {} if system is None else {"system": system}
    spellings: list[dict[str, Any]] = [
        {"messages": messages, **beside},
        {"messages": ([{"role": "system", "content": system}] if system else []) + messages},
        {"messages": json.dumps(messages), **beside},
        {"conversations": sharegpt, **beside},
        {"messages": {key: [message.get(key) for message in messages] for key in keys}, **beside},
        {"prompt": messages[:-1], "completion": messages[-1:], **beside},
    ]
    found = [form(fields) for fields in spellings]
    first = 1 if system is None else 2
    wanted = [first + 2 * i for i, (_, _, mark, _) in enumerate(exchanges) if not all(mark.values())]
    for chat in found:
        assert isinstance(chat, Chat)
        assert chat.content() == found[0].content()
        assert sorted(chat.unsupervised) == wanted
    if len(exchanges) == 1 and not messages[1].keys() - {"role", "content"}:
        pair = form({"prompt": messages[0]["content"], "response": messages[1]["content"], **beside})
        assert pair.content() == found[0].content()


def unread(fields: dict[str, Any]) -> set[str]:
    names: set[str] = set()
    read_form(RawRecord(source="d.jsonl", line=7, place="d.jsonl:7", fields=fields), names)
    return names


def test_what_is_not_read_is_named() -> None:
    turns = [{**user("q"), "id": 0, "weight": 1}, {**assistant("a"), "weight": 1, "score": None}]
    fields = {"id": 0, "source": "web", "meta": None, "tags": [], "prompt": [user("q")], "messages": turns}
    assert unread(fields) == {"id", "source", "tags", "messages.id", "messages.weight of user"}
    assert unread({"text": "x", "label": False, "labels": [1], "images": None}) == {"label", "labels"}
    assert unread({"messages": turns[1:], "prompt": None, "loss": 2.3} | {"messages": [user("q"), turns[1]]}) == {
        "loss"
    }


def nested(depth: int) -> Any:
    value: Any = "secret"
    for _ in range(depth):
        value = [value]
    return value


def test_what_is_nested_too_deep_is_refused_where_it_is_read() -> None:
    calls = [call({"a": nested(700)}), call(json.dumps({"a": nested(700)}))]
    deep: list[dict[str, Any]] = [
        {"messages": EXCHANGE, "tools": [{"a": nested(800)}]},
        {"messages": EXCHANGE, "tools": json.dumps([{"a": nested(600)}])},
        {"messages": EXCHANGE, "tools": [{"a": nested(900)}], "functions": [{"a": nested(900)}]},
        *({"messages": [user("q"), {**assistant(None), "tool_calls": [each]}]} for each in calls),
        {"messages": [{**user("q"), "images": nested(900)}, assistant("a")]},
    ]
    for fields in deep:
        with pytest.raises(DataError, match=r"^E-DATA d\.jsonl:7: .*nested too deep") as caught:
            form(fields)
        assert "secret" not in str(caught.value)
    assert form({"messages": EXCHANGE, "tree": nested(900)}).content() == {"messages": EXCHANGE}
    assert isinstance(form({"messages": EXCHANGE, "tools": [{"a": nested(90)}]}), Chat)


def test_keys_of_calls_that_are_not_read_are_named() -> None:
    fields = {"messages": [user("q"), {**assistant(None), "tool_calls": [{**call({}), "server": "x"}]}]}
    assert unread(fields) == {"messages.server"}
    chat = form(fields)
    assert isinstance(chat, Chat)
    assert chat.messages[1]["tool_calls"] == [call({})]
    assert chat.tools is None


def test_parts_are_read_alike_and_their_marks_are_refused() -> None:
    parts = [{"type": "text", "text": "a", "cache_control": {"type": "x"}, "image_url": None}]
    assert unread({"messages": [user("q"), assistant(parts)]}) == {"messages.cache_control"}
    with pytest.raises(DataError, match="'content': 'weight' cannot be honoured"):
        form({"messages": [user("q"), assistant([{"type": "text", "text": "a", "weight": 0}])]})


def test_nulls_that_arguments_have_as_text_stay() -> None:
    chat = form({"messages": [user("q"), {**assistant(None), "tool_calls": [call('{"a": null}')]}]})
    assert isinstance(chat, Chat)
    assert chat.messages[1]["tool_calls"] == [call({"a": None})]


@pytest.mark.parametrize("arguments", [{"city": []}, {"city": {}}, {"city": ""}, {"city": False}, {"city": 0}])
def test_an_argument_of_nothing_is_an_argument(arguments: dict[str, Any]) -> None:
    turns = [user("q"), {**assistant(None), "tool_calls": [call(arguments)]}]
    chat = form({"messages": turns})
    assert isinstance(chat, Chat)
    assert chat.messages[1]["tool_calls"][0]["function"]["arguments"] == arguments


def asked(fields: dict[str, Any], unread: set[str] | None = None) -> Chat | Pair | Text:
    return read_form(RawRecord(source="d.jsonl", line=7, place="d.jsonl:7", fields=fields), unread, prompts=True)


SAME_PROMPT: dict[str, dict[str, Any]] = {
    "messages": {"messages": [user("hi")]},
    "the seed's form": {"messages": [user("hi"), assistant("")]},
    "blanks": {"messages": [user("hi"), assistant(" \n")]},
    "null": {"messages": [user("hi"), assistant(None)]},
    "no key": {"messages": [user("hi"), {"role": "assistant"}]},
    "sharegpt": {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": ""}]},
    "text of json": {"messages": json.dumps([user("hi"), assistant("")])},
    "prompt": {"prompt": "hi"},
    "prompt of messages": {"prompt": [user("hi")]},
    "prompt of messages and an empty turn": {"prompt": [user("hi"), assistant("")]},
    "an answer that is null": {"prompt": "hi", "completion": None},
    "an empty answer": {"prompt": "hi", "response": " "},
    "an answer of no message": {"prompt": "hi", "completion": [assistant("")]},
    "instruction": {"instruction": "hi"},
    "instruction and input": {"instruction": "hi", "input": "", "output": ""},
    "labels of others": {"prompt": "hi", "label": "0", "labels": [1], "chosen": "x", "rejected": "y", "answer": "z"},
}


@pytest.mark.parametrize("spelling", SAME_PROMPT)
def test_a_record_without_an_answer_is_the_same_prompt_in_each_spelling(spelling: str) -> None:
    found = asked(SAME_PROMPT[spelling])
    assert found.is_prompt
    assert found.content() == {"messages": [user("hi")]}
    assert found.emptiness() is None


@pytest.mark.parametrize("spelling", SAME_EXCHANGE)
def test_a_record_with_an_answer_is_what_it_is_where_prompts_are_asked_for(spelling: str) -> None:
    assert asked(SAME_EXCHANGE[spelling]) == form(SAME_EXCHANGE[spelling])
    assert not asked(SAME_EXCHANGE[spelling]).is_prompt


@pytest.mark.parametrize("spelling", SAME_PROMPT)
def test_without_the_switch_no_record_is_a_prompt(spelling: str) -> None:
    try:
        found = form(SAME_PROMPT[spelling])
    except DataError:
        return
    assert not found.is_prompt
    assert found.emptiness() is not None


def test_a_prompt_keeps_system_tools_history_and_earlier_answers() -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    fields = {"prompt": "b", "history": [["a", "A"]], "system": "be brief", "tools": tools}
    found = asked(fields)
    assert isinstance(found, Chat)
    assert found.messages == [SYSTEM, user("a"), assistant("A"), user("b")]
    assert found.tools == tools
    last = asked({"messages": [user("a"), {**assistant("A"), "weight": 0}, user("b"), {**assistant(""), "weight": 0}]})
    assert isinstance(last, Chat)
    assert last.messages == [user("a"), assistant("A"), user("b")]
    assert last.unsupervised == {1}


def test_of_a_prompt_only_the_last_answer_may_be_missing() -> None:
    earlier = asked({"messages": [user("a"), assistant(""), user("b"), assistant("")]})
    assert earlier.emptiness() == ("empty_completion", "assistant turn 1 of 1 is empty")
    assert asked({"prompt": " "}).emptiness() == ("empty_text", "the prompt is empty")


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"prompt": [user("hi"), assistant("hello")]}, "column 'prompt': it ends with an answer"),
        ({"prompt": "hi", "reasoning": "hm"}, "column 'reasoning': a thought without an answer"),
        ({"messages": [SYSTEM]}, "no assistant turn"),
        ({"messages": [assistant("")]}, "message 1 is 'assistant' at the start"),
        ({"messages": [user("hi")], "completion": "hello"}, "which is meant, 'completion' or 'messages'?"),
        ({"messages": [user(None)]}, "'content' is null"),
        ({"messages": [user("a"), assistant(None), user("b")]}, "'content' is null"),
        ({"chosen": "x", "rejected": "y"}, "preference data"),
    ],
)
def test_a_prompt_that_is_none_is_refused(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(DataError, match=re.escape(said)):
        asked(fields)


def test_columns_beside_a_prompt_are_counted() -> None:
    unread: set[str] = set()
    asked(SAME_PROMPT["labels of others"], unread)
    assert unread == {"label", "labels", "chosen", "rejected", "answer"}


@pytest.mark.parametrize("spelling", SAME_EXCHANGE)
def test_what_a_record_answers_is_its_prompt(spelling: str) -> None:
    found = prompt_in(asked(SAME_EXCHANGE[spelling]), "d.jsonl:7")
    assert found.is_prompt
    assert found.content() == {"messages": asked(SAME_EXCHANGE[spelling]).content()["messages"][:-1]}  # type: ignore[index]
    assert prompt_in(found, "d.jsonl:7") == found


def test_a_prompt_within_a_record_keeps_its_tools_and_marks() -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    messages = [user("a"), {**assistant("A"), "weight": 0}, user("b"), {**assistant("B"), "weight": 0}]
    found = prompt_in(asked({"messages": messages, "tools": tools, "finish_reason": "length"}), "d.jsonl:7")
    assert isinstance(found, Chat)
    assert (len(found.messages), found.tools, found.unsupervised, found.is_cut) == (3, tools, {1}, False)
    with pytest.raises(DataError, match=r"d\.jsonl:7: running text has no prompt"):
        prompt_in(form({"text": "running"}), "d.jsonl:7")


@pytest.mark.parametrize(("reason", "is_cut"), [("length", True), ("stop", False), (None, False), (3, False)])
def test_an_answer_is_cut_where_its_record_says_so(reason: Any, is_cut: bool) -> None:
    for fields in ({"messages": [user("hi"), assistant("hello")]}, {"prompt": "hi", "completion": "hello"}):
        unread: set[str] = set()
        raw = RawRecord(source="d", line=7, place="d:7", fields={**fields, "finish_reason": reason, "kdpipe": {"a": 1}})
        found = read_form(raw, unread)
        assert isinstance(found, Chat | Pair)
        assert found.is_cut == is_cut
        assert found.content() == {"messages": [user("hi"), assistant("hello")]}
        assert unread == ({"finish_reason"} if reason == 3 else set())
