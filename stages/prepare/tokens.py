"""Tokens: conversations and texts -> token ids and the mask of those that are targets, a batch at a time.

Invariant: a text is tokenised once, as a whole, and the mask is read off the character offsets: no piece is ever
tokenised alone, so ids and mask cannot drift. Which token belongs to a span that begins or ends inside it is decided by
the token's first character that is not blank (its first character where all are blank): of "Answer:" + " yes" the token
" yes" is a target, and so it is of "Answer: " + "yes".

    messages, ShareGPT              the chat template; special tokens are those that it prints
    prompt + completion, alpaca     as one exchange through the chat template where the tokenizer has one; else the two
                                    strings joined, with the special tokens the tokenizer adds, and its end of text
    text                            as it is, likewise; every token is a target
    a prompt that waits             the same up to where its answer begins; no token is a target

The first token of a sample is never a target: nothing comes before it. Cost: about 0.3 ms a short chat.
"""

# Shapes: n tokens of one sample.

from bisect import bisect_left
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from kdpipe.manifests.errors import ConfigError
from kdpipe.stages.prepare.forms import Form, Pair, Text
from kdpipe.stages.prepare.marked import ChatMarker, Marked, Said, Supervise, without_ends

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Offset = tuple[int, int]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Tokens:
    """The tokens of a text.

    token_ids: int32 [n]; supervised: bool [n]
    offsets: characters that each of its first `num_text` tokens stands for; the rest stand behind the text
    """

    token_ids: np.ndarray
    supervised: np.ndarray
    offsets: list[Offset]
    num_text: int

    def of_span(self, text: str, span: Offset) -> tuple[int, int]:
        """The tokens that belong to a span of the text: the first, and the one after the last."""
        first, after = (_first_token(self.offsets, self.num_text, text, char) for char in span)
        return first, after


class Tokenizing:
    """Tokenises records with one tokenizer and one rule of what is supervised.

    stop_ids: tokens at which the model's generation ends, beside the tokenizer's end of text
    Raises ConfigError for a tokenizer without a fast backend, DataError for chat data where it has no chat template.
    """

    def __init__(
        self, tokenizer: "PreTrainedTokenizerBase", supervise: Supervise, stop_ids: Collection[int] = ()
    ) -> None:
        if not tokenizer.is_fast:
            raise ConfigError(
                "this tokenizer has no fast (Rust) backend, so characters cannot be matched to tokens; "
                "save a tokenizer.json beside it",
                where=tokenizer.name_or_path or None,
            )
        self._tokenizer = tokenizer
        self._supervise = supervise
        self._marker = ChatMarker(tokenizer, supervise, _stop_texts(tokenizer, stop_ids))
        self._adds_bos = tokenizer.bos_token_id is not None and tokenizer.bos_token_id in tokenizer("").input_ids

    def mark(self, form: Form, place: str) -> Marked:
        """The text that the model will see of a record at `place`, and which of its characters are targets."""
        if isinstance(form, Text):
            text = self._without_ends(form.text)
            said = (Said(span=(0, len(text)), words=(text,)),)
            return Marked(text=text, targets=None, plain=True, findings=self._marker.of_text(form.text), said=said)
        if isinstance(form, Pair) and not self._tokenizer.chat_template:
            prompt = self._without_ends(form.prompt + form.glue, at_end=False)
            if form.completion is None:
                found = self._marker.of_pair(form)
                return Marked(text=prompt, targets=[], plain=True, is_open=True, findings=found)
            text = self._without_ends(prompt + form.completion)
            targets = None if self._supervise == "all" else [(len(prompt), len(text))]
            findings = self._marker.of_pair(form)
            answer = Said(span=(len(prompt), len(text)), words=(form.completion,))
            if self._supervise == "all":
                answer = Said(span=(0, len(text)), words=(form.prompt, form.completion))
            return Marked(
                text=text, targets=targets, plain=True, is_open=form.is_cut, findings=findings, said=(answer,)
            )
        return self._marker.mark(form.chat() if isinstance(form, Pair) else form, place)

    def _without_ends(self, text: str, *, at_end: bool = True) -> str:
        """Running text less the special tokens around it that tokenising adds."""
        bos, eos = self._tokenizer.bos_token, self._tokenizer.eos_token
        return without_ends(text, bos if self._adds_bos else None, eos if at_end else None)

    def encode(self, batch: Sequence[Marked]) -> list[Tokens]:
        """The tokens of each text, in order."""
        found: dict[int, Tokens] = {}
        for plain in (False, True):
            chosen = [index for index, marked in enumerate(batch) if marked.plain is plain]
            if chosen:
                rows = self._encode([batch[index] for index in chosen], plain=plain)
                found.update(zip(chosen, rows, strict=True))
        return [found[index] for index in range(len(batch))]

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
        if marked.is_open:
            ids = ids[:num_tokens]
        end_of_text = self._tokenizer.eos_token_id if marked.plain and not marked.is_open else None
        if end_of_text is not None and end_of_text not in ids[num_tokens:]:
            ids = [*ids[:num_tokens], end_of_text, *ids[num_tokens:]]
        supervised = np.zeros(len(ids), dtype=np.bool_)
        if marked.targets is None:
            supervised[:] = True
        for start, end in marked.targets or ():
            first = _first_token(offsets, num_tokens, marked.text, start)
            supervised[first : _first_token(offsets, num_tokens, marked.text, end)] = True
        if end_of_text is not None:
            supervised[num_tokens : ids.index(end_of_text, num_tokens) + 1] = True
        supervised[:1] = False
        return Tokens(
            token_ids=np.array(ids, dtype=np.int32), supervised=supervised, offsets=offsets, num_text=num_tokens
        )


def _stop_texts(tokenizer: "PreTrainedTokenizerBase", stop_ids: Collection[int]) -> tuple[str, ...]:
    """How the tokens that end generation stand in a text, the tokenizer's own end of text first."""
    ids = [tokenizer.eos_token_id, *sorted(stop_ids)]
    texts = (tokenizer.decode([number]) for number in ids if number is not None and 0 <= number < len(tokenizer))
    return tuple(dict.fromkeys(text for text in texts if text.strip()))


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
