"""Samples: data files -> tokenised samples, streamed.

    files -> sources (raw records) -> batches -> work, here or in processes beside this one (pool) -> samples, in order

Invariant: every record read becomes one sample, or one incident that says why it did not; both come in the order of the
files, whatever the number of processes. A bad record, which cannot be read, is a DataError or, where the spec says so,
such an incident. A sample's id depends on its text alone; all that is said of the data is a pure function of it.
Cost: at most BATCH_RECORDS records, or BATCH_CHARS characters and one record, are in memory for every batch on its way.
"""

from collections import Counter
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING

from kdpipe.manifests.errors import DataError
from kdpipe.manifests.sample import STRICT, Incident, IncidentKind, Sample
from kdpipe.manifests.specs import DataSpec
from kdpipe.stages.prepare.bad_records import LOOK_AHEAD, BadRecords
from kdpipe.stages.prepare.files import Note, list_files, unheard
from kdpipe.stages.prepare.forms import Chat, Pair
from kdpipe.stages.prepare.pairing import Pairing, Party
from kdpipe.stages.prepare.pool import in_processes, num_processes
from kdpipe.stages.prepare.sources import RawRecord, raw_records
from kdpipe.stages.prepare.work import Alignment, Outcome, Preparing, Worked

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BATCH_RECORDS = 256
BATCH_CHARS = 1 << 20


def prepare(
    paths: Sequence[Path],
    tokenizer: "PreTrainedTokenizerBase",
    spec: DataSpec,
    *,
    on_incident: Callable[[Incident], None],
    stop_ids: Collection[int] = (),
    on_note: Note = unheard,
    unread: Counter[str] | None = None,
    workers: int | None = 1,
    prompts: bool = False,
) -> Generator[Sample, None, None]:
    """The samples in the data files and folders, in order; `on_incident` is told of every record cut or left out.

    stop_ids: tokens at which the model's generation ends, beside the tokenizer's end of text
    on_note: is told what a person should know of the files, and the first bad records
    unread: counts records by the columns, and the keys of messages, that they hold and that were not read
    prompts: a record without an answer is a sample too, of which no token is a target
    workers: processes that do the work; 1 does it in this one, None takes as many as data and cores are worth

    Paths and tokenizer are checked at the call, the rest while iterating; closing it ends the processes. Raises
    ConfigError for a tokenizer without a fast backend; DataError for a bad record, a file that cannot be read, or when
    no sample is left at all; TemporaryError for a process that died.
    """
    preparing = Preparing(tokenizer, spec, stop_ids, prompts)
    files = list_files(paths, on_note)
    batches = _batches(files, on_note, spec.where)
    count = num_processes(workers, files, tokenizer)
    worked = (preparing(batch) for batch in batches)
    if count > 1:
        worked = in_processes(count, batches, (Preparing, tokenizer, spec, stop_ids, prompts))
    outcomes = _outcomes(worked, Counter() if unread is None else unread)
    return _only_samples(_stream(outcomes, spec, on_incident, on_note, _named(files)))


def aligned(
    paths: Sequence[Path],
    student: Party,
    teacher: Party,
    *,
    on_incident: Callable[[Incident], None],
    on_note: Note = unheard,
    unread: Counter[str] | None = None,
    workers: int | None = 1,
) -> Generator[tuple[Sample, Alignment | None], None, None]:
    """The student's samples, each with its alignment to the teacher's of the same record; None where that makes none.

    Else as `prepare`.
    """
    pairing = Pairing(student, teacher)
    files = list_files(paths, on_note)
    batches = _batches(files, on_note, student.spec.where)
    count = min(num_processes(workers, files, each.tokenizer) for each in (student, teacher))
    worked = (pairing(batch) for batch in batches)
    if count > 1:
        worked = in_processes(count, batches, (Pairing, student, teacher))
    outcomes = _outcomes(worked, Counter() if unread is None else unread)
    with closing(_stream(outcomes, student.spec, on_incident, on_note, _named(files))) as kept:
        for each in kept:
            yield _sample_of(each), each.alignment


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Asked:
    """A prompt of the data: its tokens, which end with the generation prompt, and the form that it was written in."""

    sample: Sample
    form: Chat | Pair


