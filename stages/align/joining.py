"""Joining: the data of some caches, read again with a student's tokenizer, and each sample's place in the caches.

    data -> pairing (both tokenizers, both templates) -> the student's samples, joined to the caches' by content_id

Invariant: what the teacher's tokenizer makes of a record here is what the cache has of it, token for token, or it is an
error: a span says which rows of the cache stand for a text. A sample that the caches lack is not learnt, and counted.
"""

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import transformers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from kdpipe.manifests.aligned import ALIGNED_FILE, SPANS_FILE, AlignedRecord, AlignmentFigures, SpansWriter
from kdpipe.manifests.cache import Cache
from kdpipe.manifests.durable import canonical
from kdpipe.manifests.errors import CacheError, DataError, is_of_others
from kdpipe.manifests.plan import SAMPLES_FILE
from kdpipe.manifests.prepared import PREPARED_FILE
from kdpipe.manifests.progress import Progress
from kdpipe.manifests.provenance import digest_json
from kdpipe.manifests.sample import Incident, Sample, SampleTokens
from kdpipe.manifests.samples import SamplesWriter
from kdpipe.manifests.specs import SHARD_TOKENS, DataSpec
from kdpipe.stages.extract.inputs import Inputs
from kdpipe.stages.extract.reading import (
    INCIDENTS,
    Reading,
    check_context,
    check_ids,
    counts_of,
    finish,
    tell_unread,
    unread_record,
)
from kdpipe.stages.feed.dataset import Dataset
from kdpipe.stages.models.vocabularies import SharedVocabulary, token_bytes
from kdpipe.stages.models.vocabulary import tokenizer_digest
from kdpipe.stages.prepare.files import list_files
from kdpipe.stages.prepare.pairing import Party, sample_digest
from kdpipe.stages.prepare.samples import aligned
from kdpipe.stages.prepare.work import Alignment
from kdpipe.stages.student.export import taught_stops, trained_stops

VERSION = 1
"""Of the rules by which texts are aligned: another one makes all anew."""
EARLY = 256
"""Samples whose last tokens say what ends a turn."""


class Joining:
    """A reading of data for a student, joined to caches."""

    def __init__(self, reading: Reading, caches: Sequence[Cache], teacher: PreTrainedTokenizerBase) -> None:
        self.reading, self.caches, self.teacher = reading, caches, teacher
        self._settings = caches[0].plan.settings
        self._stops = taught_stops(Dataset([cache.samples for cache in caches]), teacher)

    def asked(self, vocab_size: int) -> str:
        """sha256 over all that decides what comes of it."""
        reading, inputs, student = self.reading, Inputs(), self.reading.tokenizer
        stops = sorted(
            {*reading.model.untrained_stop_ids, -1 if student.eos_token_id is None else student.eos_token_id}
        )
        return digest_json(
            {
                "version": VERSION,
                "data": [[path.suffix.lower(), inputs.digest(path)] for path in list_files(reading.data)],
                "spec": reading.spec.model_dump(mode="json", exclude={"subset", "heldout_fraction"}),
                "student": [tokenizer_digest(student), digest_json(student.chat_template), student.bos_token, stops],
                "context": None if reading.context is None else reading.context.tokens,
                "vocab_size": vocab_size,
                "teacher": [tokenizer_digest(self.teacher), digest_json(self.teacher.chat_template), self._stops],
                "caches": [cache.plan.digest for cache in self.caches],
                "versions": [transformers.__version__],
            }
            | ({"prompts": True} if reading.prompts else {})
        )

    def write(self, folder: Path, asked: str, vocab_size: int, progress: Progress) -> None:
        """All files of the aligned samples in a folder of their own."""
        reading, known = self.reading, _Known(self.caches)
        (folder / INCIDENTS).parent.mkdir()
        samples = SamplesWriter(folder / SAMPLES_FILE, shard_tokens=SHARD_TOKENS, batch_tokens=0, every_row=False)
        spans, tally, early = SpansWriter(folder / SPANS_FILE), Counter[str](), list[SampleTokens]()
        incidents, unread = Counter[str](), Counter[str]()
        with open(folder / INCIDENTS, "x", encoding="utf-8") as log:

            def record(incident: Incident) -> None:
                incidents[incident.kind] += 1
                log.write(json.dumps(asdict(incident)) + "\n")

            for sample, alignment in self._read(record, unread, progress):
                place = None if alignment is None else known.place(sample, alignment)
                if alignment is None or place is None:
                    tally["not_in_cache"] += 1
                    continue
                check_ids(sample, vocab_size, reading.tokenizer)
                samples.add(replace(sample, source=os.path.basename(sample.source)))
                spans.add(place, alignment.spans)
                tally.update(_measured(sample, alignment))
                early += [SampleTokens(sample.token_ids, sample.supervised)] if len(early) < EARLY else []
        written = finish(samples, folder, counts_of(tally["num_samples"], incidents, unread))
        digest = spans.close()
        if not tally["num_samples"]:
            raise DataError(
                f"none of the {tally['not_in_cache']} samples of these data is in {self.caches[0].path}; give the data "
                "that it was extracted from",
                where=reading.data[0],
            )
        unread_yet = unread_record(reading, max(cache.plan.heldout_fraction for cache in self.caches))
        prepared = unread_yet.changed(
            **written.fields(),
            fingerprint=unread_yet.fingerprint.model_copy(update={"data": written.data_digest}),
        )
        ends = self._ends(early)
        tally["not_in_data"] = known.num_unseen()
        tally["shared_tokens"] = len(self.vocabulary(vocab_size, ends))
        result = AlignedRecord(
            asked=asked,
            caches=tuple(cache.plan.digest for cache in self.caches),
            student_tokenizer=tokenizer_digest(reading.tokenizer),
            student_template=digest_json(reading.tokenizer.chat_template),
            teacher_tokenizer=tokenizer_digest(self.teacher),
            teacher_template=digest_json(self.teacher.chat_template),
            ends=ends,
            figures=AlignmentFigures(**{name: tally[name] for name in AlignmentFigures.model_fields}),
            spans_digest=digest,
        )
        (folder / PREPARED_FILE).write_bytes(prepared.to_bytes())
        (folder / ALIGNED_FILE).write_bytes(canonical(result.model_dump(mode="json")))

    def vocabulary(self, vocab_size: int, ends: Sequence[tuple[int, int]]) -> SharedVocabulary:
        return SharedVocabulary.of(
            self.reading.tokenizer,
            self.teacher,
            student_size=vocab_size,
            teacher_size=self.caches[0].plan.head.vocab_size,
            ends=ends,
        )

    def _read(
        self, record: Callable[[Incident], None], unread: Counter[str], progress: Progress
    ) -> Iterator[tuple[Sample, Alignment | None]]:
        """The student's samples with their alignments."""
        reading, settings = self.reading, self._settings
        theirs = {"max_length": settings.max_length, "overlong": settings.overlong, "supervise": settings.supervise}
        student = _party(reading, reading.tokenizer, reading.spec, tuple(reading.model.untrained_stop_ids))
        teacher = _party(reading, self.teacher, reading.spec.model_copy(update=theirs), self._stops)
        progress.begin("align", total=None, unit="samples")
        read = aligned(
            reading.data,
            student,
            teacher,
            on_incident=record,
            on_note=progress.note,
            unread=unread,
            workers=reading.workers,
        )
        with closing(read):
            for sample, alignment in read:
                check_context(sample, reading)
                progress.advance(1)
                yield sample, alignment
        progress.end()
        tell_unread(unread, progress)

    def _ends(self, early: list[SampleTokens]) -> tuple[tuple[int, int], ...]:
        """The tokens by which most answers end on either side."""
        ours = trained_stops(early, self.reading.tokenizer)
        return ((ours[0], self._stops[0]),) if ours and self._stops else ()


