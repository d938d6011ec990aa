"""Retelling: an answer that a student wrote itself, as its teacher with another tokenizer reads it.

    the student's tokens -> their bytes -> text, and where each ends
    the text -> the teacher's tokens behind its own prompt, where each ends -> spans

The student's tokens are those that it wrote, whatever its tokenizer would make of the text; the teacher's are those
that its tokenizer makes of it behind what stands before every answer.
Invariant: both sides of a span stand for the same bytes, but for the tokens that end the answer. What is no text ends
the answer for the teacher: a special token, bytes that make no character, what is beyond the length that it reads. The
student's tokens from there on are in no span.
Cost: the answer tokenised once.
"""

# Shapes: n tokens that the student wrote, K spans.

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from kdpipe.manifests.sample import SampleTokens
from kdpipe.manifests.specs import DataSpec
from kdpipe.stages.models.vocabularies import SharedVocabulary
from kdpipe.stages.prepare.boundaries import (
    INSIDE,
    Text,
    TokenBytes,
    common_spans,
    cuts,
    cuts_within,
    token_ends,
)
from kdpipe.stages.prepare.sources import RawRecord
from kdpipe.stages.prepare.template import Span
from kdpipe.stages.prepare.work import Preparing

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NO_SPANS = np.zeros((0, 5), dtype=np.int64)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Retold:
    """What a teacher is told of an answer.

    text: its own prompt and, supervised, the answer in its tokens; of an answer without a word a token of no span
    spans: int32 [K, 4], which of the answer's tokens stand for the same text: first and number, the student's first
    """

    text: SampleTokens
    spans: np.ndarray


class Retelling:
    """Tells the answers of a student to its teacher.

    ends: tokens that end a turn, (student's, teacher's); the teacher's end of text where there are none
    most_tokens: that the teacher reads; most_rows: of an answer
    """

    def __init__(
        self,
        student: "PreTrainedTokenizerBase",
        teacher: "PreTrainedTokenizerBase",
        vocabulary: SharedVocabulary,
        ends: Sequence[tuple[int, int]],
        *,
        most_tokens: int | None,
        most_rows: int,
    ) -> None:
        self._teacher, self._ours, self._theirs = teacher, vocabulary.student_bytes, vocabulary.teacher_bytes
        self._end = ends[0][1] if ends else teacher.eos_token_id
        self._most_tokens, self._most_rows = most_tokens or sys.maxsize, most_rows
        self._puts_a_blank = _answer_of(student, self._ours).puts_a_blank
        self._opening = _answer_of(teacher, self._theirs).opening
        self._opening_ids = self._encoded(self._opening)[0]

    def has_room(self, prompt: np.ndarray) -> bool:
        """Whether the teacher can read anything behind a prompt."""
        return len(prompt) < self._most_tokens

    def told(self, prompt: np.ndarray, answer: np.ndarray, *, ended: bool) -> Retold:
        """An answer to a prompt. prompt: int32, the teacher's own; answer: int32 [n]; ended: by its last token"""
        written = answer[: len(answer) - ended]
        text, ours = self._read(written)
        ids, theirs = self._tokens(prompt, text)
        spans = NO_SPANS
        if text.bytes:
            whole = 0, len(text.bytes)
            spans = common_spans(*(cuts_within(text, cuts(ends), *whole) for ends in (ours, theirs)))
        if ended and len(ours) == len(written) and self._end is not None:
            spans = np.concatenate([spans, [[len(written), 1, len(ids), 1, 0]]])
            ids = [*ids, self._end]
        room = min(self._most_rows, self._most_tokens - len(prompt))
        ids, spans = ids[:room], spans[spans[:, 2] + spans[:, 3] <= room, :4]
        told = np.array([*prompt.tolist(), *(ids or [self._end or 0])], dtype=np.int32)
        return Retold(text=SampleTokens(told, np.arange(len(told)) >= len(prompt)), spans=spans.astype(np.int32))

    def _read(self, written: np.ndarray) -> tuple[Text, np.ndarray]:
        """The text of an answer up to what is none, and where each of its tokens ends, int64."""
        pieces = [piece or b"" for piece in takewhile(_is_text, (self._ours[each] for each in written.tolist()))]
        while True:
            ends = np.cumsum([len(piece) for piece in pieces], dtype=np.int64)
            try:
                text = b"".join(pieces).decode()
                break
            except UnicodeDecodeError as err:
                pieces = pieces[: int(np.searchsorted(ends, err.start, "right"))]
        if self._puts_a_blank and text.startswith(" "):
            text, ends = text[1:], np.maximum(ends - 1, 0)
        return Text(text), np.where(np.diff(ends, prepend=0) > 0, ends, INSIDE)

    def _tokens(self, prompt: np.ndarray, text: Text) -> tuple[list[int], np.ndarray]:
        """The teacher's tokens of the text of an answer to a prompt, and where each ends in it."""
        before, opening = self._opening, self._opening_ids
        ids, offsets = self._encoded(before + text.text)
        if [prompt[-len(opening) :].tolist(), ids[: len(opening)]] != [opening, opening]:
            # Another prompt, or the answer's first characters are one token with what stands before them.
            before, opening, (ids, offsets) = "", [], self._encoded(text.text)
        own = [(max(start - len(before), 0), end - len(before)) for start, end in offsets[len(opening) :]]
        return ids[len(opening) :], token_ends(text, ids[len(opening) :], own, self._theirs)

    def _encoded(self, text: str) -> tuple[list[int], list[Span]]:
        found = self._teacher(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        return found["input_ids"], found["offset_mapping"]


def _is_text(piece: bytes | None) -> bool:
    return piece is not None


class _Answer(NamedTuple):
    """How a tokenizer's answers begin.

    opening: the text before each, from the last special token on; "" without one
    puts_a_blank: whether their first token has a blank that they do not have, as SentencePiece's "▁Rows"
    """

    opening: str = ""
    puts_a_blank: bool = False


def _answer_of(tokenizer: "PreTrainedTokenizerBase", table: TokenBytes) -> _Answer:
    """Learned from a conversation of two letters."""
    record = RawRecord(source="", line=1, place="", fields={"prompt": "a\n", "completion": "a"})
    batch = Preparing(tokenizer, DataSpec(), ()).tokenized([record])
    (prepared,), (tokens,) = batch.prepared, batch.tokens
    if prepared.marked is None or tokens is None or not prepared.marked.targets:
        return _Answer()
    first, (start, _) = int(np.flatnonzero(tokens.supervised)[0]), prepared.marked.targets[0]
    special = [place for place in range(first) if table[tokens.token_ids[place]] is None]
    opening = prepared.marked.text[tokens.offsets[special[-1]][0] : start] if special else ""
    return _Answer(opening, (table[tokens.token_ids[first]] or b"").startswith(b" "))
