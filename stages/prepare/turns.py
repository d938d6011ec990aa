r"""Turns: a conversation -> its text and the span of characters that each assistant turn takes.

Invariant: a span begins where the generation prompt ends and ends with the token at which the model is to stop, blanks
before the answer included, blanks after the stop token excluded, so it is exactly what the model has to write.
Templates with `{% generation %}` and those without give the same spans. The text is rendered once and never put
together from pieces.

    <|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n
                                                           ^^^^^^^^^^^^^^^
    <|user|>\nHi<|assistant|>\nHello<|user|>\nBye       where the next role's marker is a stop token
                             ^^^^^^^^^^^^^^^

Cost: one rendering with `{% generation %}`, else one more for each assistant turn, and a second one for a turn that is
not shown word for word.
"""

from dataclasses import dataclass, replace
from typing import Any

from kdpipe.manifests.errors import DataError
from kdpipe.stages.prepare.dialect import ANSWER, CALL_ID, KEY, NAME, TOOL, VALUE
from kdpipe.stages.prepare.forms import Chat, Message
from kdpipe.stages.prepare.rendered import position
from kdpipe.stages.prepare.template import ChatTemplate, Span

QUESTION = "kdpipeprobesquestion"
FOLLOWING = "kdpipeprobesfollowing"
UNTELLABLE = "so where {what} cannot be told; mark the turns in the template with {{% generation %}}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """What a template puts around messages, learned from a few probes.

    opening: what the generation prompt adds, such as "<|im_start|>assistant\\n"; may be empty
    header: what stands between the generation prompt and the answer; not blank where a template ignores the prompt flag
    closing, inner_closing: what ends the last assistant turn, such as "<|im_end|>", and an earlier one; may be empty
    closings: all that may end an assistant turn: the two, and what ends one that calls tools
    next_headers: what begins the message that follows an assistant turn, by its role
    before_question, after_question: what stands around the only user turn of a prompt
    marks: whether the {% generation %} marks can be used
    """

    opening: str
    header: str
    closing: str
    inner_closing: str
    closings: tuple[str, ...]
    next_headers: dict[str, str]
    before_question: str
    after_question: str
    marks: bool


class Turns:
    """Finds the assistant turns in what a template renders.

    stops: texts of the tokens at which generation ends
    """

    def __init__(self, template: ChatTemplate, stops: tuple[str, ...]) -> None:
        self._template = template
        self._stops = stops
        self.shape = _learn_shape(template)
        self._closers = tuple(c for c in dict.fromkeys((*stops, self.shape.closing.strip())) if c in template.tokens)

    @property
    def thought_key(self) -> str | None:
        """The key under which the template reads a thought, if any."""
        return self._template.dialect.thought

    def text(self, chat: Chat, place: str) -> str:
        """The whole conversation as the template renders it."""
        return self._template.render(chat.messages, chat.tools, place).text

    def prompt(self, chat: Chat, place: str) -> str:
        """The conversation up to where its next answer begins: what stands before that turn's span once it is there."""
        text = self._template.render(chat.messages, chat.tools, place, generation_prompt=True).text
        return text + self.shape.header if self._ignores_flag else text

    def text_and_turns(self, chat: Chat, place: str) -> tuple[str, list[Span]]:
        """The conversation's text and the span of every assistant turn in it, in order.

        Raises DataError when the template changes a turn so that where it begins or ends cannot be told.
        """
        text, marks = self._template.render(chat.messages, chat.tools, place)
        turns = [index for index, message in enumerate(chat.messages) if message["role"] == "assistant"]
        if self.shape.marks and len(marks) == len(turns):
            spans = [self._with_closing(text, (self._behind_opening(text, start), end)) for start, end in marks]
        else:
            starts: list[int] = []
            for index in turns:
                starts.append(self._start(text, chat, index, starts[-1] if starts else 0, place))
            limits = [*starts[1:], len(text)]
            spans = [
                (start, self._end(text, start, limit, chat, index, place))
                for index, start, limit in zip(turns, starts, limits, strict=True)
            ]
        return text, [(start, self._to_stop(text, start, end)) for start, end in spans]

    def without_closing(self, chat: Chat) -> Chat:
        """The conversation less stop tokens that end its answers already: the template adds them once more."""
        if not self._closers or not any(_ends_with(message, self._closers) for message in chat.messages):
            return chat
        return replace(chat, messages=[self._cut(message) for message in chat.messages])

    def _cut(self, message: Message) -> Message:
        content = message["content"]
        while _ends_with({**message, "content": content}, self._closers):
            content = content.rstrip()
            content = content.removesuffix(next(closer for closer in self._closers if content.endswith(closer)))
        return {**message, "content": content}

    def _behind_opening(self, text: str, start: int) -> int:
        """Where a mark begins less what the generation prompt has of it: some marks include "<|start|>assistant"."""
        opening = self.shape.opening or (self.shape.header if self.shape.header.strip() else "")
        for before in range(len(opening), 0, -1):
            if text.endswith(opening[:before], 0, start):
                return max(start, start - before + self._shared_tokens(text, start - before, opening))
        return start + self._shared_tokens(text, start, opening)

    def _with_closing(self, text: str, span: Span) -> Span:
        """A marked span made to end with the end-of-turn marker, wherever the template's author put the mark."""
        start, end = span
        for closing in self.shape.closings:
            if text.startswith(closing, end):
                return start, end + len(closing)
            inside = text[start:end].rstrip()
            if inside.endswith(closing.rstrip()):
                return start, start + len(inside)
        return span

    def _to_stop(self, text: str, start: int, end: int) -> int:
        """The end of a turn, moved behind the next stop token where nothing but special tokens stands before it.

        "Hello<|END_RESPONSE|><|END_OF_TURN_TOKEN|>"; and the next role's marker where no marker ends the turn.
        """
        if text.endswith(self._stops, start, end):
            return end
        at = end
        if not text.endswith(self.shape.closings, start, end) and text[end : end + 1].isspace():
            at += len(text[end:]) - len(text[end:].lstrip())
        headers = tuple(header.strip() for header in self.shape.next_headers.values() if header.strip())
        while True:
            if stop := next((stop for stop in self._stops if text.startswith(stop, at)), None):
                return at + len(stop)
            token = next((token for token in self._template.tokens if text.startswith(token, at)), None)
            if token is None or text.startswith(headers, at):
                return end
            at += len(token)

    def _start(self, text: str, chat: Chat, index: int, after: int, place: str) -> int:
        """Where the assistant turn at message `index` begins; it is the first turn that begins behind `after`."""
        shape = self.shape
        prompt = self._template.render(chat.messages[:index], chat.tools, place, generation_prompt=True).text
        if text.startswith(prompt):
            return self._behind_header(text, len(prompt))
        opening = shape.opening if prompt.endswith(shape.opening) else ""
        history = prompt.removesuffix(opening)
        at = len(history) if text.startswith(history) else self._history_end(history, text, chat, index, after)
        if at < 0 and shape.opening.strip():
            # The history is shown differently as a whole; the opening comes somewhere behind the turn before.
            line, newline, _ = shape.opening.partition("\n")
            at = text.find(line + newline, after)
            opening = shape.opening
        if at < 0:
            raise DataError(
                "the chat template shows this conversation in another way than its beginning, "
                + UNTELLABLE.format(what="an assistant turn begins"),
                where=place,
            )
        return at + self._shared_tokens(text, at, opening) if opening.strip() else self._behind_header(text, at)

    def _behind_header(self, text: str, at: int) -> int:
        """`at`, moved behind the role's header where a template gives it with the answer only."""
        header = self.shape.header
        return at + len(header) if self._ignores_flag and text.startswith(header, at) else at

    @property
    def _ignores_flag(self) -> bool:
        """Whether the template begins an answer with a header that it does not give as a generation prompt."""
        return not self.shape.opening and bool(self.shape.header.strip())

    def _history_end(self, history: str, text: str, chat: Chat, index: int, after: int) -> int:
        """Where the message before `index` ends in the text, found by its own words and what follows them; or -1.

        For templates such as Mistral's, which move the system prompt or the tools to the last question.
        """
        content = chat.messages[index - 1]["content"] if index else ""
        if not content.strip():
            is_question = index and chat.messages[index - 1]["role"] == "user"
            return self._empty_question_end(text, content, after) if is_question else -1
        said = position(history, content, last=True)
        if said is None:
            return -1
        at = text.find(history[said[0] :], after)
        if at >= 0:
            return at + len(history) - said[0]
        # What follows the words may be other than at the end of a conversation: as much of it as is shown.
        here = position(text, content, (after, len(text)))
        shown = self._shared_tokens(text, here[1], history[said[1] :]) if here else 0
        return here[1] + shown if here and shown else -1

    def _empty_question_end(self, text: str, content: str, after: int) -> int:
        """Where a question without words ends, found by what stands around questions; or -1."""
        before, behind = self.shape.before_question, self.shape.after_question
        if not (before.strip() and behind.strip()):
            return -1
        found = ((text.find(shown, after), len(shown)) for shown in (before + content + behind, before + behind))
        return next((at + length for at, length in found if at >= 0), -1)

    def _shared_tokens(self, text: str, at: int, offered: str) -> int:
        """How much of `offered` stands in the text at `at`, in whole lines and special tokens.

        "assistant\\n<think>\\n" is offered to the model, but earlier turns are shown without their thoughts.
        """
        shared = _shared_prefix(text[at : at + len(offered)], offered)
        if shared == len(offered):
            return shared
        breaks = (*self._template.tokens, "\n")
        ends = (found + len(item) for item in breaks if (found := offered.rfind(item, 0, shared)) >= 0)
        return max(ends, default=0)

    def _end(self, text: str, start: int, limit: int, chat: Chat, index: int, place: str) -> int:
        """Where the turn ends that begins at `start`, in text that has no later assistant turn before `limit`."""
        message = chat.messages[index]
        is_last = index == len(chat.messages) - 1
        verbatim = self._verbatim_end(text, start, message, is_last=is_last)
        if verbatim is not None:
            return verbatim
        if not is_last:
            limit = self._next_content(text, chat, index, limit, place)
            header = self.shape.next_headers.get(chat.messages[index + 1]["role"], "")
            if header and text.endswith(header, start, limit):
                return start + len(text[start : limit - len(header)].rstrip())
        # Nothing but this turn and the next one's header lies before `limit`: the last marker ends the turn.
        found = [at + len(c) for c in self.shape.closings if (at := text.rfind(c, start, limit)) >= 0]
        if not found and not is_last:
            raise DataError(
                "the chat template rewrites an assistant turn and ends it with no marker, "
                + UNTELLABLE.format(what="it ends"),
                where=place,
            )
        return max(found, default=limit)

    def _verbatim_end(self, text: str, start: int, message: Message, *, is_last: bool) -> int | None:
        """The end of a turn that is shown word for word: the usual case, and without a further rendering."""
        content = message["content"]
        body = content.strip()
        if not body or message.get("tool_calls"):
            return None
        begin = start + len(self.shape.header) if text.startswith(self.shape.header, start) else start
        begin += len(text[begin:]) - len(text[begin:].lstrip()) if text[begin : begin + 1].isspace() else 0
        if not text.startswith(body, begin):
            return None
        end = begin + len(body)
        for kept in (content[len(content.rstrip()) :], ""):
            for closing in self.shape.closings:
                if text.startswith(kept + closing, end):
                    return end + len(kept + closing)
        # A marker that comes only at the end of a conversation.
        return end if not is_last and not self.shape.inner_closing else None

    def _next_content(self, text: str, chat: Chat, index: int, limit: int, place: str) -> int:
        """Where the content of the message behind `index` begins: where another rendering with other words differs."""
        content = chat.messages[index + 1]["content"]
        other = FOLLOWING if content.lstrip()[:1] != FOLLOWING[0] else FOLLOWING[1:]
        changed = {**chat.messages[index + 1], "content": other}
        messages = [*chat.messages[: index + 1], changed, *chat.messages[index + 2 :]]
        return min(limit, _shared_prefix(text, self._template.render(messages, chat.tools, place).text))


