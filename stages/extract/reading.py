"""Reading: data files to samples, what was left out counted and listed, the new ones written into the plan's folder."""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from kdpipe.manifests.errors import (
    DataError,
)
from kdpipe.manifests.plan import (
    SAMPLES_FILE,
    Plan,
    plan_folder,
)
from kdpipe.manifests.progress import Progress
from kdpipe.manifests.sample import KEPT, Incident, Sample
from kdpipe.manifests.samples import SamplesWriter
from kdpipe.manifests.shard_table import SHARDS_FILE, ShardTable, write_shards
from kdpipe.stages.extract.present import Present
from kdpipe.stages.extract.spec import ExtractSpec
from kdpipe.stages.prepare import prepare
from kdpipe.stages.teacher.describe import TeacherInfo

NAMES, NAME_CHARS = 50, 60
"""Of columns that are not read, as many are named, at such a length."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Written:
    """What samples.arrow and shards.arrow hold, and what became of the records that were read.

    shards: all of the cache, those that were there before too
    """

    shards: ShardTable
    counts: dict[str, int]
    data_digest: str
    samples_digest: str
    shards_digest: str


def write_samples(
    spec: ExtractSpec,
    info: TeacherInfo,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    progress: Progress,
    *,
    plan: Plan,
    present: Present | None,
) -> Written:
    """Write samples.arrow and shards.arrow, those left out that are present, and runs/prepare.jsonl.

    Raises DataError for a token without a row in the head.
    """
    path = folder / SAMPLES_FILE
    writer = SamplesWriter(
        path,
        shard_tokens=plan.settings.shard_tokens,
        batch_tokens=plan.engine.batch_tokens,
        every_row=spec.rows == "all",
        after=None if present is None else present.samples,
    )
    kept = 0
    incidents: Counter[str] = Counter()
    unread: Counter[str] = Counter()
    with open(folder / "runs" / "prepare.jsonl", "x", encoding="utf-8") as log:

        def record(incident: Incident) -> None:
            incidents[incident.kind] += 1
            log.write(json.dumps(asdict(incident)) + "\n")

        with closing(read_samples(spec, info, tokenizer, record, unread, progress)) as samples:
            for sample in samples:
                _check_ids(sample, plan.head.vocab_size, tokenizer)
                kept += 1
                if present is None or not present.take(sample):
                    # The name alone: the same data from another place is the same cache.
                    writer.add(replace(sample, source=os.path.basename(sample.source)))
    brought = writer.close()
    counts = counts_of(kept, incidents, unread)
    log_name = _log_name(present, is_new=present is None or len(brought) > 0)
    for kind, count in sorted(incidents.items()):
        what = kind.replace("_", " ")
        progress.note(f"{count} of {counts['read']} samples {what}: see {log_name} in the cache")
    with open(path, "rb") as file:
        samples_digest = hashlib.file_digest(file, "sha256").hexdigest()
    return Written(
        shards=brought if present is None else ShardTable.joined([present.plan.shards, brought]),
        counts=counts,
        data_digest=writer.data_digest(),
        samples_digest=samples_digest,
        shards_digest=write_shards(folder / SHARDS_FILE, brought),
    )


def _check_ids(sample: Sample, vocab_size: int, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises DataError for a token without a row in the head."""
    if (highest := int(sample.token_ids.max())) >= vocab_size:
        raise DataError(
            f"token id {highest} ({tokenizer.convert_ids_to_tokens(highest)}) has no row in the lm_head, which has "
            f"{vocab_size}; is it a token of another modality?",
            where=f"{sample.source}:{sample.line}",
        )


def _log_name(present: Present | None, *, is_new: bool) -> str:
    """Where in the cache the incidents are listed. is_new: the data has samples that are not present"""
    generation = 0 if present is None else present.plan.generation
    if present is not None and is_new:
        return str(plan_folder(Path(), generation + 1) / "runs" / "prepare.jsonl")
    return "runs/prepare.jsonl" + (" and its like in grown/" if generation else "")


def read_samples(
    spec: ExtractSpec,
    info: TeacherInfo,
    tokenizer: PreTrainedTokenizerBase,
    record: Callable[[Incident], None],
    unread: Counter[str],
    progress: Progress,
) -> Generator[Sample, None, None]:
    """Every sample of the data, its records counted in `unread` by what they hold that is not read.

    Raises DataError for a sample that is longer than the teacher takes.
    """
    progress.begin("prepare", total=None, unit="samples")
    prepared = prepare(
        spec.data,
        tokenizer,
        spec.data_spec,
        on_incident=record,
        stop_ids=info.folder.stop_ids,
        on_note=progress.note,
        unread=unread,
        workers=spec.prepare_workers,
    )
    with closing(prepared):
        for sample in prepared:
            if info.max_positions is not None and len(sample.token_ids) > info.max_positions:
                raise DataError(
                    f"{len(sample.token_ids)} tokens, the teacher takes {info.max_positions} "
                    f"(max_position_embeddings); --max-length {info.max_positions} cuts such samples, with "
                    "--overlong drop it leaves them out",
                    where=f"{sample.source}:{sample.line}",
                )
            progress.advance(1)
            yield sample
    progress.end()
    if unread:
        listed = ", ".join(f"{name} ({count:,})" for name, count in sorted(_shown(unread).items()))
        progress.note(f"not read, with the number of records that have it: {listed}")


def counts_of(num_samples: int, incidents: Counter[str], unread: Counter[str]) -> dict[str, int]:
    dropped = sum(count for kind, count in incidents.items() if kind not in KEPT)
    left = {f"not read: {name}": count for name, count in _shown(unread).items()}
    return {"read": num_samples + dropped, "kept": num_samples, **dict(sorted(incidents.items())), **left}


def _shown(unread: Counter[str]) -> dict[str, int]:
    """The names as a log can take them, the first of a great many: a data file may name its columns as it likes."""
    shown: Counter[str] = Counter()
    for number, (name, count) in enumerate(sorted(unread.items())):
        safe = "".join(char if char.isprintable() else ascii(char)[1:-1] for char in name[:NAME_CHARS])
        shown[safe if number < NAMES else "further columns"] += count
    return dict(shown)