def prompts(
    paths: Sequence[Path],
    tokenizer: "PreTrainedTokenizerBase",
    spec: DataSpec,
    *,
    on_incident: Callable[[Incident], None],
    stop_ids: Collection[int] = (),
    on_note: Note = unheard,
    unread: Counter[str] | None = None,
) -> Generator[Asked, None, None]:
    """What the last answer of every record follows, whether it is there or still to be written; else as `prepare`.

    Raises DataError for running text too.
    """
    preparing = Preparing(tokenizer, spec, stop_ids, asking=True)
    files = list_files(paths, on_note)
    worked = (preparing(batch) for batch in _batches(files, on_note, spec.where))
    outcomes = _outcomes(worked, Counter() if unread is None else unread)
    with closing(_stream(outcomes, spec, on_incident, on_note, _named(files))) as kept:
        for each in kept:
            assert isinstance(each.form, Chat | Pair), "running text is refused"
            yield Asked(sample=_sample_of(each), form=each.form)


def _only_samples(kept: Generator[Outcome, None, None]) -> Generator[Sample, None, None]:
    with closing(kept):
        for each in kept:
            yield _sample_of(each)


def _sample_of(outcome: Outcome) -> Sample:
    assert outcome.sample is not None, "only samples are kept"
    return outcome.sample


def _outcomes(worked: Generator[Worked, None, None], unread: Counter[str]) -> Generator[Outcome, None, None]:
    with closing(worked):
        for each in worked:
            unread.update(each.unread)
            yield from each.outcomes
            if each.failure is not None:
                raise each.failure


def _stream(
    outcomes: Generator[Outcome, None, None],
    spec: DataSpec,
    on_incident: Callable[[Incident], None],
    on_note: Note,
    where: str,
) -> Generator[Outcome, None, None]:
    """Those that are samples."""
    with closing(outcomes):
        yield from _samples(outcomes, spec, on_incident, on_note, where)


def _samples(
    outcomes: Iterator[Outcome],
    spec: DataSpec,
    on_incident: Callable[[Incident], None],
    on_note: Note,
    where: str,
) -> Iterator[Outcome]:
    num_read = num_samples = 0
    counts: Counter[IncidentKind] = Counter()
    bad = BadRecords()
    for outcome in outcomes:
        if outcome.error is not None and spec.bad_records == "stop":
            following = islice(chain([outcome], outcomes), LOOK_AHEAD)
            raise bad.stop((each.error for each in following), num_read, on_note)
        num_read += 1
        if outcome.error is not None:
            bad.add(outcome.error)
        for incident in outcome.incidents:
            counts[incident.kind] += incident.dropped
            if spec.strict and incident.kind in STRICT:
                what = incident.kind.replace("_", " ")
                raise DataError(f"{what}, and --strict is given: {incident.detail}", where=outcome.place)
            on_incident(incident)
        if outcome.sample is not None:
            num_samples += 1
            yield outcome
    if bad.num > spec.max_bad * num_read:
        raise bad.too_many(num_read, spec.max_bad, where, on_note)
    if not num_read and spec.where:
        wanted = ", ".join(f"{name} = {value}" for name, value in spec.where.items())
        raise DataError(f"holds no record with {wanted} (data.where)", where=where)
    if not num_read:
        raise DataError("holds no record", where=where)
    if not num_samples:
        reasons = ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items()) if count)
        raise DataError(f"none of the {num_read} records read can be used: {reasons}", where=where)


def _named(files: list[Path]) -> str:
    return str(files[0]) if len(files) == 1 else f"{files[0]} and {len(files) - 1} more"


def _batches(files: list[Path], note: Note, more: Collection[str]) -> Iterator[list[RawRecord]]:
    """The records of all files. Where a file cannot be read on, those before come first, then the error.

    more: as in raw_records
    """
    batch: list[RawRecord] = []
    num_chars = 0
    try:
        for file in files:
            for record in raw_records(file, note if len(files) > 1 else None, more):
                batch.append(record)
                num_chars += record.num_chars()
                if len(batch) == BATCH_RECORDS or num_chars >= BATCH_CHARS:
                    yield batch
                    batch, num_chars = [], 0
    except DataError:
        if batch:
            yield batch
        raise
    if batch:
        yield batch
