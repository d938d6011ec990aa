"""The sink: rows go from inside the engine's scheduler process straight to their place in a mapped file.

A request carries an `Order` in its sampling parameters; what the sink did for it goes back as a `Receipt` in the place
where the engine would have put its list of floats. No row is pickled, sent or copied twice.
Invariant: only the bytes of the order's own rows are touched, each once and in ascending order, whether the engine
prefills a prompt whole or in chunks. Rows of another dtype or width than ordered are not written at all.
Cost: one copy of the supervised rows into the page cache and one xxh3 over them.
"""

# Shapes: n positions of one stretch of a prompt, R rows ordered, E teacher width.

import os
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import xxhash

from kdpipe.stages.rows import as_array

KEY, RUNS_KEY = "kdpipe", "kdpipe_runs"
OPEN_FILES = 4
"""Files kept open: the shard that is being filled, the next one, and those whose last request is late."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Order:
    """What one request wants written, and where.

    path, offset: file and byte of its first row
    width, dtype: of a row
    runs: positions whose rows are kept, as start, stop, start, stop, ..., ascending
    """

    path: str
    offset: int
    width: int
    dtype: str
    runs: tuple[int, ...]

    def to_params(self) -> dict[str, Any]:
        """As an engine's custom parameters, which may be scalars, lists of them and flat tables."""
        place = {"path": self.path, "offset": self.offset, "width": self.width, "dtype": self.dtype}
        return {KEY: place, RUNS_KEY: list(self.runs)}

    @classmethod
    def from_params(cls, params: object) -> "Order | None":
        """The order in a request's custom parameters, None where it has none: then it is not one of ours."""
        if not isinstance(params, Mapping) or KEY not in params:
            return None
        return cls(runs=tuple(params[RUNS_KEY]), **params[KEY])


@dataclass(frozen=True, kw_only=True, slots=True)
class Receipt:
    """What was done for one order.

    num_positions: hidden states that came by, wanted or not
    num_rows, num_bytes: written
    checksum: xxh3-64 of the rows as the engine gave them
    """

    num_positions: int
    num_rows: int
    num_bytes: int
    checksum: int

    def to_floats(self) -> list[float]:
        """The checksum in four parts of 16 bits: whatever carries floats carries these exactly."""
        parts = [self.checksum >> shift & 0xFFFF for shift in (48, 32, 16, 0)]
        return [float(number) for number in (self.num_positions, self.num_rows, self.num_bytes, *parts)]

    @classmethod
    def from_floats(cls, floats: Sequence[float]) -> "Receipt":
        positions, rows, size, *parts = (int(number) for number in floats)
        checksum = sum(part << shift for part, shift in zip(parts, (48, 32, 16, 0), strict=True))
        return cls(num_positions=positions, num_rows=rows, num_bytes=size, checksum=checksum)


def runs_of(positions: np.ndarray) -> tuple[int, ...]:
    """Ascending positions as runs: [3 4 5 9] -> (3, 6, 9, 10)."""
    if not len(positions):
        return ()
    breaks = np.flatnonzero(np.diff(positions) != 1)
    starts = positions[np.concatenate([[0], breaks + 1])]
    stops = positions[np.concatenate([breaks, [len(positions) - 1]])] + 1
    return tuple(np.stack([starts, stops], axis=1).reshape(-1).tolist())


@dataclass(slots=True, eq=False)
class _Writing:
    """One request on its way."""

    num_positions: int = 0
    num_rows: int = 0
    num_bytes: int = 0
    digest: xxhash.xxh3_64 = field(default_factory=xxhash.xxh3_64)


class Sink:
    """Writes the rows of many requests; one of it lives in each scheduler process."""

    def __init__(self) -> None:
        self._files: OrderedDict[str, int] = OrderedDict()
        self._writing: dict[str, _Writing] = {}

    def take(self, request: str, order: Order, hidden: torch.Tensor) -> None:
        """The next stretch [n, E] of a request's hidden states, on any device."""
        writing = self._writing.setdefault(request, _Writing())
        first = writing.num_positions
        writing.num_positions += len(hidden)
        if hidden.shape[1] != order.width or str(hidden.dtype) != f"torch.{order.dtype}":
            return  # no row is written, which the receipt says
        if (file := self._file(order.path)) is None:
            return  # whoever ordered it has given up
        for start, stop in zip(order.runs[::2], order.runs[1::2], strict=True):
            rows = hidden[max(start - first, 0) : max(stop - first, 0)]
            if not len(rows):
                continue
            data = as_array(rows.detach().cpu().contiguous()).view(np.uint8).reshape(-1).data
            at = order.offset + writing.num_bytes
            write_all(file, data, at)
            # The disk starts now, not when the shard is sealed; pages that others have mapped are kept.
            os.posix_fadvise(file, at, len(data), os.POSIX_FADV_DONTNEED)
            writing.digest.update(data)
            writing.num_rows += len(rows)
            writing.num_bytes += len(data)

    def finish(self, request: str) -> Receipt:
        """The receipt of a request whose last stretch has come."""
        writing = self._writing.pop(request, _Writing())
        return Receipt(
            num_positions=writing.num_positions,
            num_rows=writing.num_rows,
            num_bytes=writing.num_bytes,
            checksum=writing.digest.intdigest(),
        )

    def restart(self, request: str) -> None:
        """Forget a request that the engine took back; it comes again from its first position."""
        self._writing.pop(request, None)

    def _file(self, path: str) -> int | None:
        """The file, open for writing; it was allocated in full by whoever made it. None where it is gone."""
        if path not in self._files:
            try:
                self._files[path] = os.open(path, os.O_WRONLY)
            except FileNotFoundError:
                return None
        self._files.move_to_end(path)
        while len(self._files) > OPEN_FILES:
            os.close(self._files.popitem(last=False)[1])
        return self._files[path]


def write_all(descriptor: int, data: memoryview, offset: int) -> None:
    """Every byte of data at `offset`; a third of the time of storing into a mapping whose pages were never touched."""
    while data:
        written = os.pwrite(descriptor, data, offset)
        data, offset = data[written:], offset + written
