"""fisher: transform coding in the metric of the teacher's head: bits go where an error would change its distribution.

    z = V' G^(1/2) (row - mean)            half an error's square, summed over z, is its KL (stages/codec/metric.py)
    q = round(z / step)                    one step for all components
    row' = mean + sum of q * synthesis     step * G^(-1/2) V, a row of it for each component

A component takes the levels that nearly all of its q have, from `lowest` on, the same for the whole cache, so that
rows are of one size (radix.py). A q beyond them is cut to the nearest, and what was cut away follows as exceptions
(component, difference) in the ragged part; a component that is nearly always the same takes no room but for those. A
row that would take more room so than as it is, as wild as none of those the codec was fitted to, is stored as it is:
place E + j is its j-th byte. So no q is ever off by more than half.

Invariant: a row has the same codes wherever and beside whatever it is encoded. Its numbers are brought to integers of
`integer_bits`, as the basis was, so that every product and sum is exact in float64.
Cost: two operations of float64 for each element and component to encode, of float32 to decode.
"""

# Shapes: R rows, E teacher width, K components that take room, X exceptions.

from collections.abc import Mapping
from typing import ClassVar

import numpy as np

from kdpipe.manifests.codec import Ragged, TensorSpec
from kdpipe.manifests.int8 import within
from kdpipe.manifests.radix import Radix, pack, unpack
from kdpipe.manifests.specs import Dtype

LARGEST_DIFFERENCE = 127
"""Of one exception; more is several of them."""
MOST_PLACES = 1 << 16
"""That an exception can name: components, and a row's bytes."""
EXCEPTION_BYTES = 3


def integer_bits(width: int) -> int:
    """Bits of the integers whose products, `width` of them summed, are exact in float64."""
    return (53 - max(width - 1, 1).bit_length()) // 2


class Fisher:
    """The codec of these arrays, components in the order of radix.arrange, those that take no room last.

    mean: float32 [E]
    spread: float32 [E], powers of two by which a row's numbers are divided first
    analysis: int32 [E, E], a component's column as integers
    unit: float64 [E], power of two by which the integers' sum is z / step
    lowest, levels: int32 [E], the q that are packed; words: int32 [K], where
    synthesis: float32 [E, E], what 1 of q adds to a row
    """

    ARRAYS: ClassVar[tuple[str, ...]] = ("mean", "spread", "analysis", "unit", "lowest", "levels", "words", "synthesis")
    ragged = Ragged("num_exceptions", (("exception_places", "U16"), ("exception_differences", "I8")))

    def __init__(self, arrays: Mapping[str, np.ndarray]) -> None:
        self.arrays = dict(arrays)
        self.mean, self.synthesis, self.lowest = arrays["mean"], arrays["synthesis"], arrays["lowest"]
        self.num_packed = len(arrays["words"])
        self.radix = Radix.of(arrays["levels"][: self.num_packed], arrays["words"])
        self._highest = self.lowest + arrays["levels"] - 1
        rest = slice(self.num_packed, None)
        self.origin = self.mean + self.lowest[rest].astype(np.float32) @ self.synthesis[rest]
        """float32 [E]: the row whose packed q are all 0."""
        self._bits = integer_bits(len(self.mean))
        self._analysis: np.ndarray | None = None

    def tensors(self, num_rows: int, width: int, dtype: Dtype) -> list[TensorSpec]:
        return [("packed", "U32", (num_rows, self.radix.num_words)), ("num_exceptions", "U16", (num_rows,))]

    def encode(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        found = self.steps(rows)
        kept = np.clip(found, self.lowest, self._highest)
        row, place = np.nonzero(found != kept)
        difference = found[row, place] - kept[row, place]
        copies = -(-np.abs(difference) // LARGEST_DIFFERENCE)
        wild = np.bincount(row, copies, minlength=len(rows)) * EXCEPTION_BYTES > rows.itemsize * rows.shape[1]
        if wild.any():
            kept[wild] = self.lowest
            usual = ~wild[row]
            row, place, difference, copies = row[usual], place[usual], difference[usual], copies[usual]
        row, place, value = _repeated(row, place, difference, copies.astype(np.int64))
        if wild.any():
            row, place, value = self._with_verbatim(rows, np.flatnonzero(wild), row, place, value)
        codes = kept[:, : self.num_packed] - self.lowest[: self.num_packed]
        return {
            "packed": pack(codes, self.radix),
            "num_exceptions": np.bincount(row, minlength=len(rows)).astype(np.uint16),
            "exception_places": place.astype(np.uint16),
            "exception_differences": value.astype(np.int8),
        }

    def steps(self, rows: np.ndarray) -> np.ndarray:
        """q of rows [R, E]: whole numbers, float64 [R, E]."""
        return np.rint(self.exact(rows))

    def exact(self, rows: np.ndarray) -> np.ndarray:
        """The same before they are rounded: the same bits for a row, in whatever order its products are summed."""
        if self._analysis is None:
            self._analysis = self.arrays["analysis"].astype(np.float64)
        numbers = (rows.astype(np.float64) - self.mean) / self.arrays["spread"]
        exponents = self._bits - np.frexp(np.abs(numbers).max(1, keepdims=True, initial=0))[1]
        np.rint(numbers * np.ldexp(1.0, exponents), out=numbers)
        found = numbers @ self._analysis
        found *= self.arrays["unit"]
        found *= np.ldexp(1.0, -exponents)
        return found

    def _with_verbatim(
        self, rows: np.ndarray, wild: np.ndarray, row: np.ndarray, place: np.ndarray, values: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The exceptions, and all of some rows as they are, by row."""
        as_bytes = np.ascontiguousarray(rows[wild]).view(np.int8)
        width = as_bytes.shape[1]
        all_rows = np.concatenate([row, np.repeat(wild, width)])
        all_places = np.concatenate([place, np.tile(len(self.mean) + np.arange(width), len(wild))])
        order = np.argsort(all_rows, kind="stable")
        return all_rows[order], all_places[order], np.concatenate([values, as_bytes.reshape(-1)])[order]

    def decode(self, parts: Mapping[str, np.ndarray], out: np.ndarray) -> None:
        steps = unpack(parts["packed"], self.radix).astype(np.float32)
        steps += self.lowest[: self.num_packed]
        row = np.repeat(np.arange(len(out)), parts["num_exceptions"])
        place, value = parts["exception_places"].astype(np.int64), parts["exception_differences"]
        packed = place < self.num_packed
        np.add.at(steps, (row[packed], place[packed]), value[packed])
        rows = steps @ self.synthesis[: self.num_packed]
        rows += self.origin
        for at in np.flatnonzero(~packed & (place < len(self.mean))).tolist():
            rows[row[at]] += np.float32(value[at]) * self.synthesis[place[at]]
        out[...] = within(rows, out.dtype)
        verbatim = place >= len(self.mean)
        if verbatim.any():
            out.view(np.int8)[row[verbatim], place[verbatim] - len(self.mean)] = value[verbatim]


def _repeated(
    row: np.ndarray, place: np.ndarray, difference: np.ndarray, copies: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Each exception as often as it takes, all but the last of one as large as one can be."""
    before = np.repeat(np.cumsum(copies) - copies, copies)
    left = np.repeat(difference, copies)
    left = left - np.sign(left) * (np.arange(len(before)) - before) * LARGEST_DIFFERENCE
    return np.repeat(row, copies), np.repeat(place, copies), left.clip(-LARGEST_DIFFERENCE, LARGEST_DIFFERENCE)
