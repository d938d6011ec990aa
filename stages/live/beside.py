"""Beside: a training whose rows come from a teacher at work, as the trainer meets it: a data set like any other."""

from dataclasses import replace

import numpy as np

from kdpipe.manifests.cache import Cache
from kdpipe.manifests.errors import StudentError
from kdpipe.manifests.ring import RingReader
from kdpipe.manifests.row_source import RingRows
from kdpipe.manifests.sample import SampleTokens
from kdpipe.manifests.shard import DTYPES, TAGS
from kdpipe.stages.feed.dataset import Dataset, of_plan
from kdpipe.stages.models.folder import ModelFolder
from kdpipe.stages.train.training import Found, Training, run_inputs


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


def find_beside(training: Training, *, kept: bool = False) -> Found:
    """What a training names, opened before there is a teacher; training.caches is the folder of the plan alone.

    kept: the rows will be there when the run has ended
    """
    (folder,) = training.caches
    dataset, model = of_plan(Cache.open(folder), NoRows()), ModelFolder(training.student, StudentError, training.trust)
    inputs = training.inputs or run_inputs(training, model, dataset)
    return Found(model=model, dataset=dataset, inputs=inputs, rows_are_kept=kept)


def fed_by(ring: RingReader, found: Found) -> Found:
    """The same with the rows of a teacher at work."""
    (teacher,) = found.dataset.teachers
    rows = RingRows(ring, width=teacher.record.hidden_size, dtype=DTYPES[TAGS[teacher.record.dtype]])
    return replace(found, dataset=Dataset(found.dataset.tables, [replace(teacher, rows=rows)]))
