r"""Chat templates: a conversation -> its text and the span of characters that each assistant turn takes.

Invariant: a span begins where the generation prompt ends and ends with the end-of-turn marker, blanks after the marker
excluded, so it is exactly what the model has to write. Templates with `{% generation %}` and those without give the
same spans. The text is rendered once and never put together from pieces.

    <|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n
                                                           ^^^^^^^^^^^^^^^

Cost: one rendering with `{% generation %}`, else one more for each assistant turn.
"""

import re
from datetime import date
from typing import TYPE_CHECKING, Any

from jinja2.exceptions import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

from kdpipe.manifests.errors import DataError
from kdpipe.stages.prepare.forms import Chat, Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ANSWER = "kdpipeprobesanswer"
MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")
Span = tuple[int, int]
# Templates that print today's date would give other tokens tomorrow; Llama's own templates fall back to this day.
FIXED_DATE = date(2024, 7, 26)


class ChatTemplate:
    """The chat template of a tokenizer and what one probe exchange told about it.

    opening: what the generation prompt adds, such as "<|im_start|>assistant\\n"; may be empty
    header: what stands between the generation prompt and the answer; not blank where a template ignores the prompt flag
    end_marker: what ends an assistant turn, such as "<|im_end|>"; may be empty
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        try:
            self._source = tokenizer.get_chat_template()
        except ValueError:
            raise DataError(
                "the tokenizer has several chat templates and none named 'default'; keep one in chat_template.jinja",
                where=tokenizer.name_or_path or None,
            ) from None
        self._may_mark = MARK.search(self._source) is not None
        self._where = tokenizer.name_or_path or "chat template"
        self._variables = {**tokenizer.special_tokens_map, "strftime_now": FIXED_DATE.strftime}
        self._added = sorted(tokenizer.get_added_vocab(), key=len, reverse=True)
        self._probe()

    def text(self, chat: Chat, place: str) -> str:
        """The whole conversation as the template renders it."""
        return self._render(chat.messages, chat.tools, place)[0]

    def text_and_turns(self, chat: Chat, place: str) -> tuple[str, list[Span]]:
        """The conversation's text and the span of every assistant turn in it, in order.

        Raises DataError when the template changes a turn so that where it begins or ends cannot be told.
        """
        text, marked = self._render(chat.messages, chat.tools, place)
        turns = [index for index, message in enumerate(chat.messages) if message["role"] == "assistant"]
        if self._marks and len(marked) == len(turns):
            return text, [self._with_end_marker(text, span) for span in marked]
        starts: list[int] = []
        for index in turns:
            prefix = self._render(chat.messages[:index], chat.tools, place, generation_prompt=True)[0]
            start = self._start(text, prefix, starts[-1] if starts else 0)
            if start is None:
                return text, self._between_stand_ins(text, chat, turns, place)
            starts.append(start)
        limits = [*starts[1:], len(text)]
        return text, [
            (start, self._end(text, start, limit, chat.messages, index, place))
            for index, start, limit in zip(turns, starts, limits, strict=True)
        ]

    def _render(
        self, messages: list[Message], tools: list[Any] | None, place: str, *, generation_prompt: bool = False
    ) -> tuple[str, list[Span]]:
        try:
            texts, spans = render_jinja_template(
                [messages],
                tools=tools,
                chat_template=self._source,
                return_assistant_tokens_mask=self._may_mark,
                add_generation_prompt=generation_prompt,
                **self._variables,
            )
        except (TemplateError, TypeError) as err:
            roles = ", ".join(message["role"] for message in messages[:12])
            raise DataError(
                f"the chat template refuses this conversation (roles {roles}): {err}", where=place
            ) from None
        return texts[0], spans[0] if spans else []

    def _probe(self) -> None:
        """Learn opening, header and end marker from one exchange, and whether the generation marks can be used."""
        exchange = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": ANSWER}]
        try:
            text, marked = self._render(exchange, None, self._where)
        except DataError:  # some templates insist on a system prompt
            exchange.insert(0, {"role": "system", "content": "Hi"})
            text, marked = self._render(exchange, None, self._where)
        before, found, after = text.partition(ANSWER)
        if not found:
            raise DataError("the chat template leaves out the assistant's answer", where=self._where)
        asked = self._render(exchange[:-1], None, self._where)[0]
        prompt = self._render(exchange[:-1], None, self._where, generation_prompt=True)[0]
        self.opening = prompt[len(asked) :] if prompt.startswith(asked) else ""
        self.header = before[len(prompt) :] if before.startswith(prompt) else ""
        self.end_marker = self._first_token_end(after)
        # Marks inside a macro come with wrong positions (transformers counts only what was printed so far).
        answer = (len(before), len(before) + len(ANSWER))
        self._marks = len(marked) == 1 and marked[0][0] <= answer[0] and answer[1] <= marked[0][1] <= len(text)

    def _first_token_end(self, trailer: str) -> str:
        """`trailer` up to its first special token: "</s>" of "</s>\\n". Without one, all but the blanks at its end."""
        found = [(at, at + len(token)) for token in self._added if (at := trailer.find(token)) >= 0]
        # At the same place the longest token counts: `_added` begins with the longest.
        return trailer[: min(found, key=lambda span: span[0])[1]] if found else trailer.rstrip() or trailer

    def _with_end_marker(self, text: str, span: Span) -> Span:
        """A marked span made to end with the end-of-turn marker, wherever the template's author put the mark."""
        start, end = span
        if text.startswith(self.end_marker, end):
            return start, end + len(self.end_marker)
        inside = text[start:end].rstrip()
        return start, start + len(inside) if inside.endswith(self.end_marker.rstrip()) else end

    def _start(self, text: str, prefix: str, after: int) -> int | None:
        """Where the turn after `prefix` (a rendering that ends in the generation prompt) begins in the whole text.

        None when the prefix is not how the text begins and there is no generation prompt to look for.
        """
        if text.startswith(prefix):
            start = len(prefix)
            ignores_flag = not self.opening and self.header.strip() and text.startswith(self.header, start)
            return start + len(self.header) if ignores_flag else start
        history = len(prefix) - len(self.opening)
        # Where the history itself is shown differently, the opening comes somewhere after the turn before.
        line, newline, _ = self.opening.partition("\n")
        at = history if text.startswith(prefix[:history]) else text.find(line + newline, after)
        shown = self._shown_opening(text, at) if at >= 0 else 0
        return at + shown if shown else None

    def _between_stand_ins(self, text: str, chat: Chat, turns: list[int], place: str) -> list[Span]:
        """The turns found by rendering again with a stand-in for each answer: the rest is the template's own.

        For templates such as Mistral's, which move the system prompt to the last question and have no prompt flag.
        """
        messages = [{**m, "content": ANSWER} if i in turns else m for i, m in enumerate(chat.messages)]
        pieces = self._render(messages, chat.tools, place)[0].split(ANSWER)
        spans: list[Span] = []
        at = 0
        for index, before, after in zip(turns, pieces, pieces[1:], strict=False):
            start = at + len(before)
            answer = chat.messages[index]["content"]
            ends = [start + len(shown) for shown in (answer, answer.strip()) if text.startswith(shown + after, start)]
            if not (ends and text.startswith(before, at)):
                break
            at = ends[0]
            blank = len(self.header) if not self.header.strip() and before.endswith(self.header) else 0
            spans.append((start - blank, at + len(self.end_marker) if after.startswith(self.end_marker) else at))
        if len(spans) < len(turns) or len(pieces) != len(turns) + 1:
            raise DataError(
                "the chat template shows this conversation in another way than its beginning, so where an assistant "
                "turn begins cannot be told; mark the turns in the template with {% generation %}",
                where=place,
            )
        return spans

    def _shown_opening(self, text: str, at: int) -> int:
        """How much of the generation prompt stands in the text at `at`, in whole lines and special tokens.

        "assistant\\n<think>\\n" is offered to the model, but earlier turns are shown without their thoughts.
        """
        shared = _shared_prefix(text[at : at + len(self.opening)], self.opening)
        if shared == len(self.opening):
            return shared
        breaks = (*self._added, "\n")
        ends = (found + len(item) for item in breaks if (found := self.opening.rfind(item, 0, shared)) >= 0)
        return max(ends, default=0)

    def _end(self, text: str, start: int, limit: int, messages: list[Message], index: int, place: str) -> int:
        """Where the turn ends that begins at `start`, in text that has no later assistant turn before `limit`."""
        is_last = index == len(messages) - 1
        message = messages[index]
        body = message["content"].strip()
        begin = limit - len(text[start:limit].lstrip())
        verbatim = -1
        if body and text.startswith(body, begin):
            verbatim = begin + len(body)
            blanks = message["content"][len(message["content"].rstrip()) :]
            for kept in (blanks, ""):
                if text.startswith(kept + self.end_marker, verbatim):
                    return verbatim + len(kept + self.end_marker)
            if not is_last and not message.get("tool_calls"):
                return verbatim  # a marker that comes only at the end of a conversation
        # Not word for word (thoughts dropped or added, a call of a tool): up to the marker.
        find = text.rfind if is_last else text.find
        marker = find(self.end_marker, start, limit) if self.end_marker else -1
        if marker >= 0:
            return marker + len(self.end_marker)
        if is_last:
            return len(text)
        raise DataError(
            "the chat template rewrites an assistant turn and ends it with no marker, so where it ends cannot be told; "
            "mark the turns in the template with {% generation %}",
            where=place,
        )


def _shared_prefix(one: str, other: str) -> int:
    """How many characters two texts have in common at their beginning, by halving."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if one.startswith(other[:middle]) else (low, middle - 1)
    return low
