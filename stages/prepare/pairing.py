"""Pairing: records under two tokenizers and two chat templates -> samples of the one, aligned with those of the other.

    record -> text and targets of either template -> tokens of either tokenizer
           -> the words that are to be learnt, found in both texts -> spans (boundaries.py) -> runs of rows

Text is aligned turn by turn. Where a turn reads the same under both templates, less the token that ends it and blanks
around it, all of it is aligned; else the words of its message that both show: its thought and its answer. What else a
template puts there stands alone. The token that ends a turn, or a text, pairs with the other side's.
Invariant: a span's tokens are targets on both sides, within what --max-length left of either sample; both sides of it
stand for the same bytes, but for the tokens that end a turn.
Cost: that of preparing the records twice, and a fifth more.
"""

# Shapes: n tokens of a sample, K spans.

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import xxhash

from kdpipe.manifests.sample import Sample
from kdpipe.manifests.samples import identity
from kdpipe.manifests.specs import DataSpec
from kdpipe.stages.prepare.boundaries import (
    INSIDE,
    Cuts,
    Text,
    TokenBytes,
    common_spans,
    cuts,
    cuts_within,
    token_ends,
)
from kdpipe.stages.prepare.marked import Marked, Said
from kdpipe.stages.prepare.sources import RawRecord
from kdpipe.stages.prepare.template import Span
from kdpipe.stages.prepare.tokens import Tokens
from kdpipe.stages.prepare.work import Alignment, Preparing, Worked

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NO_SPANS = np.zeros((0, 5), dtype=np.int64)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Party:
    """One side: how it makes samples of records.

    stop_ids: tokens at which its generation ends, beside its end of text
    table: bytes of text of every id, as models.vocabularies.token_bytes gives them
    prompts: a record without an answer is a sample without a target
    """

    tokenizer: "PreTrainedTokenizerBase"
    spec: DataSpec
    stop_ids: Collection[int]
    table: TokenBytes
    prompts: bool = False

    def preparing(self) -> Preparing:
        return Preparing(self.tokenizer, self.spec, self.stop_ids, self.prompts)

    def ends_a_turn(self, index: int) -> bool:
        return index in self.stop_ids or index == self.tokenizer.eos_token_id or self.table[index] is None


class Pairing:
    """Prepares records as `Preparing` does for the student, each sample with its alignment to the teacher's."""

    def __init__(self, student: Party, teacher: Party) -> None:
        self._student, self._teacher = student, teacher
        self._ours, self._theirs = student.preparing(), teacher.preparing()

    def __call__(self, batch: Sequence[RawRecord]) -> Worked:
        ours, theirs = self._ours.tokenized(batch), self._theirs.tokenized(batch)
        worked, other = self._ours.worked(ours), self._theirs.worked(theirs)
        for place, (outcome, their) in enumerate(zip(worked.outcomes, other.outcomes, strict=True)):
            if outcome.sample is None or their.sample is None:
                continue
            sides = [
                _Side(party, prepared.marked, tokens, sample)
                for party, prepared, tokens, sample in (
                    (self._student, ours.prepared[place], ours.tokens[place], outcome.sample),
                    (self._teacher, theirs.prepared[place], theirs.tokens[place], their.sample),
                )
            ]
            worked.outcomes[place] = replace(outcome, alignment=_alignment(*sides))
        return worked


def sample_digest(content_id: bytes, token_ids: np.ndarray, supervised: np.ndarray) -> bytes:
    """8 bytes that say which sample it is: xxh3-64 of its identity."""
    return xxhash.xxh3_64_digest(identity(content_id, token_ids, supervised))


