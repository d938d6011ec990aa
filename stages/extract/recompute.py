"""Recomputing: the teacher again on some samples of a finished cache, beside the rows that it holds.

What is run are whole planned batches, because the company a sample has in its batch changes the last bits of its rows.
Invariant: nothing is written to the cache. Cost: the teacher's start, and the batches of the chosen samples.
"""

import hashlib
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from kdpipe.manifests.cache import Cache
from kdpipe.manifests.codec import as_stored
from kdpipe.manifests.compare import TOLERANCE, row_distance
from kdpipe.manifests.engine import EngineOptions
from kdpipe.manifests.errors import TeacherError
from kdpipe.manifests.fitted import Choice, codec_of, open_fitted
from kdpipe.manifests.progress import Progress
from kdpipe.manifests.specs import Device
from kdpipe.manifests.tensorfile import DTYPES, TAGS
from kdpipe.stages.codec.metric import Lens
from kdpipe.stages.extract.requests import shard_requests
from kdpipe.stages.extract.shelf import ScratchShelf
from kdpipe.stages.extract.teach import teach
from kdpipe.stages.models.device import pick_device
from kdpipe.stages.models.folder import ModelFolder
from kdpipe.stages.models.head import loaded_head
from kdpipe.stages.rows import as_tensor
from kdpipe.stages.teacher import engine_class
from kdpipe.stages.teacher.engine import Request
from kdpipe.stages.teacher.gate import admit

ROUNDING_KL = {"float32": 1e-4, "float16": 0.005, "bfloat16": 0.05}
"""Mean KL of a sample's rows, in nats, that another machine, batch or engine may make; measured in bfloat16 between
SGLang and transformers: 0.0013. Another token's row is at several nats."""
SHIFT_KL = {"float32": 2e-5, "float16": 0.001, "bfloat16": 0.01}
"""The same of all rows that are looked at, of which none counts for much."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Recomputed:
    """How far the teacher's answer of now is from the cache's; distances are |a - b| / |a| of whole rows, and under a
    fitted codec the mean KL of a sample's rows, in nats.

    rows_equal: share of the rows that are the same bit for bit, as they would be stored now
    worst_sample: where the worst is; None where no two rows differ
    bound: what another machine or number of threads may change
    shift, shift_bound: under a fitted codec the mean KL of all rows, as they would be stored now, to those stored, and
        how large it may be; None for others
    """

    num_samples: int
    num_rows: int
    rows_equal: float
    worst_distance: float
    worst_sample: int | None
    bound: float
    shift: float | None
    shift_bound: float | None

    @property
    def is_near(self) -> bool:
        """Whether all of it is within its bounds."""
        return self.worst_distance <= self.bound and not self.is_shifted

    @property
    def is_shifted(self) -> bool:
        """Whether rows are not the teacher's, each by little."""
        return self.shift is not None and self.shift_bound is not None and not self.shift <= self.shift_bound


def recompute(
    cache: Cache, teacher: Path, count: int, progress: Progress, *, options: EngineOptions | None = None
) -> Recomputed:
    """Run the teacher on `count` samples of a complete cache, chosen by its plan's digest, and on their batches.

    Raises TeacherError where it is another teacher, GateError for rows that are not what was asked for, and the errors
    of reading and of the engine.
    """
    cache.require_complete()
    plan = cache.plan
    options = options or EngineOptions()
    folder = ModelFolder(teacher, TeacherError, options.trust)
    found = folder.digest()
    if found != plan.fingerprint.teacher:
        raise TeacherError(
            f"its digest is {found[:12]}, the cache was made by {plan.fingerprint.teacher[:12]}; give the teacher it "
            "was made by",
            where=teacher,
        )
    device: Device = "cuda" if plan.engine.device == pick_device("auto").type == "cuda" else "cpu"
    if device != plan.engine.device:
        progress.note(f"the cache was made on {plan.engine.device}, this is {device}: last bits will differ")
    engine = engine_class(plan.engine.name)(
        folder, dtype=plan.settings.dtype, device=device, options=options.like(plan.engine.arguments)
    )
    with tempfile.NamedTemporaryFile(prefix="kdpipe-recompute-") as file:
        shelf = ScratchShelf(Path(file.name), plan.head.hidden_size, DTYPES[TAGS[plan.settings.dtype]])
        try:
            batches = _batches(cache, choose(cache, count), engine.probe_every, shelf)
            total = sum(len(request.token_ids) for batch in batches for request in batch)
            progress.begin("recompute", total=total, unit="tokens")
            teach(engine, batches, shelf, admit, progress)
            progress.end()
        finally:
            engine.close()
        return _compared(cache, shelf.requests)


