"""Marked texts: the text of a record, which of its characters are targets, and what is not as it should be.

Invariant: what of a conversation is not in its text, a learnt turn that ends without a stop token, a special token that
the data brings along: each is a finding. A prompt that is rendered already is refused, never rendered twice.

    supervise = assistant     every assistant turn, less those whose own marks say not to learn them
                last          the last one
                completion    those of the completion; the last one where the record has no completion
                all           every token

Cost: that of finding the turns, and a search of each message.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from kdpipe.manifests.errors import DataError
from kdpipe.stages.prepare.forms import Chat, Message, Pair
from kdpipe.stages.prepare.rendered import Finding, inline_thought, left_out, position
from kdpipe.stages.prepare.template import ChatTemplate, Span
from kdpipe.stages.prepare.turns import Shape, Turns

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Supervise = Literal["assistant", "last", "completion", "all"]


VICUNA = re.compile(
    r"\s*(?:<s>)?\s*(A chat between a curious (?:user|human) and an artificial intelligence assistant)\b"
    r".*?\b(?:USER|Human): .*?\b(?:ASSISTANT|Assistant):",
    re.DOTALL,
)
"""FastChat's prompts: text of any tokenizer, with no special token in it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Said:
    """What of a record is to be learnt in a span of its text: words that are in it under any template, in order.

    What else is in the span (tags, the end of a turn) is the template's. A template may leave some words out, too.
    """

    span: Span
    words: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Marked:
    """A text to tokenise.

    targets: spans of characters to learn, None for all
    plain: add special tokens
    is_open: it goes on behind its end, so no special token is added there
    said: whose words the targets are: a turn each, or all of the text at once
    """

    text: str
    targets: list[Span] | None
    plain: bool
    is_open: bool = False
    findings: tuple[Finding, ...] = ()
    said: tuple[Said, ...] = ()


