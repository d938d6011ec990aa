"""Chat templates: messages -> the text that a template makes of them, each message written as the template reads it.

Invariant: a conversation is rendered as `tokenizer.apply_chat_template` would render it, with the same template chosen
by name; the day is fixed, so that it gives the same text tomorrow. Whatever a template raises is a DataError with the
place of the record.
Cost: one rendering, about 0.05 ms for a short chat; a template is compiled once.
"""

import re
from datetime import date
from typing import TYPE_CHECKING, Any, NamedTuple

from transformers.utils.chat_template_utils import render_jinja_template

from kdpipe.manifests.errors import DataError
from kdpipe.stages.prepare.dialect import Dialect, learn_dialect
from kdpipe.stages.prepare.forms import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
# Templates that print today's date would give other tokens tomorrow; Llama's own templates fall back to this day.
FIXED_DATE = date(2024, 7, 26)

Span = tuple[int, int]


class Rendered(NamedTuple):
    """A rendered conversation. marks: the spans inside {% generation %}, empty without the marks."""

    text: str
    marks: list[Span]


class ChatTemplate:
    """One chat template of a tokenizer: the one for conversations with tools, or the one for those without.

    tokens: the tokenizer's added tokens, longest first
    where: what an error about the template itself names
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", *, with_tools: bool = False) -> None:
        self.where = tokenizer.name_or_path or "chat template"
        self.source = _source(tokenizer, with_tools=with_tools, where=self.where)
        self.tokens = tuple(sorted(tokenizer.get_added_vocab(), key=len, reverse=True))
        self._may_mark = GENERATION.search(self.source) is not None
        self._variables = {**tokenizer.special_tokens_map, "strftime_now": FIXED_DATE.strftime}
        self._dialect: Dialect | None = None

    @property
    def dialect(self) -> Dialect:
        """How the template wants messages written; found out by a few renderings when first asked for."""
        if self._dialect is None:
            self._dialect = learn_dialect(self.source, self._try)
        return self._dialect

    def render(
        self, messages: list[Message], tools: list[Any] | None, place: str, *, generation_prompt: bool = False
    ) -> Rendered:
        """The messages as text. Raises DataError where the template refuses them."""
        return self._render(self.dialect.write(messages), tools, place, generation_prompt=generation_prompt)

    def _try(self, messages: list[Message], tools: list[Any] | None) -> str | None:
        """The messages as they are as text; None where the template refuses them."""
        try:
            return self._render(messages, tools, self.where).text
        except DataError:
            return None

    def _render(
        self, messages: list[Message], tools: list[Any] | None, place: str, *, generation_prompt: bool = False
    ) -> Rendered:
        try:
            texts, spans = render_jinja_template(
                [messages],
                tools=tools,
                chat_template=self.source,
                return_assistant_tokens_mask=self._may_mark,
                add_generation_prompt=generation_prompt,
                **self._variables,
            )
        except Exception as err:  # a template is a program: it may raise anything
            roles = ", ".join(message["role"] for message in messages[:12])
            reason = " ".join(f"{err}".split()) or type(err).__name__
            raise DataError(
                f"the chat template refuses this conversation (roles {roles}): {reason[:300]}", where=place
            ) from None
        return Rendered(texts[0], spans[0] if spans else [])


def _source(tokenizer: "PreTrainedTokenizerBase", *, with_tools: bool, where: str) -> str:
    """The template that transformers takes: `tool_use` for a conversation with tools where there is one."""
    try:
        source: str = tokenizer.get_chat_template(tools=[] if with_tools else None)
    except ValueError:
        names = ", ".join(sorted(tokenizer.chat_template))
        raise DataError(
            f"the tokenizer has several chat templates ({names}) and none named 'default' for a conversation without "
            "tools; name one of them 'default', or keep one in chat_template.jinja",
            where=where,
        ) from None
    return source
