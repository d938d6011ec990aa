"""Calibrating: the teacher on some of a plan's samples before its first shard, and a codec fitted to their rows.

Which samples is a function of what the plan's first samples are, so that the same plan has the same codec again; their
order, by the digests of their texts, says nothing of them. Rows pass the gate as those of a shard do.
Cost: those samples a second time, and the fit (stages/codec/fit.py); their rows lie in a scratch file meanwhile.
"""

import time
from pathlib import Path

import numpy as np
import torch

from kdpipe.manifests.cache import HEAD_FILE
from kdpipe.manifests.durable import scratch_folder
from kdpipe.manifests.failpoints import failpoint
from kdpipe.manifests.fitted import Choice, Fitted
from kdpipe.manifests.plan import Plan
from kdpipe.manifests.progress import Progress
from kdpipe.manifests.samples import Samples
from kdpipe.manifests.tensorfile import DTYPES, TAGS
from kdpipe.stages.codec.fit import fit, wanted_rows
from kdpipe.stages.extract.requests import text_batches
from kdpipe.stages.extract.shelf import ScratchShelf
from kdpipe.stages.extract.teach import teach
from kdpipe.stages.models.head import Head
from kdpipe.stages.teacher.engine import TeacherEngine
from kdpipe.stages.teacher.gate import admit


def calibrate(
    plan: Plan, samples: Samples, head: Head, engine: TeacherEngine, progress: Progress, *, scratch: Path
) -> Fitted:
    """The codec that a plan asks for.

    samples: those of the plan; scratch: a folder for the teacher's rows, which the next run sweeps
    Raises ConfigError, and as teach.
    """
    started = time.perf_counter()
    width = plan.head.hidden_size
    texts = [samples.tokens(index) for index in chosen(samples, wanted_rows(width))]
    progress.begin("calibrate", total=sum(len(text.token_ids) for text in texts), unit="tokens")
    with scratch_folder(scratch, "calibrate") as folder:
        (folder / "rows").touch()
        dtype = DTYPES[TAGS[plan.settings.dtype]]
        shelf = ScratchShelf(folder / "rows", width, dtype, doing="calibration")
        batches = text_batches(
            texts,
            shelf.place,
            probe_every=engine.probe_every,
            batch_tokens=plan.engine.batch_tokens,
            every_row=plan.settings.rows == "all",
            vocab_size=plan.head.vocab_size,
        )
        teach(engine, batches, shelf, admit, progress)
        failpoint("codec:taught")
        progress.end()
        rows = np.fromfile(folder / "rows", dtype, shelf.num_rows * width).reshape(-1, width)
    return fit_to(plan, rows, head, progress, started)


def fit_to(plan: Plan, rows: np.ndarray, head: Head, progress: Progress, started: float) -> Fitted:
    """The codec that a plan asks for, fitted to rows in the order of `chosen`. started: when that began"""
    choice = Choice.read(plan.settings.codec)
    progress.note(f"fitting {choice}, and measuring it, on {len(rows):,} rows")
    fitted = fit(
        choice,
        rows,
        head,
        vocab_size=plan.head.vocab_size,
        head_digest=plan.teacher_files[HEAD_FILE],
        device=torch.device("cpu"),
    )
    record, seconds = fitted.record, time.perf_counter() - started
    progress.event("codec", **record.model_dump(), seconds=seconds)
    progress.note(
        f"{choice}: {record.share:.3f} of the bytes, mean KL {record.kl_mean:.2g}, 99th percentile "
        f"{record.kl_p99:.2g}, on {record.test_rows:,} rows it was not fitted to; {seconds:.0f} s"
    )
    if fitted.is_of_few:
        progress.note(few_rows(fitted))
    return fitted


def few_rows(fitted: Fitted) -> str:
    """What to expect of samples that come later."""
    return (
        f"the codec was fitted to {fitted.record.fit_rows:,} rows, which is few: those of samples that are added may "
        "take more and lose more than it says; kdpipe cache verify --recompute 20 measures that"
    )


def chosen(samples: Samples, num_rows: int) -> list[int]:
    """Samples with so many rows together, all where they have no more, by the digests of their texts."""
    ids = samples.column("content_id")
    order = np.lexsort(ids.T)  # the last byte first: no order of the data, and not that of the held-out split
    order = order[samples.column("num_rows")[order] > 0]
    enough = int(np.searchsorted(np.cumsum(samples.column("num_rows")[order]), num_rows)) + 1
    return order[:enough].tolist()
