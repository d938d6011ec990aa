"""Answers: the data set of a student that writes answers of its own, and where their teacher's rows come from.

    planned samples: 0 .. N-1, as they were read      answers: from N on, added when written, dropped when trained on

Invariant: an index means one text in a run, whatever the number of ranks.
"""

import os
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import numpy as np

from kdpipe.manifests.ring import RingReader
from kdpipe.manifests.row_source import CacheRows, RingRows, RowSource
from kdpipe.manifests.sample import SampleTokens
from kdpipe.stages.feed.dataset import Dataset

MEASURED = 1 << 48
"""Indices from here on are answers of an evaluation."""
UPDATE = -1
"""The key by which a teacher in another folder is asked for instead of this one; its digest is the answer."""


class ToldRows(RowSource, Protocol):
    """Rows of texts that it is told of."""

    @property
    def waited_s(self) -> float:
        """Seconds that were spent waiting for rows."""

    def tell(self, index: int, text: SampleTokens) -> None:
        """What an index means, before its rows are wanted."""


class OwnAnswers(Dataset):
    """The samples of a plan and, under further indices, answers to their prompts.

    rows: of both
    """

    def __init__(self, planned: Dataset, rows: ToldRows) -> None:
        super().__init__(planned.tables, [replace(teacher, rows=rows) for teacher in planned.teachers])
        self._rows, self._texts = rows, dict[int, SampleTokens]()

    def tokens(self, sample: int) -> SampleTokens:
        return self._texts[sample] if sample >= len(self) else super().tokens(sample)

    def add(self, index: int, text: SampleTokens) -> None:
        """An answer with its prompt; its teacher is told of it."""
        self._texts[index] = text
        self._rows.tell(index, text)

    def has(self, index: int) -> bool:
        """Whether this answer was added, and not dropped."""
        return index in self._texts

    @property
    def waited_s(self) -> float:
        return self._rows.waited_s

    def drop(self, indices: Iterable[int]) -> None:
        for index in indices:
            self._texts.pop(index, None)


class LiveRows:
    """RowSource of a teacher at work, but for what a cache has.

    places: int64 [N], where each planned sample is in the caches, -1 for nowhere
    """

    def __init__(self, ring: RingReader, rows: RingRows, cached: CacheRows, places: np.ndarray) -> None:
        self._ring, self._rows, self._cached, self._places = ring, rows, cached, places

    @property
    def waited_s(self) -> float:
        return self._ring.waited_s

    def tell(self, index: int, text: SampleTokens) -> None:
        self._ring.tell(index, text.to_bytes())

    def update(self, folder: Path) -> str:
        """Have the teacher be that in a folder; the digest of what it opened. Nothing else may be asked for just now.

        Raises as the ring does, and the errors of opening a teacher.
        """
        self._ring.tell(UPDATE, os.fsencode(folder.absolute()))
        self._ring.ask(np.array([UPDATE]))
        message = self._ring.take("the teacher's update")
        assert message is not None, "the teacher ends when it is told to"
        with message:
            assert message.key == UPDATE, "rows were on their way"
            return message.array.tobytes().decode()

    def want(self, samples: np.ndarray) -> None:
        places = self._place(samples)
        self._cached.want(places[places >= 0])
        self._rows.want(samples[places < 0])

    def rows(self, sample: int) -> np.ndarray:
        (place,) = self._place(np.array([sample]))
        return self._rows.rows(sample) if place < 0 else self._cached.rows(int(place))

    def done(self, samples: np.ndarray) -> None:
        self._rows.done(samples)

    def _place(self, samples: np.ndarray) -> np.ndarray:
        known = self._places[np.minimum(samples, len(self._places) - 1)]
        return np.where(samples < len(self._places), known, -1)


def joined(
    prompt: np.ndarray, answer: np.ndarray, *, imitated: bool = False, written: np.ndarray | None = None
) -> SampleTokens:
    """A prompt and what was written to it, int32 [n], int32 [m]: the answer is supervised. Others: see SampleTokens."""
    ids = np.concatenate([prompt, answer]).astype(np.int32)
    return SampleTokens(ids, np.arange(len(ids)) >= len(prompt), imitated, written)