def _ends_with(message: Message, closers: tuple[str, ...]) -> bool:
    return message["role"] == "assistant" and message["content"].rstrip().endswith(closers)


def _learn_shape(template: ChatTemplate) -> Shape:
    """What the template puts around messages. Raises DataError for one that shows no answer."""
    question: Message = {"role": "user", "content": QUESTION}
    answer: Message = {"role": "assistant", "content": ANSWER}
    lead: list[Message] = []
    tools: list[Any] | None = None
    try:
        text, marks = template.render([question, answer], None, template.where)
    except DataError:  # some templates insist on a system prompt, or on tools
        lead, tools = [{"role": "system", "content": "Hi"}], [TOOL]
        text, marks = template.render([*lead, question, answer], tools, template.where)

    def shown(*messages: Message, generation_prompt: bool = False) -> str:
        try:
            return template.render([*lead, *messages], tools, template.where, generation_prompt=generation_prompt).text
        except DataError:
            return ""

    before, found, after = text.partition(ANSWER)
    if not found:
        raise DataError("the chat template leaves out the assistant's answer", where=template.where)
    asked, prompt = shown(question), shown(question, generation_prompt=True)
    closing = _up_to_first(template.tokens, after)
    following: Message = {"role": "user", "content": FOLLOWING}
    later_text = shown(question, answer, following)
    joint = later_text.partition(ANSWER)[2].partition(FOLLOWING)[0]
    user_header = _common_end(template.tokens, asked.partition(QUESTION)[0], joint)
    call = {"id": CALL_ID, "type": "function", "function": {"name": NAME, "arguments": {KEY: VALUE}}}
    calling: Message = {"role": "assistant", "content": "", "tool_calls": [call]}
    result: Message = {"role": "tool", "tool_call_id": CALL_ID, "name": NAME, "content": FOLLOWING}
    called = shown(question, calling)
    tool_header = _difference(called, shown(question, calling, result).partition(FOLLOWING)[0])
    # Between turns may stand nothing but the next one's header.
    inner_closing = "" if joint.strip() == user_header.strip() else _up_to_first(template.tokens, joint)
    call_closing = _last(template.tokens, called.rpartition(VALUE)[2])
    # Marks inside a macro come with wrong positions (transformers counts only what was printed so far).
    span = (len(before), len(before) + len(ANSWER))
    return Shape(
        opening=prompt[len(asked) :] if prompt.startswith(asked) else "",
        header=before[len(prompt) :] if before.startswith(prompt) else "",
        closing=closing,
        inner_closing=inner_closing,
        closings=tuple(dict.fromkeys(filter(None, (closing, inner_closing, call_closing)))),
        next_headers={"user": user_header, "tool": tool_header},
        before_question=user_header,
        after_question=prompt.partition(QUESTION)[2],
        marks=len(marks) == 1 and marks[0][0] <= span[0] and span[1] <= marks[0][1] <= len(text),
    )