class _Side:
    """A record as one side reads it.

    text, ends, cuts: where its tokens end, as boundaries.py has it
    after: where, of its tokens up to each one, the targets are: int64 [n + 1], 0 first
    """

    def __init__(self, party: Party, marked: Marked | None, tokens: Tokens | None, sample: Sample) -> None:
        assert marked is not None, "a sample was marked"
        assert tokens is not None, "a sample has tokens"
        self.party, self.marked, self.tokens, self.sample = party, marked, tokens, sample
        self.text = Text(marked.text)
        ids = tokens.token_ids[: tokens.num_text].tolist()
        self.ends = token_ends(self.text, ids, tokens.offsets[: tokens.num_text], party.table)
        self.cuts = cuts(self.ends)
        self.after = np.concatenate([np.zeros(1, np.int64), np.cumsum(sample.supervised[: len(sample.token_ids)])])

    def turn(self, said: Said) -> tuple[Span, int | None]:
        """The characters of a turn less what ends it and blanks around it, and the token that ends it, if one does."""
        (start, end), closing = said.span, None
        _, after = self.tokens.of_span(self.marked.text, said.span)
        if end == len(self.marked.text) and self.tokens.num_text < len(self.tokens.token_ids):
            closing = self.tokens.num_text  # put behind the text
        elif (last := self._last_said(after)) >= 0 and self.party.ends_a_turn(int(self.tokens.token_ids[last])):
            closing = last
            end = max(start, min(end, self.tokens.offsets[closing][0]))
        body = self.marked.text[start:end]
        start += len(body) - len(body.lstrip())
        return (start, max(start, end - len(body) + len(body.rstrip()))), closing

    def _last_said(self, after: int) -> int:
        """The last token before `after` that is not of blanks alone: where all is learnt, those behind a turn are."""
        table, ids = self.party.table, self.tokens.token_ids
        while after and (piece := table[int(ids[after - 1])]) is not None and not piece.strip():
            after -= 1
        return after - 1

    def bytes_after(self) -> np.ndarray:
        """Bytes of text that the targets up to each token stand for, int64 [n + 1], 0 first; none for special tokens.

        A token that the vocabulary lacks stands for its text. One whose end is not known leaves its bytes to the next.
        """
        ends = np.maximum.accumulate(np.where(self.ends == INSIDE, 0, self.ends))[: len(self.sample.token_ids)]
        table, unknown = self.party.table, self.party.tokenizer.unk_token_id
        ids = self.sample.token_ids[: len(ends)].tolist()
        counts = np.array([table[index] is not None or index == unknown for index in ids], dtype=bool)
        counts &= self.sample.supervised[: len(ends)]
        return np.concatenate([np.zeros(1, np.int64), np.cumsum(np.diff(ends, prepend=0) * counts)])

    def within(self, span: Span) -> Cuts:
        return cuts_within(self.text, self.cuts, *self.text.within(span))

    def rows(self, firsts: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The row that predicts the first token of each run, and whether all of its tokens are targets and kept."""
        ends = firsts + counts
        kept = ends < len(self.after)
        inside = np.minimum(ends, len(self.after) - 1)
        begin = np.minimum(firsts, len(self.after) - 1)
        return self.after[begin], kept & (self.after[inside] - self.after[begin] == counts)


def _alignment(student: _Side, teacher: _Side) -> Alignment:
    found = [NO_SPANS]
    if len(student.marked.said) == len(teacher.marked.said):
        for ours, theirs in zip(student.marked.said, teacher.marked.said, strict=True):
            found += _of_turn(student, teacher, ours, theirs)
    spans = np.concatenate(found)
    rows, kept = student.rows(spans[:, 0], spans[:, 1])
    other_rows, other_kept = teacher.rows(spans[:, 2], spans[:, 3])
    both = kept & other_kept
    runs = np.stack([rows, spans[:, 1], other_rows, spans[:, 3]], axis=1)[both]
    sample, sizes = teacher.sample, student.bytes_after()
    first, after = (np.minimum(places, len(sizes) - 1) for places in (spans[both, 0], spans[both, 0] + spans[both, 1]))
    return Alignment(
        spans=runs.astype(np.int32),
        digest=sample_digest(sample.content_id, sample.token_ids, sample.supervised),
        num_bytes=int(sizes[-1]),
        aligned_bytes=int((sizes[after] - sizes[first]).sum()),
    )


def _of_turn(student: _Side, teacher: _Side, ours: Said, theirs: Said) -> Iterator[np.ndarray]:
    """Spans of one turn, as `common_spans` has them, in order."""
    (here, closing), (there, other_closing) = student.turn(ours), teacher.turn(theirs)
    for own, other in _common_pieces(student.marked.text, here, ours, teacher.marked.text, there, theirs):
        yield common_spans(student.within(own), teacher.within(other))
    if closing is not None and other_closing is not None:
        yield np.array([[closing, 1, other_closing, 1, 0]])


def _common_pieces(
    text: str, here: Span, ours: Said, other: str, there: Span, theirs: Said
) -> Iterator[tuple[Span, Span]]:
    """Where the same words stand in both texts within these spans, in order."""
    if text[slice(*here)] == other[slice(*there)]:
        yield here, there
        return
    if len(ours.words) != len(theirs.words):
        return
    at, other_at = here[0], there[0]
    words = [min(pair, key=len).strip() for pair in zip(ours.words, theirs.words, strict=True)]
    for number, word in enumerate(words):
        last = number == len(words) - 1  # words of a thought may come again in its answer
        own, opposite = _find(text, word, (at, here[1]), last=last), _find(other, word, (other_at, there[1]), last=last)
        if own is not None and opposite is not None:
            yield own, opposite
            at, other_at = own[1], opposite[1]


def _find(text: str, word: str, within: Span, *, last: bool) -> Span | None:
    at = (text.rfind if last else text.find)(word, *within) if word else -1
    return (at, at + len(word)) if at >= 0 else None
