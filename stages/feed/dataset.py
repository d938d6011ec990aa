"""Dataset: samples of one or more plans under one running index, and the teachers whose rows they have.

    tables (ids, masks, splits) + teachers (head, rows from a RowSource) -> Packer

Nothing here knows a shard: a cache is one source of rows, and a data set without a teacher is trained on by
cross-entropy alone. Several teachers teach the same samples together, or each those of its own caches.
Invariant: all tables were made with one tokenizer; whoever teaches a sample that `split` gives has its rows.
"""

# Shapes: N samples, n tokens of one of them.

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kdpipe.manifests.aligned import SpanTable
from kdpipe.manifests.cache import Cache, HeadArrays
from kdpipe.manifests.errors import CacheError, ConfigError
from kdpipe.manifests.fitted import Fitted, FittedCodec, loss_of
from kdpipe.manifests.prepared import Prepared
from kdpipe.manifests.row_source import CacheRows, JoinedRows, RowSource
from kdpipe.manifests.sample import SampleTokens, is_heldout, is_in_subset
from kdpipe.manifests.samples import Samples
from kdpipe.manifests.specs import LossSpec, Unmatched
from kdpipe.manifests.teacher import HeadRecord
from kdpipe.stages.feed.join import Joined

ONE_TEACHER = LossSpec()
TEACHER_MIX = (
    "loss.teacher_mix says what several teachers are to a student: distributions or losses, for the same samples of "
    "all, or route, each for those of its own caches"
)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Teacher:
    """A teacher as its students meet it: what makes logits of its rows, and where these come from.

    read_head: reads the lm_head, checked
    check_files: raises where tokenizer or template in `folder` are missing or not what was written
    weight: beside other teachers of the same samples, whatever the sum of all
    beside: which rows stand for the same text where its tokenizer is not that of the data set; None where it is
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
    weight: float = 1.0
    beside: "Beside | None" = None

    @property
    def fitted(self) -> Fitted | None:
        """What its rows are stored by, where they travel as they are stored; None where they come as rows."""
        return getattr(self.rows, "fitted", None)

    @property
    def codec(self) -> FittedCodec | None:
        """The same without its record."""
        return None if self.fitted is None else self.fitted.codec

    @property
    def dtype(self) -> torch.dtype:
        """Of its rows and its head."""
        found: torch.dtype = getattr(torch, self.record.dtype)
        return found

    @property
    def carried_as(self) -> torch.dtype:
        """Of its rows in a batch: float32 of a side-car as integers of the same bits.

        A sharded student casts the floats that it is given to the dtype of its pass, and bfloat16 has few token ids.
        """
        is_cast = self.record.sidecar is not None and self.dtype == torch.float32
        return torch.int32 if is_cast else self.dtype


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Beside:
    """The texts of a teacher with another tokenizer, beside those of a data set.

    spans: of each sample, with its place among the teacher's own
    tokens: ids and mask of one of the teacher's own samples
    """

    spans: SpanTable
    tokens: Callable[[int], SampleTokens]

    def text(self, sample: int) -> SampleTokens:
        """The teacher's own sample of the same record."""
        return self.tokens(int(self.spans.places[sample]))

    def runs(self, sample: int) -> np.ndarray:
        """Its spans, int32 [K, 4]."""
        return self.spans.of(sample)

    def targets(self, sample: int) -> np.ndarray:
        """The tokens that the teacher's rows of a sample predict, int32 [P]."""
        text = self.text(sample)
        return text.token_ids[1:][text.supervised[1:]]


