"""Beside: a training whose rows come from a teacher at work, as the trainer meets it: a data set like any other."""

from dataclasses import replace

import numpy as np

from kdpipe.manifests.cache import Cache
from kdpipe.manifests.errors import StudentError
from kdpipe.manifests.progress import Progress
from kdpipe.manifests.ring import RingReader
from kdpipe.manifests.row_source import JoinedRows, RingRows, RowSource
from kdpipe.manifests.sample import SampleTokens
from kdpipe.manifests.shard import DTYPES, TAGS
from kdpipe.stages.align import cross
from kdpipe.stages.feed.dataset import of_plan
from kdpipe.stages.models.folder import ModelFolder
from kdpipe.stages.train.training import SILENT, Found, Training, asked_across, run_inputs


class NoRows:
    """Where a training is looked at before there is a teacher: nothing is asked for."""

    waited_s = 0.0

    def tell(self, index: int, text: SampleTokens) -> None:
        raise AssertionError("nobody is there to tell")

    def want(self, samples: np.ndarray) -> None:
        raise AssertionError("no rows are read before the run")

    def rows(self, sample: int) -> np.ndarray:
        raise AssertionError("no rows are read before the run")

    def done(self, samples: np.ndarray) -> None:
        raise AssertionError("no rows are read before the run")


def find_beside(training: Training, *, kept: bool = False, prompts: bool = False, progress: Progress = SILENT) -> Found:
    """What a training names, opened before there is a teacher; training.caches is the folder of the plan alone.

    Its data, where it has any, are aligned with the plan's for a student with another tokenizer.
    kept: the rows will be there when the run has ended
    prompts: records without an answer are samples too
    """
    (folder,) = training.caches
    plan, model = Cache.open(folder), ModelFolder(training.student, StudentError, training.trust)
    dataset, crossing = of_plan(plan, NoRows()), None
    if training.data:
        asked = replace(asked_across(training), prompts=prompts)
        crossing = cross(model, dataset, [plan], asked, progress)
        dataset = dataset if crossing is None else crossing.dataset
    inputs = training.inputs or run_inputs(training, model, dataset, crossing)
    return Found(
        model=model, dataset=dataset, inputs=inputs, notes=dataset.notes, rows_are_kept=kept, crossing=crossing
    )


def fed_by(ring: RingReader, found: Found) -> Found:
    """The same with the rows of a teacher at work."""
    (teacher,) = found.dataset.teachers
    rows: RowSource = RingRows(ring, width=teacher.record.hidden_size, dtype=DTYPES[TAGS[teacher.record.dtype]])
    if teacher.beside is not None:
        rows = JoinedRows(rows, teacher.beside.spans.places)
    return replace(found, dataset=found.dataset.with_teachers([replace(teacher, rows=rows)]))
