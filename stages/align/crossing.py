"""Crossing: a data set of caches, met by a student with a tokenizer of its own.

    of_caches -> is its tokenizer the teacher's? -> no: the data, aligned -> a data set of the student's own samples

Both training and evaluation ask here, so that a student is measured on what it would be trained on.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from kdpipe.manifests.cache import Cache
from kdpipe.manifests.errors import ConfigError, StudentError
from kdpipe.manifests.progress import Progress
from kdpipe.manifests.specs import DataSpec
from kdpipe.stages.align.aligned import Aligned, align, notes_of
from kdpipe.stages.align.joining import cache_tokenizer
from kdpipe.stages.extract.reading import Reading
from kdpipe.stages.feed.dataset import Dataset, beside
from kdpipe.stages.models.context import context_of
from kdpipe.stages.models.folder import ModelFolder
from kdpipe.stages.student.across import method_of
from kdpipe.stages.student.check import check_student, own_vocab_size, tokenizer_difference


@dataclass(frozen=True, kw_only=True, eq=False)
class Crossing:
    """A data set of the student's own samples, and how they were aligned with the teacher's."""

    dataset: Dataset
    aligned: Aligned
    method: str
    cache: Cache

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The teacher's."""
        return cache_tokenizer(self.cache)


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """What is asked of a student whose tokenizer is not its teacher's.

    data: files and folders that the caches were made of
    spec: how they become samples: max_length in the student's tokens, that of the caches when not given
    align: student.align; floor: student.align_floor
    places: folders for the aligned samples, the first that can be written to; the first cache's when not given
    prompts: records without an answer are samples too
    """

    data: tuple[Path, ...] = ()
    spec: DataSpec = field(default_factory=DataSpec)
    align: str = "auto"
    floor: float = 0.0
    workers: int | None = None
    places: tuple[Path, ...] = ()
    prompts: bool = False


def cross(
    model: ModelFolder, dataset: Dataset, caches: Sequence[Cache], asked: Asked, progress: Progress
) -> Crossing | None:
    """The student's samples beside those of the caches; None where its tokenizer is the teacher's.

    Raises StudentError where there are no data to align, ConfigError where less than the floor is, for several teachers
    and for align = "none", what align raises.
    """
    difference = next(filter(None, (tokenizer_difference(model, teacher) for teacher in dataset.teachers)), "")
    if not difference:
        return None
    where = dataset.teachers[0].where
    method = method_of(asked.align)
    if len(dataset.teachers) > 1:
        raise ConfigError(
            f"{model.path} has another tokenizer than its teachers ({difference}); texts are aligned with those of "
            "one teacher: name caches of one",
            where="cache.path",
        )
    if not asked.data:
        raise StudentError(
            f"its tokenizer is not that of {where}: {difference}; give the data that the cache was made of too "
            "(--data), so that its texts are aligned with the teacher's",
            where=model.path,
        )
    check_student(model)  # before the data are read
    settings, vocab_size = caches[0].plan.settings, own_vocab_size(model)
    spec = asked.spec.model_copy(
        update={
            "overlong": settings.overlong,
            "supervise": settings.supervise,
            "max_length": asked.spec.max_length if "max_length" in asked.spec.model_fields_set else settings.max_length,
        }
    )
    reading = Reading(
        data=asked.data,
        spec=spec,
        model=model,
        who="student",
        context=context_of(model.config),
        workers=asked.workers,
        prompts=asked.prompts,
    )
    aligned = align(reading, caches, progress, vocab_size=vocab_size, places=asked.places or (caches[0].path,))
    figures = aligned.record.figures
    if figures.num_bytes and figures.share_of_bytes < asked.floor:
        raise ConfigError(
            f"{figures.share_of_bytes:.1%} of the supervised bytes are aligned with {where} ({figures.aligned_bytes:,} "
            f"of {figures.num_bytes:,}), less than {asked.floor:.1%}: do the two chat templates show the same answers? "
            "A lower floor takes it as it is",
            where="student.align_floor",
        )
    notes = tuple(notes_of(aligned))
    crossed = beside(dataset, aligned.table, aligned.spans, vocab_size=vocab_size, notes=notes)
    return Crossing(dataset=crossed, aligned=aligned, method=method, cache=caches[0])
