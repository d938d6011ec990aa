"""Samples: data files -> tokenised samples, streamed.

Invariant: every record read becomes one sample, or one incident that says why it did not; both come in the order of the
files. A malformed record stops everything with a DataError. A sample's id depends on its text alone.
Cost: at most BATCH_RECORDS records, or BATCH_CHARS characters and one record, are in memory; about 0.4 ms a short chat.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kdpipe.manifests.errors import DataError
from kdpipe.manifests.sample import Incident, IncidentKind, Sample, content_id
from kdpipe.manifests.specs import DataSpec
from kdpipe.stages.prepare.forms import Form, read_form
from kdpipe.stages.prepare.sources import RawRecord, list_files, read_records
from kdpipe.stages.prepare.tokens import Marked, Tokenizing, Tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BATCH_RECORDS = 256
BATCH_CHARS = 1 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class Prepared:
    """A record on its way: its normalised form and, unless there is nothing in it to learn, its marked text."""

    record: RawRecord
    form: Form
    marked: Marked | None


def prepare(
    paths: Sequence[Path],
    tokenizer: "PreTrainedTokenizerBase",
    spec: DataSpec,
    *,
    on_incident: Callable[[Incident], None],
    stop_ids: Collection[int] = (),
) -> Iterator[Sample]:
    """The samples in the data files and folders, in order; `on_incident` is told of every record cut or left out.

    stop_ids: tokens at which the model's generation ends, beside the tokenizer's end of text

    Paths and tokenizer are checked at the call, the rest while iterating. Raises ConfigError for a tokenizer without a
    fast backend; DataError for a malformed record, a file that cannot be read, or when no sample is left at all.
    """
    tokenizing = Tokenizing(tokenizer, spec.supervise, stop_ids)
    return _stream(list_files(paths), tokenizing, spec, on_incident)


def _stream(
    files: list[Path], tokenizing: Tokenizing, spec: DataSpec, on_incident: Callable[[Incident], None]
) -> Iterator[Sample]:
    num_samples = 0
    counts: Counter[IncidentKind] = Counter()
    for batch in _batches(files, tokenizing):
        tokens = iter(tokenizing.encode([prepared.marked for prepared in batch if prepared.marked is not None]))
        for prepared in batch:
            sample, incidents = _finish(prepared, next(tokens) if prepared.marked else None, spec)
            for incident in incidents:
                counts[incident.kind] += incident.dropped
                on_incident(incident)
            if sample is not None:
                num_samples += 1
                yield sample
    if not num_samples:
        reasons = ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items()) if count)
        raise DataError(f"none of the {counts.total()} records read can be used: {reasons}", where=_named(files))


def _named(files: list[Path]) -> str:
    return str(files[0]) if len(files) == 1 else f"{files[0]} and {len(files) - 1} more"


def _batches(files: list[Path], tokenizing: Tokenizing) -> Iterator[list[Prepared]]:
    batch: list[Prepared] = []
    num_chars = 0
    for file in files:
        for record in read_records(file):
            form = read_form(record)
            marked = None if form.emptiness() else tokenizing.mark(form, record.place)
            batch.append(Prepared(record=record, form=form, marked=marked))
            num_chars += len(marked.text) if marked else 0
            if len(batch) == BATCH_RECORDS or num_chars >= BATCH_CHARS:
                yield batch
                batch, num_chars = [], 0
    if batch:
        yield batch


def _finish(prepared: Prepared, tokens: Tokens | None, spec: DataSpec) -> tuple[Sample | None, list[Incident]]:
    """A record's sample, or none, and its incidents: those of a record without a sample end with the reason."""
    record = prepared.record

    def incident(kind: IncidentKind, detail: str) -> Incident:
        return Incident(source=record.source, line=record.line, kind=kind, detail=detail)

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
