"""Beside: a training job whose rows come from a teacher at work, as the trainer meets it: a data set like any other."""

import numpy as np

from kdpipe.manifests.cache import Cache
from kdpipe.manifests.errors import StudentError
from kdpipe.manifests.ring import RingReader
from kdpipe.manifests.row_source import RingRows, RowSource
from kdpipe.manifests.shard import DTYPES, TAGS
from kdpipe.stages.feed.dataset import of_plan
from kdpipe.stages.models.folder import ModelFolder
from kdpipe.stages.train.job import Found, TrainJob, run_inputs


class NoRows:
    """Where a job is looked at before there is a teacher: nothing is asked for."""

    def want(self, samples: np.ndarray) -> None:
        raise AssertionError("no rows are read before the run")

    def rows(self, sample: int) -> np.ndarray:
        raise AssertionError("no rows are read before the run")

    def done(self, samples: np.ndarray) -> None:
        raise AssertionError("no rows are read before the run")


def find_beside(job: TrainJob, ring: RingReader | None = None, *, kept: bool = False) -> Found:
    """What a job names, opened; job.caches is the folder of the plan alone.

    ring: that of this rank; None before there is a teacher
    kept: the rows will be there when the run has ended
    """
    (folder,) = job.caches
    cache = Cache.open(folder)
    rows: RowSource = NoRows()
    if ring is not None:
        head = cache.plan.head
        rows = RingRows(ring, width=head.hidden_size, dtype=DTYPES[TAGS[head.dtype]])
    dataset, model = of_plan(cache, rows), ModelFolder(job.student, StudentError, job.trust)
    inputs = job.inputs or run_inputs(job, model, dataset)
    return Found(model=model, dataset=dataset, inputs=inputs, rows_are_kept=kept)
