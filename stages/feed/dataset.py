"""Dataset: samples of one or more plans under one running index, and the teachers whose rows they have.

    tables (ids, masks, splits) + teachers (head, rows from a RowSource) -> Packer

Nothing here knows a shard: a cache is one source of rows, and a data set without a teacher is trained on by
cross-entropy alone.
Invariant: all tables were made with one tokenizer; a teacher has rows for every sample of every table.
"""

# Shapes: N samples, n tokens of one of them.

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch

from kdpipe.manifests.cache import Cache, HeadArrays
from kdpipe.manifests.errors import CacheError
from kdpipe.manifests.prepared import Prepared
from kdpipe.manifests.row_source import CacheRows, RowSource
from kdpipe.manifests.sample import SampleTokens, is_heldout, is_in_subset
from kdpipe.manifests.samples import Samples
from kdpipe.manifests.teacher import HeadRecord


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Teacher:
    """A teacher as its students meet it: what makes logits of its rows, and where these come from.

    read_head: reads the lm_head, checked
    check_files: raises where tokenizer or template in `folder` are missing or not what was written
    folder: tokenizer.json and the chat template
    where: what an error about it names
    """

    record: HeadRecord
    rows: RowSource
    read_head: Callable[[], HeadArrays]
    check_files: Callable[[], None]
    vocabulary_digest: str
    folder: Path
    where: Path

    @property
    def dtype(self) -> torch.dtype:
        """Of its rows and its head."""
        found: torch.dtype = getattr(torch, self.record.dtype)
        return found


class Dataset:
    """Samples of some tables under one running index.

    teachers: () for cross-entropy alone
    vocab_size: ids that their tokenizer makes, where no teacher says how many
    """

    def __init__(
        self, tables: Sequence[Samples], teachers: Sequence[Teacher] = (), *, vocab_size: int | None = None
    ) -> None:
        self.tables, self.teachers, self.vocab_size = tuple(tables), tuple(teachers), vocab_size
        self._first = [0, *accumulate(table.plan.num_samples for table in tables)]
        self.num_tokens = np.concatenate([table.column("num_tokens") for table in tables]).astype(np.int64)
        self.num_supervised = np.concatenate([table.column("num_supervised") for table in tables]).astype(np.int64)

    def __len__(self) -> int:
        return len(self.num_tokens)

    def tokens(self, sample: int) -> SampleTokens:
        """Ids and mask of a sample."""
        which = bisect_right(self._first, sample) - 1
        return self.tables[which].tokens(sample - self._first[which])

    def table_of(self, samples: np.ndarray) -> np.ndarray:
        """Which table each sample is of."""
        return np.searchsorted(self._first, samples, side="right") - 1

    def without_teachers(self) -> "Dataset":
        """The same samples, whose rows nobody asks for."""
        return Dataset(self.tables, vocab_size=self.vocab_size)

    @property
    def plans(self) -> tuple[Prepared, ...]:
        return tuple(table.plan for table in self.tables)

    @property
    def names(self) -> str:
        """Where its tables lie, for messages."""
        return ", ".join(str(table.folder) for table in self.tables)

    @property
    def heldout_fraction(self) -> float:
        """The largest of the tables' own: a text that one of them holds out is held out of all."""
        return max(plan.heldout_fraction for plan in self.plans)

    def split(self, heldout_fraction: float | None, subset: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
        """(training, held-out) sample indices by one fraction for all tables, their own where none is given.

        subset: share of the training samples that are taken
        """
        fraction = self.heldout_fraction if heldout_fraction is None else heldout_fraction
        ids = np.concatenate([table.column("content_id") for table in self.tables])
        heldout = is_heldout(ids, fraction)
        return np.flatnonzero(~heldout & is_in_subset(ids, subset)), np.flatnonzero(heldout)


def of_caches(caches: Sequence[Cache]) -> Dataset:
    """The samples and rows of one or more caches of the same teacher.

    Raises IncompleteError or CorruptError for a cache that is not whole, CacheError for caches that do not go together.
    """
    for number, cache in enumerate(caches):
        cache.require_complete()
        cache.samples.verify()
        _require_one_teacher(cache, caches[0])
        for earlier in caches[:number]:
            _require_other_samples(cache, earlier)
    return Dataset([cache.samples for cache in caches], [_teacher(caches[0], CacheRows(caches))])


def of_plan(cache: Cache, rows: RowSource) -> Dataset:
    """The samples of a cache that may lack its rows, as they come from elsewhere."""
    cache.samples.verify()
    return Dataset([cache.samples], [_teacher(cache, rows)])


def _teacher(cache: Cache, rows: RowSource) -> Teacher:
    return Teacher(
        record=cache.plan.head,
        rows=rows,
        read_head=cache.head,
        check_files=cache.check_teacher_files,
        vocabulary_digest=cache.plan.vocabulary_digest,
        folder=cache.teacher_folder,
        where=cache.path,
    )


def _require_one_teacher(cache: Cache, first: Cache) -> None:
    ours, theirs = (
        {
            "teacher": one.plan.fingerprint.teacher[:12],
            "tokenizer": one.plan.fingerprint.tokenizer[:12],
            "dtype": one.plan.settings.dtype,
        }
        for one in (cache, first)
    )
    for field in ours:
        if ours[field] != theirs[field]:
            raise CacheError(
                f"its {field} is {ours[field]}, that of {first.path} is {theirs[field]}; "
                "caches trained on together must come from one teacher, in one dtype",
                where=cache.path,
            )


def _require_other_samples(cache: Cache, earlier: Cache) -> None:
    """A cache given twice would be twice the epoch that the user means, without a word."""
    ours, theirs = ({one.plan.digest, *(plan.plan for plan in one.plan.grown_from)} for one in (cache, earlier))
    if ours & theirs:
        raise CacheError(
            f"its samples are those of {earlier.path} again: the same cache, a copy, or one that grew from it; "
            "name each cache once",
            where=cache.path,
        )
