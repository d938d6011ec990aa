"""Tokens: conversations and texts -> token ids and the mask of those that are targets, a batch at a time.

Invariant: a text is tokenised once, as a whole, and the mask is read off the character offsets: no piece is ever
tokenised alone, so ids and mask cannot drift. Which token belongs to a span that begins or ends inside it is decided by
the token's first character that is not blank (its first character where all are blank): of "Answer:" + " yes" the token
" yes" is a target, and so it is of "Answer: " + "yes".

    messages, ShareGPT              the chat template; special tokens are those that it prints
    prompt + completion, alpaca     as one exchange through the chat template where the tokenizer has one; else the two
                                    strings joined, with the special tokens the tokenizer adds, and its end of text
    text                            as it is, likewise; every token is a target

The first token of a sample is never a target: nothing comes before it. Cost: about 0.3 ms a short chat.
"""

# Shapes: n tokens of one sample.

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from kdpipe.manifests.errors import ConfigError, DataError
from kdpipe.stages.prepare.forms import Chat, Form, Pair, Text
from kdpipe.stages.prepare.template import ChatTemplate, Span

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Supervise = Literal["assistant", "last", "completion", "all"]
Offset = tuple[int, int]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Tokens:
    """token_ids: int32 [n]; supervised: bool [n]"""

    token_ids: np.ndarray
    supervised: np.ndarray


@dataclass(frozen=True, kw_only=True, slots=True)
class Marked:
    """A text to tokenise. targets: spans of characters to learn, None for all; plain: add special tokens."""

    text: str
    targets: list[Span] | None
    plain: bool


class Tokenizing:
    """Tokenises records with one tokenizer and one rule of what is supervised.

    Raises ConfigError for a tokenizer without a fast backend, DataError for chat data where it has no chat template.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", supervise: Supervise) -> None:
        if not tokenizer.is_fast:
            raise ConfigError(
                "this tokenizer has no fast (Rust) backend, so characters cannot be matched to tokens; "
                "save a tokenizer.json beside it",
                where=tokenizer.name_or_path or None,
            )
        self._tokenizer = tokenizer
        self._supervise = supervise
        self._template = ChatTemplate(tokenizer) if tokenizer.chat_template else None

    def mark(self, form: Form, place: str) -> Marked:
        """The text that the model will see of a record at `place`, and which of its characters are targets."""
        if isinstance(form, Text):
            return Marked(text=form.text, targets=None, plain=True)
        if isinstance(form, Pair) and self._template is None:
            prompt = form.prompt + form.glue
            text = prompt + form.completion
            return Marked(text=text, targets=self._unless_all([(len(prompt), len(text))]), plain=True)
        return self._mark_chat(form.chat() if isinstance(form, Pair) else form, place)

    def encode(self, batch: Sequence[Marked]) -> list[Tokens]:
        """The tokens of each text, in order."""
        found: dict[int, Tokens] = {}
        for plain in (False, True):
            chosen = [index for index, marked in enumerate(batch) if marked.plain is plain]
            if chosen:
                rows = self._encode([batch[index] for index in chosen], plain=plain)
                found.update(zip(chosen, rows, strict=True))
        return [found[index] for index in range(len(batch))]

    def _mark_chat(self, chat: Chat, place: str) -> Marked:
        if self._template is None:
            raise DataError(
                "a conversation, but the tokenizer has no chat template; put a chat_template.jinja beside the "
                "tokenizer, or give prompt and completion as strings",
                where=place,
            )
        if self._supervise == "all":
            return Marked(text=self._template.text(chat, place), targets=None, plain=False)
        text, turns = self._template.text_and_turns(chat, place)
        if self._supervise == "completion" and chat.completion_from is not None:
            later = chat.messages[chat.completion_from :]
            turns = turns[-sum(message["role"] == "assistant" for message in later) :]
        elif self._supervise != "assistant":
            turns = turns[-1:]
        return Marked(text=text, targets=turns, plain=False)

    def _unless_all(self, spans: list[Span]) -> list[Span] | None:
        return None if self._supervise == "all" else spans

    def _encode(self, batch: list[Marked], *, plain: bool) -> list[Tokens]:
        encoded = self._tokenizer(
            [marked.text for marked in batch],
            add_special_tokens=plain,
            return_offsets_mapping=True,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        rows = zip(batch, encoded["input_ids"], encoded["offset_mapping"], strict=True)
        return [self._tokens(marked, ids, offsets) for marked, ids, offsets in rows]

    def _tokens(self, marked: Marked, ids: list[int], offsets: list[Offset]) -> Tokens:
        num_tokens = len(ids)
        while num_tokens and offsets[num_tokens - 1] == (0, 0):
            num_tokens -= 1  # special tokens that the tokenizer adds at the end stand at no character
        end_of_text = self._tokenizer.eos_token_id if marked.plain else None
        last = max(num_tokens - 1, 0)  # a text may bring its end-of-text token along
        if end_of_text is not None and end_of_text not in ids[last:]:
            ids = [*ids[:num_tokens], end_of_text, *ids[num_tokens:]]
        supervised = np.zeros(len(ids), dtype=np.bool_)
        if marked.targets is None:
            supervised[:] = True
        for start, end in marked.targets or ():
            first = _first_token(offsets, num_tokens, marked.text, start)
            supervised[first : _first_token(offsets, num_tokens, marked.text, end)] = True
        if end_of_text is not None:
            supervised[num_tokens : ids.index(end_of_text, last) + 1] = True
        supervised[:1] = False
        return Tokens(token_ids=np.array(ids, dtype=np.int32), supervised=supervised)


def _first_token(offsets: list[Offset], num_tokens: int, text: str, char: int) -> int:
    """The first token that belongs to the text from `char` on.

    A token that begins before `char` belongs to it when only blanks of the token stand before. Tokenizers that trim the
    offsets (GPT-2, Llama 3: the blank of " yes" is left out, "  " becomes an empty pair) agree with those that do not.
    """
    token = bisect_left(offsets, (char,), 0, num_tokens)
    while token < num_tokens and offsets[token] == (char, char):
        token += 1  # blanks trimmed to nothing: they end here
    if token:
        start, end = offsets[token - 1]
        if start < char < end and text[start:char].isspace() and not text[char:end].isspace():
            token -= 1
    return token
