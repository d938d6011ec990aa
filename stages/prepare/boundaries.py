r"""Boundaries: two tokenisations of one text -> the spans of text at whose two ends both have a boundary.

    text       A  n  ä  m  i  e      "ä" is two bytes
    student   [A  n][ä  m][i  e]     ends 2 5 7
    teacher   [A][n][ä][m  i  e]     ends 1 2 4 7          -> spans [0 2) [2 7), of 1 and 2, and of 2 and 2 tokens

Positions are bytes of UTF-8: byte-level tokenisers cut characters, and where both cut one alike that is a boundary.
Where the bytes of the tokens, laid end to end, are the text between two special tokens, they say where each ends. Where
a tokenizer changed the text (its case, its accents, its blanks) the character offsets say it; tokens that share a
character there stay together unless their bytes are that character.
Invariant: positions only grow, and a token whose end is not known is never the last one of a span, so that both sides
of a span stand for the same bytes, whatever normalisers did to them.
Cost: a few passes of numpy over a text, about a third of what it takes to tokenise it.
"""

# Shapes: n tokens, M cuts, K spans.

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from kdpipe.stages.prepare.template import Span

INSIDE = -1
"""The end of a token where no boundary of the text is known: it ends within what the next one stands for."""

TokenBytes = Sequence[bytes | None]
"""Bytes of text of every id; None for those that stand for none, such as special tokens."""


class Text:
    """A text as bytes, and where its characters begin in them."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.bytes = text.encode("utf-8", "surrogatepass")
        self._starts = None
        if len(self.bytes) != len(text):
            codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
            sizes = 1 + (codes > 0x7F).astype(np.int64) + (codes > 0x7FF) + (codes > 0xFFFF)
            self._starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes)])

    def at(self, chars: np.ndarray) -> np.ndarray:
        """Where in the bytes characters begin, int64; len(text) is the end."""
        return chars if self._starts is None else self._starts[chars]

    def within(self, span: Span) -> tuple[int, int]:
        """A span of characters as one of bytes."""
        start, end = self.at(np.array(span, dtype=np.int64)).tolist()
        return start, end

    def is_blank(self, start: int, end: int) -> bool:
        """Whether there are blanks alone between two places, or nothing; not within a character."""
        return not self.bytes[start:end].strip() or self.bytes[start:end].decode("utf-8", "replace").isspace()


def token_ends(text: Text, ids: Sequence[int], offsets: Sequence[Span], table: TokenBytes) -> np.ndarray:
    """Where each token ends in the bytes of its text, int64 [n]; INSIDE where that is not known.

    offsets: (first character, after the last) of each token, as the tokenizer gives them
    """
    pieces = [table[index] for index in ids]
    chars = np.array(offsets, dtype=np.int64).reshape(-1, 2)
    starts, ends = text.at(chars[:, 0]), text.at(chars[:, 1])
    found = ends.copy()
    # Special tokens are found in a text by their names, so their offsets are right whatever a normaliser does.
    special = [place for place, piece in enumerate(pieces) if piece is None]
    for before, after in pairwise([-1, *special, len(pieces)]):
        if before + 1 < after:
            begin = int(ends[before]) if before >= 0 else 0
            stop = int(starts[after]) if after < len(pieces) else len(text.bytes)
            own = slice(before + 1, after)
            known = [piece or b"" for piece in pieces[own]]
            laid = _laid_out(known, text.bytes[begin:stop], begin)
            found[own] = _by_offsets(text, known, starts[own], ends[own], stop) if laid is None else laid
            found[own][np.diff(found[own], prepend=begin) == 0] = INSIDE  # it stands for nothing: the next one's
    found[-1:] = len(text.bytes)  # with whatever was left out behind it
    return _growing(found)


def _laid_out(pieces: Sequence[bytes], data: bytes, begin: int) -> np.ndarray | None:
    """Where pieces laid end to end do end, where that gives the data, which begin at `begin`; None where it does not.

    A blank before them that is not among the data was put there by the tokenizer, or left out of the offsets.
    """
    whole = b"".join(pieces)
    before = len(whole) - len(data)
    if before not in (0, 1) or whole[before:] != data or whole[:before] not in (b"", b" "):
        return None
    return begin + np.maximum(np.cumsum([len(piece) for piece in pieces]) - before, 0)


def _by_offsets(text: Text, pieces: Sequence[bytes], starts: np.ndarray, ends: np.ndarray, stop: int) -> np.ndarray:
    """Where tokens end by their offsets, and by their bytes where some of them share characters."""
    found = ends.copy()
    # A byte-level tokenizer gives every token of a character the whole character.
    shared = np.append(starts[1:] < ends[:-1], False)
    found[shared] = INSIDE
    for first, last in _runs(shared):
        laid = _laid_out(pieces[first : last + 1], text.bytes[starts[first] : ends[last]], int(starts[first]))
        if laid is not None:
            found[first:last] = laid[:-1]
    for place in np.flatnonzero(starts[1:] > ends[:-1]).tolist():
        # Blanks that the offsets leave out: those at a token's end are its own, the others the next one's.
        own = pieces[place][len(pieces[place].rstrip()) :]
        if own and ends[place] > starts[place] and text.bytes.startswith(own, ends[place], starts[place + 1]):
            found[place] += len(own)
    found[-1] = stop  # likewise
    return found


def _runs(shared: np.ndarray) -> list[tuple[int, int]]:
    """First and last token of each run that shares characters: [0 1 1 0 0] -> [(1, 3)]."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], shared, [False]]).astype(np.int8)))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))