class ChatMarker:
    """Marks conversations with one tokenizer's templates and one rule of what is supervised.

    stops: texts of the tokens at which generation ends
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", supervise: Supervise, stops: tuple[str, ...]) -> None:
        self._tokenizer = tokenizer
        self._supervise = supervise
        self._stops = stops
        self._turns: dict[bool, Turns] = {}
        special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
        self._special = frozenset(special | set(tokenizer.all_special_tokens))
        self._foreign: re.Pattern[str] | None = None

    def mark(self, chat: Chat, place: str) -> Marked:
        """The conversation's text and what of it is to be learned. Raises DataError where that cannot be told."""
        turns = self._finder(chat, place)
        for number, message in enumerate(chat.messages, start=1):
            if message["role"] not in ("system", "user"):
                continue
            if sign := self._rendered_by(message["content"], turns.shape):
                raise DataError(
                    f"message {number} ({message['role']}) is a text that went through a chat template already (it has "
                    f"{sign!r}); give the messages themselves",
                    where=place,
                )
        chat = _with_one_thought(turns.without_closing(chat), place, keyed=bool(turns.thought_key))
        findings = [*self._specials(_said(chat))]
        if chat.is_prompt:
            text = turns.prompt(chat, place)
            findings += [*left_out(text, [(0, len(text))], chat, ()), *self._unstopped(text, (), ())]
            return Marked(text=text, targets=[], plain=False, is_open=True, findings=tuple(findings))
        if self._supervise == "all" and not chat.unsupervised:
            text = turns.text(chat, place)
            spans = [(0, len(text))]
            learnt, targets = [*range(_num_turns(chat))], None
        else:
            text, spans = turns.text_and_turns(chat, place)
            learnt = self._learnt(chat)
            if chat.is_cut:
                spans[-1] = _without_end(text, spans[-1], chat.messages[-1])
            targets = [spans[turn] for turn in learnt]
            if self._supervise == "all":
                targets = _all_but(text, spans, chat)
            findings += _spilled(text, spans, chat, targets, everything=self._supervise == "all")
        findings += left_out(text, spans, chat, learnt)
        findings += self._unstopped(
            text, spans, [turn for turn in learnt if not (chat.is_cut and turn == len(spans) - 1)]
        )
        said = _said_in(spans, learnt, chat) if self._supervise != "all" else (_said_in_all(text, chat),)
        return Marked(text=text, targets=targets, plain=False, findings=tuple(findings), said=said)

    def of_text(self, text: str) -> tuple[Finding, ...]:
        """What there is to say of running text of which every token is a target."""
        try:
            sign = self._rendered_by(text, self._finder(None, "").shape)
        except DataError:  # a template that is not needed for it
            sign = ""
        if sign:
            detail = "the text went through the chat template already: every token of it is a target, the user's too"
            return (Finding(kind="rendered_already", detail=detail),)
        body = without_ends(text, self._tokenizer.bos_token, self._tokenizer.eos_token)
        return (*self._specials({"the text": body}), *self._unstopped_text(text))

    def of_pair(self, pair: Pair) -> tuple[Finding, ...]:
        """What there is to say of a prompt and its completion as running text."""
        prompt = without_ends(pair.prompt, self._tokenizer.bos_token, None)
        if pair.completion is None:
            return tuple(self._specials({"the prompt": prompt}))
        completion = without_ends(pair.completion, None, self._tokenizer.eos_token)
        specials = self._specials({"the prompt": prompt, "the completion": completion})
        return (*specials, *(() if pair.is_cut else self._unstopped_text(pair.completion)))

    def _finder(self, chat: Chat | None, place: str) -> Turns:
        """The turns of the template that transformers takes for the conversation."""
        with_tools = chat is not None and chat.tools is not None
        with_tools = with_tools and isinstance(self._tokenizer.chat_template, dict)
        if with_tools not in self._turns:
            if not self._tokenizer.chat_template:
                raise DataError(
                    "a conversation, but the tokenizer has no chat template; put a chat_template.jinja beside the "
                    "tokenizer, or give prompt and completion as strings",
                    where=place,
                )
            self._turns[with_tools] = Turns(ChatTemplate(self._tokenizer, with_tools=with_tools), self._stops)
        return self._turns[with_tools]

    def _rendered_by(self, text: str, shape: Shape) -> str:
        """What shows that a text is a conversation that went through a template; "" for any other.

        It may begin with words of its own: a system prompt.
        """
        if (preamble := VICUNA.match(text)) is not None:
            return preamble[1]
        header, after = shape.before_question.strip(), shape.after_question.strip()
        if not header or header not in text:
            return ""
        start, behind = text.lstrip(), text.partition(header)[2]
        if any(token in header for token in self._special):
            begins = start.startswith((header, *self._special))
            return header if begins or (after and after in behind) else ""
        start = start.removeprefix(self._tokenizer.bos_token or "").lstrip()
        # As a prompt that waits for its answer, behind a line or a sentence.
        waits = behind.rstrip().endswith(after) and re.search(rf"(\n|[.!?]\s){re.escape(header)}", text)
        return header if after and (waits or (start.startswith(header) and after in text)) else ""

    def _learnt(self, chat: Chat) -> list[int]:
        """Which assistant turns are supervised, counted from 0."""
        places = [index for index, message in enumerate(chat.messages) if message["role"] == "assistant"]
        chosen = [(turn, index) for turn, index in enumerate(places) if index not in chat.unsupervised]
        if self._supervise == "completion" and chat.completion_from is not None:
            return [turn for turn, index in chosen if index >= chat.completion_from]
        if self._supervise in ("last", "completion"):
            return [turn for turn, index in chosen if index == places[-1]]
        return [turn for turn, index in chosen]

    def _specials(self, said: Mapping[str, object]) -> Iterator[Finding]:
        """The first special token in what was said, by where: the model reads it as structure of its own."""
        if self._foreign is None:
            tokens = sorted(self._special, key=len, reverse=True)
            self._foreign = re.compile("|".join(map(re.escape, tokens)) or r"(?!)")
        for name, value in said.items():
            if found := next(filter(None, map(self._foreign.search, _texts(value))), None):
                yield Finding(kind="special_token_in_text", detail=f"{name} has the special token {found[0]}")
                return

    def _unstopped_text(self, text: str) -> Iterator[Finding]:
        """Running text has the tokenizer's end of text behind it, if there is one."""
        if self._tokenizer.eos_token_id is None and not text.rstrip().endswith(self._stops):
            detail = "the tokenizer has no end of text, so stopping is not learned"
            yield Finding(kind="no_stop_token", detail=detail)

    def _unstopped(self, text: str, spans: Sequence[Span], learnt: Sequence[int]) -> Iterator[Finding]:
        """Learnt turns at whose end the model does not learn to stop, and special tokens that stand twice."""
        ends = [len(text[: spans[min(turn, len(spans) - 1)][1]].rstrip()) for turn in learnt]
        bad = [turn + 1 for turn, end in zip(learnt, ends, strict=True) if not text.endswith(self._stops, 0, end)]
        if bad:
            which = ", ".join(map(str, bad[:12]))
            known = f"known: {', '.join(self._stops[:6])}" if self._stops else "the model folder names none"
            detail = f"assistant turn {which} ends without a stop token ({known}), so stopping is not learned there"
            yield Finding(kind="no_stop_token", detail=detail)
        bos = self._tokenizer.bos_token
        if bos and text.startswith(bos * 2):
            yield Finding(kind="doubled_token", detail=f"the text begins with {bos} twice")
        for turn, end in zip(learnt, ends, strict=True):
            twice = [
                s
                for s in self._stops
                if text.endswith(s, 0, end) and s in (text[end : end + len(s)], text[end - 2 * len(s) : end - len(s)])
            ]
            if twice:
                yield Finding(kind="doubled_token", detail=f"assistant turn {turn + 1} ends with {twice[0]} twice")
                return


