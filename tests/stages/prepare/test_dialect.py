"""Messages are written as the template reads them, found out by probes."""

import json
from typing import Any

import pytest

from kdpipe.stages.prepare.dialect import OPENAI, Dialect
from kdpipe.stages.prepare.template import ChatTemplate

CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\nBODY<|im_end|>\n{% endfor %}"
CALL = {"id": "1", "type": "function", "function": {"name": "add", "arguments": {"größe": "1", "n": [True]}}}
CALLS = "{{ m.content }}{% for c in m.tool_calls or [] %}<call>{{ c.function.name }} ARGS</call>{% endfor %}"
OBJECT = json.dumps(CALL["function"]["arguments"], ensure_ascii=False)  # type: ignore[index]


def template_of(kit: Any, body: str) -> ChatTemplate:
    tokenizer = kit.train()
    tokenizer.chat_template = CHATML.replace("BODY", body)
    return ChatTemplate(tokenizer)


def shown(template: ChatTemplate, **message: Any) -> str:
    return template.render([{"role": "assistant", "content": "", **message}], None, "x:1").text


@pytest.mark.parametrize("key", ["reasoning_content", "thinking", "reasoning"])
def test_a_thought_has_the_name_that_the_template_reads(key: str, kit: Any) -> None:
    template = template_of(kit, f"{{% if m.{key} %}}[{{{{ m.{key} }}}}]{{% endif %}}{{{{ m.content }}}}")
    assert template.dialect == Dialect(thought=key)
    assert "[hm]yes<|im_end|>" in shown(template, content="yes", reasoning_content="hm")


def test_a_thought_that_is_shown_beside_a_call_alone_has_the_name_it_needs(kit: Any) -> None:
    body = "{% if m.thinking and m.tool_calls %}[{{ m.thinking }}]{% endif %}" + CALLS.replace("ARGS", "")
    template = template_of(kit, body)
    assert template.dialect == Dialect(thought="thinking")
    assert "[hm]<call>add" in shown(template, reasoning_content="hm", tool_calls=[CALL])


def test_a_thought_is_written_into_the_content_where_the_template_reads_it_there(kit: Any) -> None:
    parts = "m.content.split('</think>')"
    template = template_of(
        kit, f"{{% if '</think>' in m.content %}}[{{{{ {parts}[0] }}}}]{{% endif %}}{{{{ {parts}[-1].strip() }}}}"
    )
    assert template.dialect == Dialect(thought="")
    assert "[<think>\nhm\n]yes<|im_end|>" in shown(template, content="yes", reasoning_content="hm")


@pytest.mark.parametrize("body", ["{{ m.content }}", "{{ m.content.split('</think>')[-1] }}"])
def test_a_thought_stays_out_where_the_template_shows_none(body: str, kit: Any) -> None:
    template = template_of(kit, body)
    assert template.dialect == Dialect(thought=None)
    assert "assistant\nyes<|im_end|>" in shown(template, content="yes", reasoning_content="hm")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("{{ c.function.arguments | tojson }}", OBJECT),
        ("{{ c.function.arguments }}", OBJECT),
        ("{{ 'json ' + c.function.arguments }}", f"json {OBJECT}"),
        ("{% for k, v in c.function.arguments.items() %}{{ k }}={{ v }};{% endfor %}", "größe=1;n=[True];"),
        ("{{ 'text' if c.function.arguments is string else c.function.arguments | tojson }}", OBJECT),
    ],
)
def test_arguments_are_an_object_or_its_text_as_the_template_needs_it(arguments: str, expected: str, kit: Any) -> None:
    template = template_of(kit, CALLS.replace("ARGS", arguments))
    assert f"<call>add {expected}</call>" in shown(template, tool_calls=[CALL])


def test_a_turn_that_only_calls_has_content_none_where_calls_are_shown_only_then(kit: Any) -> None:
    body = "{% if m.content is none %}{{ m.tool_calls[0].function.name }}{% else %}{{ m.content }}{% endif %}"
    template = template_of(kit, body + "{% if m.content is none %}{{ m.tool_calls[0].function.arguments }}{% endif %}")
    assert f"add{OBJECT}" in shown(template, tool_calls=[CALL])


def test_content_is_a_list_of_parts_where_the_template_reads_parts_alone(kit: Any) -> None:
    template = template_of(kit, "{% for p in m.content %}{% if p.type == 'text' %}{{ p.text }}{% endif %}{% endfor %}")
    assert template.dialect.parts
    assert "assistant\nyes<|im_end|>" in shown(template, content="yes")


def test_messages_given_are_left_as_they_are() -> None:
    message = {"role": "assistant", "content": "", "reasoning_content": "hm", "tool_calls": [CALL]}
    before = json.dumps(message)
    written = Dialect(thought="thinking", arguments_as_text=True, empty=None).write([message])[0]
    assert json.dumps(message) == before
    assert (written["thinking"], written["content"]) == ("hm", None)
    assert OPENAI.write([message]) == [message]
