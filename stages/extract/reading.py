"""Reading: data files to samples, what was left out counted and listed, the new ones written into the plan's folder."""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from kdpipe.manifests.errors import DataError
from kdpipe.manifests.plan import SAMPLES_FILE
from kdpipe.manifests.prepared import Prepared, SamplesFingerprint, SamplesSettings
from kdpipe.manifests.progress import Progress
from kdpipe.manifests.provenance import digest_json
from kdpipe.manifests.sample import KEPT, Incident, Sample
from kdpipe.manifests.samples import SamplesWriter
from kdpipe.manifests.shard_table import SHARDS_FILE, ShardTable, write_shards
from kdpipe.manifests.specs import SHARD_TOKENS, DataSpec
from kdpipe.stages.extract.present import Present
from kdpipe.stages.models.context import Context
from kdpipe.stages.models.folder import ModelFolder
from kdpipe.stages.models.vocabulary import tokenizer_digest, vocabulary_digest
from kdpipe.stages.prepare import prepare

INCIDENTS = Path("runs", "prepare.jsonl")
"""Where, in the folder of the samples, what was cut or left out is listed."""
TOTALS = ("read", "kept")
NOT_READ = "not read: "
"""What counts begin with and what a column's name follows; all else in them is a kind of incident."""
NAMES, NAME_CHARS = 50, 60
"""Of columns that are not read, as many are named, at such a length."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """Data files, and the model that their samples are for.

    data: files and folders
    spec: how they become samples
    model: whose tokenizer, chat template and stop ids make them
    who: what errors call the model: "teacher" or "student"
    context: the longest sample that it takes; None where it names none
    workers: processes that tokenise; None: as many as it is worth, up to one a core
    prompts: a record without an answer is a sample too, one without rows
    """

    data: tuple[Path, ...]
    spec: DataSpec
    model: ModelFolder
    who: str
    context: Context | None
    workers: int | None = None
    prompts: bool = False

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.model.tokenizer


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

    def fields(self) -> dict[str, object]:
        """As a record of samples has them; data_digest is in its fingerprint."""
        sums = {name: int(self.shards.columns[name].sum()) for name in ("num_samples", "num_tokens", "num_rows")}
        digests = {"samples_digest": self.samples_digest, "shards_digest": self.shards_digest}
        return sums | digests | {"counts": self.counts, "num_shards": len(self.shards), "shards": self.shards}


def unread_record(reading: Reading, heldout_fraction: float) -> Prepared:
    """The record of the samples of some data, as far as it is known before they are read."""
    tokenizer, spec = reading.tokenizer, reading.spec
    return Prepared(
        fingerprint=SamplesFingerprint(
            tokenizer=tokenizer_digest(tokenizer), template=digest_json(tokenizer.chat_template), data=""
        ),
        settings=SamplesSettings(
            max_length=spec.max_length, overlong=spec.overlong, supervise=spec.supervise, shard_tokens=SHARD_TOKENS
        ),
        num_samples=0,
        num_tokens=0,
        num_rows=0,
        heldout_fraction=heldout_fraction,
        counts={},
        samples_digest="",
        shards_digest="",
        num_shards=0,
        vocabulary_digest=vocabulary_digest(tokenizer),
        grown_from=(),
    )


def write_samples(
    reading: Reading,
    folder: Path,
    progress: Progress,
    *,
    vocab_size: int,
    shard_tokens: int,
    batch_tokens: int = 0,
    every_row: bool = False,
    present: Present | None = None,
) -> Written:
    """Write samples.arrow and shards.arrow, those left out that are present, and runs/prepare.jsonl.

    vocab_size: ids that have a row in the head; the rest as in SamplesWriter
    Raises DataError for a token without a row in the head.
    """
    path = folder / SAMPLES_FILE
    writer = SamplesWriter(
        path,
        shard_tokens=shard_tokens,
        batch_tokens=batch_tokens,
        every_row=every_row,
        after=None if present is None else present.samples,
    )
    kept = 0
    incidents: Counter[str] = Counter()
    unread: Counter[str] = Counter()
    with open(folder / INCIDENTS, "x", encoding="utf-8") as log:

        def record(incident: Incident) -> None:
            incidents[incident.kind] += 1
            log.write(json.dumps(asdict(incident)) + "\n")

        with closing(read_samples(reading, record, unread, progress)) as samples:
            for sample in samples:
                check_ids(sample, vocab_size, reading.tokenizer)
                kept += 1
                if present is None or not present.take(sample):
                    # The name alone: the same data from another place is the same cache.
                    writer.add(replace(sample, source=os.path.basename(sample.source)))
    return finish(writer, folder, counts_of(kept, incidents, unread), present)


def finish(writer: SamplesWriter, folder: Path, counts: dict[str, int], present: Present | None = None) -> Written:
    """Close a folder's samples.arrow and write its shards.arrow; what there is now."""
    brought = writer.close()
    with open(folder / SAMPLES_FILE, "rb") as file:
        samples_digest = hashlib.file_digest(file, "sha256").hexdigest()
    return Written(
        shards=brought if present is None else ShardTable.joined([present.plan.shards, brought]),
        counts=counts,
        data_digest=writer.data_digest(),
        samples_digest=samples_digest,
        shards_digest=write_shards(folder / SHARDS_FILE, brought),
    )


