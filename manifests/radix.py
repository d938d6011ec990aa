"""Radix: codes of a few levels each, packed so that every row has the same number of bytes, and hardly a bit is lost.

    words = pack(codes, radix)        codes [R, K], code k below levels[k] -> uint32 [R, W]
    unpack(words, radix) == codes

A word holds some of the codes as the digits of one number: with 3, 5 and 4 levels the codes (2, 4, 1) are
2 + 3 * (4 + 5 * 1). Five codes of 3 levels so take 8 bits, where 2 bits for each would be 10.
Cost: a product and a sum a code to pack, two divisions to unpack.
"""

# Shapes: R rows, K codes of a row, W words of a packed row.

from dataclasses import dataclass

import numpy as np

WORD = 1 << 32
MOST_LEVELS = 1 << 16


@dataclass(frozen=True, slots=True, eq=False)
class Radix:
    """Where codes lie, int64 [K] each: their levels, their words, which rise, and what they are multiplied by there."""

    levels: np.ndarray
    word: np.ndarray
    factor: np.ndarray

    @classmethod
    def of(cls, levels: np.ndarray, words: np.ndarray) -> "Radix":
        """Codes of so many levels in these words [K], the first of a word first."""
        factor = np.ones(len(levels), np.int64)
        for at in range(1, len(levels)):
            if words[at] == words[at - 1]:
                factor[at] = factor[at - 1] * int(levels[at - 1])
        return cls(levels.astype(np.int64), words.astype(np.int64), factor)

    @property
    def num_words(self) -> int:
        return int(self.word[-1]) + 1 if len(self.word) else 0

    @property
    def starts(self) -> np.ndarray:
        """The first code of each word."""
        return np.flatnonzero(np.diff(self.word, prepend=-1))


def arrange(levels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """An order of codes of so many levels, 2 to MOST_LEVELS, int64 [K], and the word of each in that order.

    A word takes the codes of the most levels while two more of them fit, then the pair, or the one, that fills it best:
    some 1 % of the bits are lost.
    """
    left: dict[int, list[int]] = {}
    for place in range(len(levels))[::-1]:
        left.setdefault(int(levels[place]), []).append(place)
    order, words, room, word = [], [], WORD, 0
    while left:
        taken = _next(left, room)
        if not taken:
            word, room = word + 1, WORD
        for kind in taken:
            order.append(left[kind].pop())
            words.append(word)
            room //= kind
            if not left[kind]:
                del left[kind]
    return np.array(order, np.int64), np.array(words, np.int64)


def _next(left: dict[int, list[int]], room: int) -> tuple[int, ...]:
    """The codes, by their levels, that a word with so much room takes next; none where none fits."""
    kinds = np.sort(np.array(list(left), np.int64))
    largest = int(kinds[-1])
    if largest * largest <= room:
        return (largest,)
    best: tuple[int, ...] = ()
    single = int(np.searchsorted(kinds, room, side="right")) - 1
    if single >= 0:
        best = (int(kinds[single]),)
    partners = np.searchsorted(kinds, room // kinds, side="right") - 1
    pairs = kinds * kinds[partners.clip(0)] * (partners >= 0)
    for at in np.argsort(pairs)[::-1].tolist():
        pair = int(kinds[at]), int(kinds[partners[at]])
        if pairs[at] <= np.prod(best, dtype=np.int64):
            break
        if pair[0] != pair[1] or len(left[pair[0]]) > 1:
            return pair
    return best


def pack(codes: np.ndarray, radix: Radix) -> np.ndarray:
    """Codes [R, K], int64, as words uint32 [R, W]."""
    if not len(radix.word):
        return np.zeros((len(codes), 0), np.uint32)
    return np.add.reduceat(codes * radix.factor, radix.starts, axis=1).astype(np.uint32)


def unpack(words: np.ndarray, radix: Radix) -> np.ndarray:
    """The codes, uint32 [R, K], that words uint32 [R, W] hold."""
    digits = words[:, radix.word]
    digits //= radix.factor.astype(np.uint32)
    digits %= radix.levels.astype(np.uint32)
    return digits