def without_ends(text: str, begin: str | None, end: str | None) -> str:
    """Running text less the special tokens that begin and end it, and the blanks outside them."""
    while begin and text.lstrip().startswith(begin):
        text = text.lstrip().removeprefix(begin)
    while end and text.rstrip().endswith(end):
        text = text.rstrip().removesuffix(end)
    return text


def _without_end(text: str, span: Span, message: Message) -> Span:
    """The span of an answer that was cut, up to where its words end; as it is where that cannot be told."""
    words = message["content"] if message["content"].strip() else message.get("reasoning_content") or ""
    said = None if message.get("tool_calls") or not words.strip() else position(text, words, span, last=True)
    if said is None:
        return span
    blanks = words[len(words.rstrip()) :]
    return span[0], said[1] + (len(blanks) if text.startswith(blanks, said[1]) else 0)


def _said_in(spans: Sequence[Span], learnt: Sequence[int], chat: Chat) -> tuple[Said, ...]:
    """What is to be learnt of assistant turns at these spans."""
    answers = [message for message in chat.messages if message["role"] == "assistant"]
    return tuple(Said(span=spans[turn], words=_words(answers[turn])) for turn in learnt)


def _said_in_all(text: str, chat: Chat) -> Said:
    """What is to be learnt where that is all of a conversation but what its marks leave out."""
    learnt = (message for index, message in enumerate(chat.messages) if index not in chat.unsupervised)
    return Said(span=(0, len(text)), words=tuple(word for message in learnt for word in _words(message)))


def _words(message: Message) -> tuple[str, str]:
    """The thought and the answer of a message."""
    inline, said = inline_thought(message["content"])
    return message.get("reasoning_content") or inline, said


def _said(chat: Chat) -> dict[str, object]:
    """All that a conversation says, by where."""
    said: dict[str, object] = {"a tool's definition": chat.tools}
    for number, message in enumerate(chat.messages, start=1):
        said[f"message {number} ({message['role']})"] = _less(message, "role")
    return said


def _texts(value: object) -> Iterator[str]:
    """All texts in JSON, keys too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value:
            yield from _texts(item)
        for item in value.values() if isinstance(value, dict) else ():
            yield from _texts(item)


def _with_one_thought(chat: Chat, place: str, *, keyed: bool) -> Chat:
    """The conversation with no thought both within an answer and beside it: a template would print it twice.

    keyed: keep the one beside the answer, which is how the template reads a thought
    """
    messages: list[Message] = []
    for number, message in enumerate(chat.messages, start=1):
        thought = (message.get("reasoning_content") or "").strip()
        # An answer may well speak of <think> further on.
        begin, tag, rest = message["content"].partition("<think>")
        inline, end, said = rest.partition("</think>")
        both = thought and tag and end and not begin.strip() and inline.strip()
        if both and inline.strip() != thought:
            raise DataError(
                f"message {number}: which is the thought, the one between <think> and </think> or the one beside the "
                "content? Keep one",
                where=place,
            )
        if both:
            message = {**message, "content": said.lstrip()} if keyed else _less(message, "reasoning_content")
        messages.append(message)
    return replace(chat, messages=messages)


def _less(message: Message, key: str) -> Message:
    return {name: value for name, value in message.items() if name != key}


def _num_turns(chat: Chat) -> int:
    return sum(message["role"] == "assistant" for message in chat.messages)


def _own_spans(text: str, spans: Sequence[Span], chat: Chat) -> Iterator[Span | None]:
    """Where each message stands; None for one that is not in the text as it is between the turns around it."""
    number = before = 0
    for message in chat.messages:
        after = spans[number][0] if number < len(spans) else len(text)
        if message["role"] == "assistant":
            yield spans[number]
            before = spans[number][1]
            number += 1
        else:
            yield position(text, message["content"], (before, after))


def _all_but(text: str, spans: Sequence[Span], chat: Chat) -> list[Span]:
    """The text less the messages whose own marks say not to learn them."""
    own = enumerate(_own_spans(text, spans, chat))
    out = [span for index, span in own if span and index in chat.unsupervised]
    edges = [0, *(edge for span in out for edge in span), len(text)]
    return [(start, end) for start, end in zip(edges[::2], edges[1::2], strict=True) if start < end]


def _spilled(
    text: str, spans: Sequence[Span], chat: Chat, targets: Sequence[Span], *, everything: bool
) -> Iterator[Finding]:
    """Messages not to be learnt that a template shows elsewhere than in their turn, among what is learnt."""
    for index, own in enumerate(_own_spans(text, spans, chat)):
        role, content = chat.messages[index]["role"], inline_thought(chat.messages[index]["content"])[1]
        if index not in chat.unsupervised or not (everything or role == "assistant"):
            continue
        if own and position(text, content, own):
            continue
        if any(position(text, content, target) for target in targets):
            detail = f"message {index + 1} ({role}) is not to be learnt, and the template shows it in what is"
            yield Finding(kind="answer_changed", detail=detail)
            return