class Dataset:
    """Samples of some tables under one running index.

    teachers: () for cross-entropy alone
    vocab_size: ids that their tokenizer makes, where no teacher of that tokenizer says how many
    taught_by: the number of each sample's teacher, int64 [N], where each has one; None where every teacher has all
    usable: bool [N], the samples that `split` may give; None for all
    plans: of everything that it is made of, in the order in which it was named; those of the tables when not given
    sources: the number of the plan that each sample is of, int64 [N]; of its table when not given
    notes: what the user should know of it, a line each
    """

    def __init__(
        self,
        tables: Sequence[Samples],
        teachers: Sequence[Teacher] = (),
        *,
        vocab_size: int | None = None,
        taught_by: np.ndarray | None = None,
        usable: np.ndarray | None = None,
        plans: Sequence[Prepared] = (),
        sources: np.ndarray | None = None,
        notes: Sequence[str] = (),
    ) -> None:
        self.tables, self.teachers, self.vocab_size = tuple(tables), tuple(teachers), vocab_size
        self.taught_by, self.usable, self.notes = taught_by, usable, tuple(notes)
        self.plans = tuple(plans) or tuple(table.plan for table in tables)
        self._sources = sources
        self._first = [0, *accumulate(table.plan.num_samples for table in tables)]
        self.num_tokens = np.concatenate([table.column("num_tokens") for table in tables]).astype(np.int64)
        self.num_supervised = np.concatenate([table.column("num_supervised") for table in tables]).astype(np.int64)

    def __len__(self) -> int:
        return len(self.num_tokens)

    def tokens(self, sample: int) -> SampleTokens:
        """Ids and mask of a sample."""
        which = bisect_right(self._first, sample) - 1
        return self.tables[which].tokens(sample - self._first[which])

    def source_of(self, samples: np.ndarray) -> np.ndarray:
        """Which plan each sample is of."""
        if self._sources is not None:
            return self._sources[samples]
        return np.searchsorted(self._first, samples, side="right") - 1

    def with_teachers(self, teachers: Sequence[Teacher]) -> "Dataset":
        """The same samples, with rows from elsewhere."""
        return Dataset(self.tables, teachers, taught_by=self.taught_by, **self.of_samples)

    def without_teachers(self) -> "Dataset":
        """The same samples, whose rows nobody asks for."""
        return Dataset(self.tables, **self.of_samples)

    def only(self, usable: np.ndarray, note: str) -> "Dataset":
        """The same, of which some samples alone are given, bool [N]; note: why the others are not."""
        usable = usable if self.usable is None else usable & self.usable
        changed = self.of_samples | {"usable": usable, "notes": (*self.notes, note)}
        return Dataset(self.tables, self.teachers, taught_by=self.taught_by, **changed)

    @property
    def of_samples(self) -> dict[str, Any]:
        """What it was made with beside tables and teachers."""
        return {
            "vocab_size": self.vocab_size,
            "usable": self.usable,
            "plans": self.plans,
            "sources": self._sources,
            "notes": self.notes,
        }

    @property
    def names(self) -> str:
        """Where its tables lie, for messages."""
        return ", ".join(str(table.folder) for table in self.tables)

    @property
    def heldout_fraction(self) -> float:
        """The largest of the plans' own: a text that one of them holds out is held out of all."""
        return max(plan.heldout_fraction for plan in self.plans)

    def split(self, heldout_fraction: float | None, subset: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
        """(training, held-out) sample indices by one fraction for all tables, their own where none is given.

        subset: share of the training samples that are taken
        """
        fraction = self.heldout_fraction if heldout_fraction is None else heldout_fraction
        ids = np.concatenate([table.column("content_id") for table in self.tables])
        heldout = is_heldout(ids, fraction)
        usable = np.ones(len(ids), dtype=bool) if self.usable is None else self.usable
        return np.flatnonzero(~heldout & is_in_subset(ids, subset) & usable), np.flatnonzero(heldout & usable)


def of_caches(caches: Sequence[Cache], loss: LossSpec = ONE_TEACHER, *, unmatched: Unmatched = "refuse") -> Dataset:
    """The samples and rows of one or more caches: of one teacher, or of several where the loss says what they are.

    unmatched: what becomes of samples that not all teachers have, where all are to teach the same ones
    Raises IncompleteError or CorruptError for a cache that is not whole, CacheError for caches that do not go together,
    ConfigError for a loss that is not for these teachers.
    """
    groups = list(by_teacher(caches).values())
    for number, cache in enumerate(caches):
        cache.require_complete()
        cache.samples.verify()
        for earlier in caches[:number]:
            _require_other_samples(cache, earlier)
    if len(groups) > 1 and loss.teacher_mix is None:
        _require_agreement(groups[1][0], groups[0][0], ("teacher",), TEACHER_MIX)
    for group in groups:
        _require_agreement(group[0], groups[0][0], ("vocabulary",), "a student has one tokenizer for all its teachers")
        for cache in group[1:]:
            _require_agreement(cache, group[0], ("tokenizer", "dtype"), "caches of one teacher must agree in it")
    _require_for(loss, len(groups))
    if len(groups) == 1:
        teachers = [_teacher(caches[0], CacheRows(caches))]
        return Dataset([cache.samples for cache in caches], teachers, notes=[*_losses(caches)])
    return _routed(caches, groups) if loss.teacher_mix == "route" else _together(caches, groups, loss, unmatched)


def beside(dataset: Dataset, table: Samples, spans: SpanTable, *, vocab_size: int, notes: Sequence[str]) -> Dataset:
    """The samples of another tokenizer, with the rows of a data set's only teacher that stand for the same texts.

    vocab_size: ids that the other tokenizer makes
    """
    (teacher,) = dataset.teachers
    text = Beside(spans=spans, tokens=dataset.tokens)
    joined = replace(teacher, rows=JoinedRows(teacher.rows, spans.places), beside=text)
    return Dataset(
        [table],
        [joined],
        vocab_size=vocab_size,
        plans=dataset.plans,
        sources=dataset.source_of(spans.places),
        notes=(*dataset.notes, *notes),
    )


def by_teacher(caches: Sequence[Cache]) -> dict[str, list[Cache]]:
    """The caches of each teacher by its digest, in the order in which they are named."""
    groups: dict[str, list[Cache]] = {}
    for cache in caches:
        groups.setdefault(cache.plan.fingerprint.teacher, []).append(cache)
    return groups


def _routed(caches: Sequence[Cache], groups: Sequence[Sequence[Cache]]) -> Dataset:
    """All samples of all caches, each with the teacher of its cache."""
    number_of = {id(cache): number for number, group in enumerate(groups) for cache in group}
    taught_by = np.repeat([number_of[id(cache)] for cache in caches], [len(cache) for cache in caches])
    teachers = []
    for number, group in enumerate(groups):
        mine = taught_by == number
        places = np.where(mine, np.cumsum(mine) - 1, -1)
        teachers.append(_teacher(group[0], JoinedRows(CacheRows(group), places)))
    return Dataset([cache.samples for cache in caches], teachers, taught_by=taught_by, notes=[*_losses(caches)])


def _losses(caches: Sequence[Cache]) -> Iterator[str]:
    """What is not the teacher's own, a line for each cache of coded rows."""
    for cache in caches:
        if (loss := loss_of(cache.path, cache.plan)) is not None:
            whose = "it was made of rows that were" if cache.plan.head.sidecar is not None else "its rows are"
            yield f"{cache.path}: {whose} coded, a mean KL of {loss:.2g} nats from the teacher's own"


def _together(
    caches: Sequence[Cache], groups: Sequence[Sequence[Cache]], loss: LossSpec, unmatched: Unmatched
) -> Dataset:
    """The samples of the first teacher's caches, with the rows of every teacher. Raises CacheError."""
    tables = [cache.samples for cache in groups[0]]
    weights = loss.teacher_weights or (1.0,) * len(groups)
    teachers = [_teacher(groups[0][0], CacheRows(groups[0]), weights[0])]
    usable, notes = np.ones(sum(len(cache) for cache in groups[0]), dtype=bool), []
    for group, weight in zip(groups[1:], weights[1:], strict=True):
        joined = Joined(tables, [cache.samples for cache in group])
        if (problem := joined.problem()) is not None:
            if unmatched == "refuse":
                raise CacheError(
                    f"{problem}; teachers of the same samples must have rows for all of them: extract the missing ones "
                    "with the other teacher too, or leave them out with cache.unmatched=leave_out",
                    where=group[0].path,
                )
            notes.append(f"left out: {problem}")
        usable &= joined.places >= 0
        teachers.append(_teacher(group[0], JoinedRows(CacheRows(group), joined.places), weight))
    if not usable.any():
        raise CacheError("its teacher has none of the samples of the others", where=groups[-1][0].path)
    plans = [cache.plan for cache in caches]
    return Dataset(tables, teachers, usable=usable if notes else None, plans=plans, notes=[*notes, *_losses(caches)])


def of_plan(cache: Cache, rows: RowSource) -> Dataset:
    """The samples of a cache that may lack its rows, as they come from elsewhere."""
    cache.samples.verify()
    return Dataset([cache.samples], [_teacher(cache, rows)])


def _teacher(cache: Cache, rows: RowSource, weight: float = 1.0) -> Teacher:
    return Teacher(
        record=cache.plan.head,
        rows=rows,
        read_head=cache.head,
        check_files=cache.check_teacher_files,
        vocabulary_digest=cache.plan.vocabulary_digest,
        folder=cache.teacher_folder,
        where=cache.path,
        weight=weight,
    )


def _require_agreement(cache: Cache, first: Cache, fields: Sequence[str], way: str) -> None:
    ours, theirs = (
        {
            "teacher": one.plan.fingerprint.teacher[:12],
            "vocabulary": one.plan.vocabulary_digest[:12],
            "tokenizer": one.plan.fingerprint.tokenizer[:12],
            "dtype": one.plan.settings.dtype,
        }
        for one in (cache, first)
    )
    for field in fields:
        if ours[field] != theirs[field]:
            raise CacheError(
                f"its {field} is {ours[field]}, that of {first.path} is {theirs[field]}; {way}", where=cache.path
            )


def _require_for(loss: LossSpec, num_teachers: int) -> None:
    """The loss says of several teachers what several teachers need. Raises ConfigError."""
    mix, weights = loss.teacher_mix, loss.teacher_weights
    if num_teachers == 1 and (mix is not None or weights):
        key = "weights" if mix is None else "mix"
        raise ConfigError("all caches are of one teacher; leave it out", where=f"loss.teacher_{key}")
    if weights and mix == "route":
        raise ConfigError(
            "under route a sample has one teacher; cache.weights says how much of each cache an epoch takes",
            where="loss.teacher_weights",
        )
    if weights and len(weights) != num_teachers:
        raise ConfigError(
            f"{len(weights)} weights, the caches are of {num_teachers} teachers; give one each, in the order in which "
            "cache.path names them first",
            where="loss.teacher_weights",
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
