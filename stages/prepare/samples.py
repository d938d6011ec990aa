"""Samples: data files -> tokenised samples, streamed.

Invariant: every record read becomes one sample, or one incident that says why it did not; both come in the order of the
files. A bad record, which cannot be read, is a DataError or, where the spec says so, such an incident. A sample's id
depends on its text alone; all that is said of the data is a pure function of it.
Cost: at most BATCH_RECORDS records, or BATCH_CHARS characters and one record, are in memory; about 0.4 ms a short chat.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING

from kdpipe.manifests.errors import DataError
from kdpipe.manifests.sample import STRICT, Incident, IncidentKind, Sample, content_id
from kdpipe.manifests.specs import DataSpec
from kdpipe.stages.prepare.bad_records import LOOK_AHEAD, BadRecords
from kdpipe.stages.prepare.files import Note, list_files, unheard
from kdpipe.stages.prepare.forms import Form, check_unread, read_form, template_keys
from kdpipe.stages.prepare.sources import RawRecord, read_records
from kdpipe.stages.prepare.tokens import Marked, Tokenizing, Tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BATCH_RECORDS = 256
BATCH_CHARS = 1 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class Prepared:
    """A record on its way: its normalised form and, unless there is nothing in it to learn, its marked text.

    error: why it has neither
    """

    record: RawRecord
    form: Form | None = None
    marked: Marked | None = None
    error: DataError | None = None


def prepare(
    paths: Sequence[Path],
    tokenizer: "PreTrainedTokenizerBase",
    spec: DataSpec,
    *,
    on_incident: Callable[[Incident], None],
    stop_ids: Collection[int] = (),
    on_note: Note = unheard,
    unread: Counter[str] | None = None,
) -> Iterator[Sample]:
    """The samples in the data files and folders, in order; `on_incident` is told of every record cut or left out.

    stop_ids: tokens at which the model's generation ends, beside the tokenizer's end of text
    on_note: is told what a person should know of the files, and the first bad records
    unread: counts records by the columns, and the keys of messages, that they hold and that were not read

    Paths and tokenizer are checked at the call, the rest while iterating. Raises ConfigError for a tokenizer without a
    fast backend; DataError for a bad record, a file that cannot be read, or when no sample is left at all.
    """
    tokenizing = Tokenizing(tokenizer, spec.supervise, stop_ids)
    files = list_files(paths, on_note)
    wanted = template_keys(tokenizer.chat_template)
    batches = _batches(files, tokenizing, on_note, Counter() if unread is None else unread, wanted)
    return _stream(batches, tokenizing, spec, on_incident, on_note, _named(files))


def _stream(
    batches: Iterator[list[Prepared]],
    tokenizing: Tokenizing,
    spec: DataSpec,
    on_incident: Callable[[Incident], None],
    on_note: Note,
    where: str,
) -> Iterator[Sample]:
    num_read = num_samples = 0
    counts: Counter[IncidentKind] = Counter()
    bad = BadRecords()
    for batch in batches:
        tokens = iter(tokenizing.encode([prepared.marked for prepared in batch if prepared.marked is not None]))
        for index, prepared in enumerate(batch):
            if prepared.error is not None and spec.bad_records == "stop":
                following = islice(chain(batch[index:], chain.from_iterable(batches)), LOOK_AHEAD)
                raise bad.stop((each.error for each in following), num_read, on_note)
            num_read += 1
            if prepared.error is not None:
                bad.add(prepared.error)
            sample, incidents = _finish(prepared, next(tokens) if prepared.marked else None, spec)
            for incident in incidents:
                counts[incident.kind] += incident.dropped
                if spec.strict and incident.kind in STRICT:
                    what = incident.kind.replace("_", " ")
                    raise DataError(f"{what}, and --strict is given: {incident.detail}", where=prepared.record.place)
                on_incident(incident)
            if sample is not None:
                num_samples += 1
                yield sample
    if bad.num > spec.max_bad * num_read:
        raise bad.too_many(num_read, spec.max_bad, where, on_note)
    if not num_read:
        raise DataError("holds no record", where=where)
    if not num_samples:
        reasons = ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items()) if count)
        raise DataError(f"none of the {num_read} records read can be used: {reasons}", where=where)


def _named(files: list[Path]) -> str:
    return str(files[0]) if len(files) == 1 else f"{files[0]} and {len(files) - 1} more"


def _batches(
    files: list[Path], tokenizing: Tokenizing, note: Note, unread: Counter[str], wanted: frozenset[str]
) -> Iterator[list[Prepared]]:
    """wanted: keys of messages that the chat template looks for"""
    batch: list[Prepared] = []
    num_chars = 0
    for file in files:
        for record in read_records(file, on_empty=note if len(files) > 1 else None):
            prepared = _prepared(record, tokenizing, unread, wanted)
            batch.append(prepared)
            num_chars += len(prepared.marked.text) if prepared.marked else 0
            if len(batch) == BATCH_RECORDS or num_chars >= BATCH_CHARS:
                yield batch
                batch, num_chars = [], 0
    if batch:
        yield batch


def _prepared(record: RawRecord, tokenizing: Tokenizing, unread: Counter[str], wanted: frozenset[str]) -> Prepared:
    names: set[str] = set()
    try:
        form = read_form(record, names)
        check_unread(names, wanted, record.place)
        marked = None if form.emptiness() else tokenizing.mark(form, record.place)
    except DataError as err:
        return Prepared(record=record, error=err)
    unread.update(names)
    return Prepared(record=record, form=form, marked=marked)


def _finish(prepared: Prepared, tokens: Tokens | None, spec: DataSpec) -> tuple[Sample | None, list[Incident]]:
    """A record's sample, or none, and its incidents: those of a record without a sample end with the reason."""
    record = prepared.record

    def incident(kind: IncidentKind, detail: str) -> Incident:
        return Incident(source=record.source, line=record.line, kind=kind, detail=detail)

    if prepared.error is not None:
        return None, [incident("bad_record", prepared.error.args[0])]
    assert prepared.form is not None, "a record without an error has a form"
    if tokens is None or prepared.marked is None:
        kind_and_detail = prepared.form.emptiness()
        assert kind_and_detail is not None, "a record without tokens is empty"
        return None, [incident(*kind_and_detail)]
    found = [incident(finding.kind, finding.detail) for finding in prepared.marked.findings]
    kept = [each for each in found if not each.dropped]
    if dropped := [each for each in found if each.dropped]:
        return None, [*kept, dropped[0]]
    num_tokens = len(tokens.token_ids)
    too_long = num_tokens > spec.max_length
    length = f"{num_tokens} tokens, at most {spec.max_length} are kept"
    if too_long and spec.overlong == "drop":
        return None, [*kept, incident("dropped_overlong", length)]
    supervised = tokens.supervised[: spec.max_length]
    if not supervised.any():
        reason = length if too_long and tokens.supervised.any() else f"none of {num_tokens} tokens is a target"
        return None, [*kept, incident("no_supervised_token", reason)]
    sample = Sample(
        content_id=content_id(prepared.form.content()),
        source=record.source,
        line=record.line,
        token_ids=tokens.token_ids[: spec.max_length].copy(),  # a view would keep what was cut off in memory
        supervised=supervised.copy(),
        truncated=too_long,
    )
    return sample, [*kept, incident("truncated", length)] if too_long else kept
