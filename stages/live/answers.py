"""Answers: the data set of a student that writes answers of its own, and where their teacher's rows come from.

    planned samples: 0 .. N-1, as they were read      answers: from N on, added when written, dropped when trained on

A teacher with another tokenizer is told of the answer's text in tokens of its own (align/retelling.py).
Invariant: an index means one text in a run, whatever the number of ranks.
"""

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np

from kdpipe.manifests.ring import RingReader
from kdpipe.manifests.row_source import CacheRows, RingRows, RowSource
from kdpipe.manifests.sample import SampleTokens, prompt_of
from kdpipe.stages.align import Retelling, Retold
from kdpipe.stages.feed.dataset import Beside, Dataset
from kdpipe.stages.rollout.writer import Answer

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
    retelling: for a teacher with another tokenizer
    """

    def __init__(self, planned: Dataset, rows: ToldRows, retelling: Retelling | None = None) -> None:
        self._texts, self._retold = dict[int, SampleTokens](), dict[int, Retold]()
        (teacher,) = planned.teachers
        if (beside := teacher.beside) is not None:
            rows = RowsBeside(rows, beside.spans.places, planned.plans[0].num_samples)
            beside = RetoldBeside(spans=beside.spans, tokens=beside.tokens, retold=self._retold)
        super().__init__(planned.tables, [replace(teacher, rows=rows, beside=beside)], **planned.of_samples)
        self._rows, self._retelling = rows, retelling

    def tokens(self, sample: int) -> SampleTokens:
        return self._texts[sample] if sample >= len(self) else super().tokens(sample)

    def prompt(self, sample: int) -> np.ndarray:
        """What is answered anew of a planned sample, int32 [n], a view."""
        return prompt_of(self.tokens(sample))

    def add(
        self, index: int, sample: int, answer: Answer, *, imitated: bool = False, written: np.ndarray | None = None
    ) -> None:
        """An answer to the prompt of a planned sample; its teacher is told of it. Others: see SampleTokens."""
        told = joined(self.prompt(sample), answer.token_ids, imitated=imitated, written=written)
        self._texts[index] = told
        if self._retelling is not None:
            (teacher,) = self.teachers
            assert teacher.beside is not None, "it has another tokenizer"
            prompt = prompt_of(teacher.beside.text(sample))
            self._retold[index] = retold = self._retelling.told(prompt, answer.token_ids, ended=answer.ended)
            told = retold.text
        self._rows.tell(index, told)

    def has(self, index: int) -> bool:
        """Whether this answer was added, and not dropped."""
        return index in self._texts

    def num_aligned(self, index: int) -> int | None:
        """How many of an answer's tokens stand for text of its teacher's; None where both have one tokenizer."""
        return int(self._retold[index].spans[:, 1].sum()) if index in self._retold else None

    @property
    def waited_s(self) -> float:
        return self._rows.waited_s

    def drop(self, indices: Iterable[int]) -> None:
        for index in indices:
            self._texts.pop(index, None)
            self._retold.pop(index, None)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class RetoldBeside(Beside):
    """As Beside, and of answers by their indices."""

    retold: Mapping[int, Retold]

    def text(self, sample: int) -> SampleTokens:
        return self.retold[sample].text if sample in self.retold else Beside.text(self, sample)

    def runs(self, sample: int) -> np.ndarray:
        return self.retold[sample].spans if sample in self.retold else Beside.runs(self, sample)


class RowsBeside:
    """Rows under the running index of a student with another tokenizer, whose samples are others than its teacher's.

    places: int64 [N], which of the teacher's each of the student's is; num_theirs: how many the teacher has
    """

    def __init__(self, source: ToldRows, places: np.ndarray, num_theirs: int) -> None:
        self._source, self._places, self._beyond = source, places, num_theirs - len(places)

    @property
    def waited_s(self) -> float:
        return self._source.waited_s

    def tell(self, index: int, text: SampleTokens) -> None:
        self._source.tell(self._key(index), text)

    def want(self, samples: np.ndarray) -> None:
        self._source.want(self._keys(samples))

    def rows(self, sample: int) -> np.ndarray:
        return self._source.rows(self._key(sample))

    def done(self, samples: np.ndarray) -> None:
        self._source.done(self._keys(samples))

    def _key(self, sample: int) -> int:
        return int(self._keys(np.array([sample]))[0])

    def _keys(self, samples: np.ndarray) -> np.ndarray:
        """Answers stay behind the planned samples, of which the teacher may have more."""
        known = self._places[np.minimum(samples, len(self._places) - 1)]
        return np.where(samples < len(self._places), known, samples + self._beyond)


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