def _growing(ends: np.ndarray) -> np.ndarray:
    """INSIDE for every token that ends behind one that follows it, as normalisers that reorder characters make them."""
    known = np.where(ends == INSIDE, np.iinfo(np.int64).max, ends)
    least = np.minimum.accumulate(known[::-1])[::-1]
    return np.where(ends > least, INSIDE, ends)


class Cuts(NamedTuple):
    """Where tokens of a text end: places in its bytes [M], growing, and the number of the token after each [M]."""

    places: np.ndarray
    tokens: np.ndarray


def cuts(ends: np.ndarray) -> Cuts:
    """All boundaries of a tokenisation; of special tokens that stand at one place, the one behind the first."""
    known = np.flatnonzero(ends != INSIDE)
    places, first = np.unique(ends[known], return_index=True)
    return Cuts(places, known[first] + 1)


def cuts_within(text: Text, whole: Cuts, start: int, stop: int) -> Cuts:
    """The boundaries in text[start:stop], places from its start; its two ends are some where no token crosses them.

    A token that reaches over an end by blanks alone does not cross it: templates put blanks around an answer. Nor does
    one fall short of an end by blanks alone: they are its own where the tokenizer drops them.
    """
    low, high = np.searchsorted(whole.places, [start, stop])
    at_start = low < len(whole.places) and whole.places[low] == start
    inner = slice(low + at_start, high)
    places, tokens = [whole.places[inner]], [whole.tokens[inner]]
    before, after = (0, 0) if not inner.start else (int(each[inner.start - 1]) for each in whole)
    if text.is_blank(before, start):
        places.insert(0, np.array([start]))
        tokens.insert(0, np.array([after]))
    if high < len(whole.places) and text.is_blank(stop, int(whole.places[high])):
        places.append(np.array([stop]))
        tokens.append(whole.tokens[high : high + 1])
    elif len(places[-1]) and text.is_blank(int(places[-1][-1]), stop):
        places[-1] = np.append(places[-1][:-1], stop)
    return Cuts(np.concatenate(places) - start, np.concatenate(tokens))


def common_spans(student: Cuts, teacher: Cuts) -> np.ndarray:
    """Spans of one text, int64 [K, 5]: each side's first token and number of tokens, student first; bytes of text."""
    places, ours, theirs = np.intersect1d(student.places, teacher.places, assume_unique=True, return_indices=True)
    first, second = student.tokens[ours], teacher.tokens[theirs]
    spans = np.stack([first[:-1], np.diff(first), second[:-1], np.diff(second), np.diff(places)], axis=1)
    return spans.astype(np.int64).reshape(-1, 5)