class _Known:
    """The samples of the caches, by content."""

    def __init__(self, caches: Sequence[Cache]) -> None:
        ids = np.concatenate([cache.samples.column("content_id") for cache in caches])
        self._index = {content.tobytes(): len(ids) - 1 - number for number, content in enumerate(ids[::-1])}
        self._caches = caches
        self._starts = np.cumsum([0, *(len(cache) for cache in caches)])
        self._seen: set[bytes] = set()

    def place(self, sample: Sample, alignment: Alignment) -> int | None:
        """Where the caches have the sample, the first of several; None where they do not.

        Raises DataError where they have it with other tokens than the teacher's tokenizer makes of it here.
        """
        place = self._index.get(sample.content_id)
        if place is None:
            return None
        which = int(np.searchsorted(self._starts, place, "right")) - 1
        cache = self._caches[which]
        there = cache.samples.tokens(place - int(self._starts[which]))
        if sample_digest(sample.content_id, there.token_ids, there.supervised) != alignment.digest:
            raise DataError(
                f"the teacher's tokenizer and chat template make other tokens of it than {cache.path} has; are "
                f"{cache.teacher_folder} and the version of kdpipe those that it was extracted with?",
                where=f"{sample.source}:{sample.line}",
            )
        self._seen.add(sample.content_id)
        return place

    def num_unseen(self) -> int:
        return len(self._index) - len(self._seen)


def cache_tokenizer(cache: Cache) -> PreTrainedTokenizerBase:
    """The teacher's tokenizer with its chat template, as the cache keeps them; no code of the teacher's own runs."""
    cache.check_teacher_files()
    try:
        return PreTrainedTokenizerFast.from_pretrained(
            str(cache.teacher_folder),
            tokenizer_file=str(cache.teacher_folder / "tokenizer.json"),
            local_files_only=True,
        )
    except Exception as err:  # whatever transformers raises
        if is_of_others(err):
            raise
        raise CacheError(f"its tokenizer does not load: {err}", where=cache.teacher_folder) from err


def require_one_way(caches: Sequence[Cache]) -> None:
    """The caches' samples must have been made alike: one reading of the data stands for all."""
    for cache in caches[1:]:
        for field in ("max_length", "overlong", "supervise"):
            ours, first = (getattr(each.plan.settings, field) for each in (cache, caches[0]))
            if ours != first:
                raise CacheError(
                    f"it was extracted with {field} = {ours!r}, {caches[0].path} with {first!r}; a student with "
                    "another tokenizer takes caches that were made alike",
                    where=cache.path,
                )


def _party(reading: Reading, tokenizer: PreTrainedTokenizerBase, spec: DataSpec, stop_ids: tuple[int, ...]) -> Party:
    table = token_bytes(tokenizer)
    return Party(tokenizer=tokenizer, spec=spec, stop_ids=stop_ids, table=table, prompts=reading.prompts)


def _measured(sample: Sample, alignment: Alignment) -> dict[str, int]:
    spans = alignment.spans
    exact = (spans[:, 1] == 1) & (spans[:, 3] == 1)
    return {
        "num_samples": 1,
        "empty_samples": int(not len(spans) and sample.supervised.any()),
        "num_rows": int(sample.supervised[1:].sum()),
        "aligned_rows": int(spans[:, 1].sum()),
        "exact_rows": int(exact.sum()),
        "num_bytes": alignment.num_bytes,
        "aligned_bytes": alignment.aligned_bytes,
        "num_spans": len(spans),
        "teacher_rows": int(spans[:, 3].sum()),
    }