def choose(cache: Cache, count: int) -> list[int]:
    """`count` samples that have rows, by a hash of the plan's digest and their number; all where there are fewer."""
    rows = np.flatnonzero(cache.samples.column("num_rows")).tolist()
    digest = cache.plan.digest
    return sorted(sorted(rows, key=lambda one: hashlib.sha256(f"{digest} {one}".encode()).digest())[:count])


def _batches(cache: Cache, samples: Sequence[int], probe_every: int, shelf: ScratchShelf) -> list[list[Request]]:
    """The planned batches in which the samples ran."""
    wanted, chosen = set(samples), []
    for number in sorted({cache.plan.shards.find(sample) for sample in samples}):
        batches = shard_requests(cache, number, probe_every, shelf.place)
        chosen += [batch for batch in batches if wanted & {request.sample for request in batch}]
    return chosen


def _compared(cache: Cache, requests: Sequence[Request]) -> Recomputed:
    equal, num_rows, worst, shift = 0, 0, 0.0, 0.0
    place: int | None = None
    codec, away = codec_of(cache.path, cache.plan), _Away(cache)
    for request in requests:
        stored, again = cache.stored_rows(request.sample), request.target.array
        anew = as_stored(codec, again)
        equal += int((row_distance(stored, anew) == 0.0).sum())
        num_rows += len(again)
        shift += away.shift(stored, anew) * len(again)
        distance = away.of(stored, again)
        if not distance <= worst:
            worst, place = distance, request.sample
    return Recomputed(
        num_samples=len(requests),
        num_rows=num_rows,
        rows_equal=equal / max(num_rows, 1),
        worst_distance=worst,
        worst_sample=place,
        bound=away.bound,
        shift=None if away.shift_bound is None else shift / max(num_rows, 1),
        shift_bound=away.shift_bound,
    )


class _Away:
    """How far a sample's rows of now are from those stored: |a - b| / |a| of the worst row, or, under a fitted codec,
    the mean KL of its rows. bound: what the codec loses at most, and what another machine or batch may change.

    shift is what only the latter changes: the mean KL from the rows of now as they would be stored to those stored.
    """

    def __init__(self, cache: Cache) -> None:
        plan = cache.plan
        self.bound, self._lens = TOLERANCE[plan.settings.dtype], None
        self.shift_bound: float | None = None
        if Choice.read(plan.settings.codec).is_fitted:
            device = torch.device("cpu")
            head = loaded_head(cache.head(), plan.head, device)
            self._lens = Lens.of(head, plan.head.vocab_size, device)
            record, dtype = open_fitted(cache.path, plan).record, plan.settings.dtype
            self.bound = 4 * record.kl_p99 + ROUNDING_KL[dtype]
            self.shift_bound = shifted(SHIFT_KL[dtype], record.kl_mean)

    def of(self, stored: np.ndarray, again: np.ndarray) -> float:
        if not len(again):
            return 0.0
        if self._lens is None:
            return float(row_distance(stored, again).max())
        return self._divergence(again, stored)

    def shift(self, stored: np.ndarray, anew: np.ndarray) -> float:
        return 0.0 if self._lens is None or not len(anew) else self._divergence(anew, stored)

    def _divergence(self, *rows: np.ndarray) -> float:
        assert self._lens is not None, "the codec is a fitted one"
        return self._lens.compare(*(as_tensor(np.array(each)).float() for each in rows)).mean


def shifted(rounding: float, lost: float) -> float:
    """Mean KL from coded rows to those of an answer that is `rounding` away; lost: mean KL that the codec loses.

    A number that is e away is rounded to the next step with probability e / step, so that its square is e * step in the
    mean. With e^2 / 2 and step^2 / 24 summed over a row being `rounding` and `lost`, half of that is at most
    sqrt(12 * rounding * lost).
    """
    return float(rounding + (12 * rounding * lost) ** 0.5)
