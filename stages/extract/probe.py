"""Probe: some samples through the teacher for real, as extract runs them, so that its speed is measured.

    data -> Drawn (some samples, by their content) -> planned batches -> teach (engine, gate) -> rows thrown away

Invariant: nothing is written but a scratch file of the rows. Cost: the teacher's start, the samples, and the first
batch once more: it warms up what is made at the first pass.
"""

import heapq
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from kdpipe.manifests.errors import ConfigError, TeacherError
from kdpipe.manifests.fitted import Choice
from kdpipe.manifests.progress import Progress
from kdpipe.manifests.sample import Sample, SampleTokens
from kdpipe.manifests.tensorfile import DTYPES, TAGS
from kdpipe.stages.codec.fit import curve
from kdpipe.stages.extract.forecast import teacher_tokenizer
from kdpipe.stages.extract.planning import engine_record
from kdpipe.stages.extract.requests import text_batches
from kdpipe.stages.extract.shelf import ScratchShelf
from kdpipe.stages.extract.spec import ExtractSpec
from kdpipe.stages.extract.teach import teach
from kdpipe.stages.models.folder import ModelFolder
from kdpipe.stages.models.vocabulary import real_vocab_size
from kdpipe.stages.teacher import engine_class
from kdpipe.stages.teacher.describe import TeacherInfo, describe_teacher
from kdpipe.stages.teacher.gate import admit
from kdpipe.stages.teacher.head import read_head


class Drawn:
    """Some of the samples that go by, drawn by the digests of their content: any of them is as likely as another."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._kept: list[tuple[int, int, Sample]] = []
        self._seen = 0

    def see(self, sample: Sample) -> None:
        self._seen += 1
        # A heap whose first entry is the largest digest: the smallest ones stay.
        entry = (-int.from_bytes(sample.content_id), -self._seen, sample)
        if len(self._kept) < self._count:
            heapq.heappush(self._kept, entry)
        else:
            heapq.heappushpop(self._kept, entry)

    def samples(self) -> list[Sample]:
        """In the order in which they went by."""
        return [sample for _, _, sample in sorted(self._kept, key=lambda entry: -entry[1])]


@dataclass(frozen=True, kw_only=True, slots=True)
class Probed:
    """What a probe measured.

    start_seconds: until the first batch was done: the teacher's weights are read, what the first pass makes is made
    seconds: of all the samples, after that
    codecs: by what each is asked for: bytes of a row over those of a raw one, and what it loses; {} for too few rows
    """

    engine: str
    device: str
    num_samples: int
    num_tokens: int
    start_seconds: float
    seconds: float
    tokens_per_second: float
    codecs: dict[str, dict[str, float]]


CURVE = (Choice("int8"), *(Choice("fisher", kl=kl) for kl in (1e-3, 1e-2, 3e-2)))
"""Codecs that a probe tells of, and the one that is asked for."""


def probe(spec: ExtractSpec, samples: Sequence[Sample], progress: Progress) -> Probed:
    """Run the teacher over some samples. Raises the errors of the engine and of the gate."""
    folder = ModelFolder(spec.teacher, TeacherError, spec.options.trust)
    info = describe_teacher(folder, spec.dtype)
    record = engine_record(spec, info, progress)
    vocab_size = real_vocab_size(spec.teacher, teacher_tokenizer(folder, progress), info.head_rows)
    num_tokens = sum(len(sample.token_ids) for sample in samples)
    progress.begin("probe", total=None, unit="tokens")
    started = time.perf_counter()
    engine = engine_class(record.name)(folder, dtype=info.dtype, device=spec.resolved_device(), options=spec.options)
    with tempfile.NamedTemporaryFile(prefix="kdpipe-probe-") as file:
        shelf = ScratchShelf(Path(file.name), info.hidden_size, DTYPES[TAGS[info.dtype]])
        batches = text_batches(
            [SampleTokens(token_ids=sample.token_ids, supervised=sample.supervised) for sample in samples],
            shelf.place,
            probe_every=engine.probe_every,
            batch_tokens=record.batch_tokens,
            every_row=spec.rows == "all",
            vocab_size=vocab_size,
        )
        try:
            teach(engine, batches[:1], shelf, admit, progress)
            began = time.perf_counter()
            teach(engine, batches, shelf, admit, progress)
            ended = time.perf_counter()
        finally:
            engine.close()
        progress.end()
        codecs = _codecs(spec, info, vocab_size, shelf, progress)
    return Probed(
        engine=record.name,
        device=record.device,
        num_samples=len(samples),
        num_tokens=num_tokens,
        start_seconds=began - started,
        seconds=ended - began,
        tokens_per_second=num_tokens / (ended - began),
        codecs=codecs,
    )


def _codecs(
    spec: ExtractSpec, info: TeacherInfo, vocab_size: int, shelf: ScratchShelf, progress: Progress
) -> dict[str, dict[str, float]]:
    """What each codec comes to on the rows of the probe, which are few: with those of all samples it takes less."""
    rows = np.fromfile(shelf.path, shelf.dtype, shelf.num_rows * shelf.width).reshape(-1, shelf.width)
    choices = dict.fromkeys((*CURVE, *([choice] if (choice := spec.codec_choice()).is_fitted else ())))
    progress.note(f"fitting codecs to {len(rows):,} rows")
    rows = rows[np.random.default_rng(0).permutation(len(rows))]
    try:
        found = curve(list(choices), rows, read_head(info), vocab_size=vocab_size, device=torch.device("cpu"))
    except ConfigError as err:
        progress.note(f"no codec was tried: {err.fact}")
        return {}
    return {
        each.codec: {
            "share_of_raw": each.share,
            "kl_mean": each.kl_mean,
            "kl_p99": each.kl_p99,
            "same_top": each.same_top,
        }
        for each in (fitted.record for fitted in found)
    }
