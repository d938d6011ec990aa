"""Aligned: samples of a student with a tokenizer of its own, and which of their rows stand for what text of a cache's.

    CACHE/aligned/<16 digits>/{align.json, PREPARED.json, samples.arrow, shards.arrow, spans.arrow, runs/}

A row of spans.arrow is a sample of samples.arrow: its place among the samples of the caches, end to end, and its spans,
four numbers each: first row and number of rows, the student's and then the teacher's, counted within the sample.
Invariant: written once and under its name whole. All of it is a pure function of the caches, the data and the student's
tokenizer, whose digests are in align.json; it may be removed at any time, and is made again.
Cost: 16 bytes a span; reading copies nothing.
"""

# Shapes: N samples, K spans of one.

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from kdpipe.manifests.durable import open_regular
from kdpipe.manifests.errors import CorruptError, LayoutError
from kdpipe.manifests.record import Record, read_record

ALIGNED = "aligned"
"""Folder of them, in a cache or in an output."""
ALIGNED_FILE = "align.json"
SPANS_FILE = "spans.arrow"
BATCH = 4096
"""Samples of a record batch."""
SCHEMA = pa.schema(
    [
        pa.field("place", pa.int64(), nullable=False),
        pa.field("spans", pa.list_(pa.int32()), nullable=False),
    ]
)


class AlignmentFigures(Record):
    """How much of the samples is aligned.

    num_samples: of the student; empty_samples of them have no span
    num_rows: the student's targets; aligned_rows of them are in spans, exact_rows in spans of one token on either side
    num_bytes: of text that the targets stand for, aligned_bytes of them in spans
    num_spans, teacher_rows: spans, and rows of the teacher in them
    not_in_cache: samples of the data that the caches do not have, so the student does not learn them
    not_in_data: samples of the caches that no record of the data is, or that the student's template or length left out
    shared_tokens: tokens of the same bytes, or the same role, in both vocabularies
    """

    num_samples: int
    empty_samples: int
    num_rows: int
    aligned_rows: int
    exact_rows: int
    num_bytes: int
    aligned_bytes: int
    num_spans: int
    teacher_rows: int
    not_in_cache: int
    not_in_data: int
    shared_tokens: int

    @property
    def share_of_bytes(self) -> float:
        return self.aligned_bytes / max(self.num_bytes, 1)

    @property
    def share_of_rows(self) -> float:
        return self.aligned_rows / max(self.num_rows, 1)


class AlignedRecord(Record):
    """align.json"""

    format_version: int = 1
    asked: str
    """sha256 over all that decides what is here: the folder is named after its first 16 digits."""
    caches: tuple[str, ...]
    """Digest of each cache's plan, in the order in which their samples are counted."""
    student_tokenizer: str
    student_template: str
    teacher_tokenizer: str
    teacher_template: str
    """sha256 of the tokenizers' definitions and of the chat templates."""
    ends: tuple[tuple[int, int], ...]
    """Tokens that end a turn, (student's, teacher's)."""
    figures: AlignmentFigures
    spans_digest: str
    """sha256 of spans.arrow."""


class SpansWriter:
    """Writes spans.arrow, a sample at a time."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._sink = pa.OSFile(str(path), "wb")
        self._writer = pa.ipc.new_file(self._sink, SCHEMA)
        self._places: list[int] = []
        self._spans: list[np.ndarray] = []

    def add(self, place: int, spans: np.ndarray) -> None:
        """place: of the sample among those of the caches; spans: int32 [K, 4]"""
        self._places.append(place)
        self._spans.append(spans.reshape(-1))
        if len(self._places) == BATCH:
            self._flush()

    def close(self) -> str:
        """Finish the file; its sha256."""
        if self._places:
            self._flush()
        self._writer.close()
        self._sink.close()
        with open(self._path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def _flush(self) -> None:
        offsets = np.cumsum([0, *map(len, self._spans)]).astype(np.int32)
        spans = pa.ListArray.from_arrays(offsets, np.concatenate(self._spans).astype(np.int32))
        columns = [pa.array(self._places, pa.int64()), spans]
        self._writer.write_batch(pa.record_batch(columns, schema=SCHEMA))
        self._places, self._spans = [], []


class SpanTable:
    """spans.arrow, mapped and checked against its digest.

    places: int64 [N], of each sample among those of the caches
    Raises LayoutError for a file that is no such table of so many samples, CorruptError for another digest.
    """

    def __init__(self, path: Path, *, digest: str, num_samples: int) -> None:
        try:
            with open(open_regular(path), "rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            if found != digest:
                raise CorruptError(f"sha256 {found}, {ALIGNED_FILE} says {digest}", where=path)
            reader = pa.ipc.open_file(pa.memory_map(str(path)))
            batches = [reader.get_batch(number) for number in range(reader.num_record_batches)]
        except (OSError, pa.ArrowException) as err:
            raise LayoutError(f"not readable as Arrow: {err}", where=path) from None
        self.places = np.concatenate([np.zeros(0, np.int64), *(batch.column("place").to_numpy() for batch in batches)])
        if reader.schema != SCHEMA or len(self.places) != num_samples:
            raise LayoutError(f"{len(self.places)} samples, expected {num_samples}", where=path)
        lists = [batch.column("spans") for batch in batches]
        self._parts: Sequence[tuple[np.ndarray, np.ndarray]] = [
            (each.offsets.to_numpy(), each.values.to_numpy()) for each in lists
        ]

    def of(self, sample: int) -> np.ndarray:
        """The spans of a sample, int32 [K, 4], a view."""
        offsets, values = self._parts[sample // BATCH]
        within = sample % BATCH
        return values[offsets[within] : offsets[within + 1]].reshape(-1, 4)


def read_aligned(folder: Path) -> AlignedRecord | None:
    """The record in a folder; None where there is none. Raises LayoutError for another kind of file."""
    return read_record(folder / ALIGNED_FILE, AlignedRecord)