def incident_notes(counts: Mapping[str, int], log: str) -> Iterator[str]:
    """What was cut or left out, a line a kind. log: where each is listed"""
    for kind, count in counts.items():
        if kind not in TOTALS and not kind.startswith(NOT_READ):
            yield f"{count} of {counts['read']} samples {kind.replace('_', ' ')}: see {log}"


def check_ids(sample: Sample, vocab_size: int, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises DataError for a token without a row in the head."""
    if (highest := int(sample.token_ids.max())) >= vocab_size:
        raise DataError(
            f"token id {highest} ({tokenizer.convert_ids_to_tokens(highest)}) has no row in the lm_head, which has "
            f"{vocab_size}; is it a token of another modality?",
            where=f"{sample.source}:{sample.line}",
        )


def read_samples(
    reading: Reading, record: Callable[[Incident], None], unread: Counter[str], progress: Progress
) -> Generator[Sample, None, None]:
    """Every sample of the data, its records counted in `unread` by what they hold that is not read.

    Raises DataError for a sample that is longer than the model takes.
    """
    progress.begin("prepare", total=None, unit="samples")
    prepared = prepare(
        reading.data,
        reading.tokenizer,
        reading.spec,
        on_incident=record,
        stop_ids=reading.model.stop_ids,
        on_note=progress.note,
        unread=unread,
        workers=reading.workers,
        prompts=reading.prompts,
    )
    with closing(prepared):
        for sample in prepared:
            check_context(sample, reading)
            progress.advance(1)
            yield sample
    progress.end()
    tell_unread(unread, progress)


def check_context(sample: Sample, reading: Reading) -> None:
    """Raises DataError for a sample that is longer than the model takes."""
    context = reading.context
    if context is not None and len(sample.token_ids) > context.tokens:
        raise DataError(
            f"{len(sample.token_ids)} tokens, the {reading.who} takes {context.tokens} ({context.field}); "
            f"--max-length {context.tokens} cuts such samples, with --overlong drop it leaves them out",
            where=f"{sample.source}:{sample.line}",
        )


def tell_unread(unread: Counter[str], progress: Progress) -> None:
    """Say what the records held that was not read."""
    if unread:
        listed = ", ".join(f"{name} ({count:,})" for name, count in sorted(_shown(unread).items()))
        progress.note(f"not read, with the number of records that have it: {listed}")


def counts_of(num_samples: int, incidents: Counter[str], unread: Counter[str]) -> dict[str, int]:
    dropped = sum(count for kind, count in incidents.items() if kind not in KEPT)
    left = {f"{NOT_READ}{name}": count for name, count in _shown(unread).items()}
    return {"read": num_samples + dropped, "kept": num_samples, **dict(sorted(incidents.items())), **left}


def _shown(unread: Counter[str]) -> dict[str, int]:
    """The names as a log can take them, the first of a great many: a data file may name its columns as it likes."""
    shown: Counter[str] = Counter()
    for number, (name, count) in enumerate(sorted(unread.items())):
        safe = "".join(char if char.isprintable() else ascii(char)[1:-1] for char in name[:NAME_CHARS])
        shown[safe if number < NAMES else "further columns"] += count
    return dict(shown)