def _up_to_first(tokens: tuple[str, ...], trailer: str) -> str:
    """`trailer` up to its first added token: "</s>" of "</s>\\n". Without one, all but the blanks at its end."""
    found = [(at, at + len(token)) for token in tokens if (at := trailer.find(token)) >= 0]
    # At the same place the longest token counts: `tokens` begins with the longest.
    return trailer[: min(found, key=lambda span: span[0])[1]] if found else trailer.rstrip() or trailer


def _last(tokens: tuple[str, ...], trailer: str) -> str:
    """The last added token in `trailer`, or nothing."""
    found = [(at + len(token), token) for token in tokens if (at := trailer.rfind(token)) >= 0]
    return max(found)[1] if found else ""


def _common_end(tokens: tuple[str, ...], one: str, other: str) -> str:
    """What two texts have in common at their ends, in whole tokens: "[INST] " of "<s>[INST] " and "</s>[INST] "."""
    start = len(one) - _shared_prefix(one[::-1], other[::-1])
    cut = [at + len(token) for token in tokens if 0 <= (at := one.rfind(token, 0, start + len(token) - 1)) < start]
    return one[max([start, *(end for end in cut if end > start)]) :]


def _shared_prefix(one: str, other: str) -> int:
    """How many characters two texts have in common at their beginning, by halving."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if one.startswith(other[:middle]) else (low, middle - 1)
    return low


def _difference(shorter: str, longer: str) -> str:
    """What `longer` has beyond `shorter`; nothing where it does not begin with it."""
    return longer[len(shorter) :] if shorter and longer.startswith(shorter) else ""
