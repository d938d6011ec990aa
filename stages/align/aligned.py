"""Aligned samples: those of a student with a tokenizer of its own, made once for some caches and found again.

    CACHE/aligned/<digest>/, or OUTPUT/aligned/<digest>/ where the cache cannot be written to

Invariant: a folder appears under its name whole, and what is in it is what joining the data anew would give; one that
is damaged is made again.
Cost: the data tokenised twice, once for a student's tokenizer; later the data's digest alone.
"""

import contextlib
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from kdpipe.manifests.aligned import ALIGNED, SPANS_FILE, AlignedRecord, SpanTable, read_aligned
from kdpipe.manifests.cache import Cache
from kdpipe.manifests.durable import (
    NO_RIGHT,
    disk_error,
    fsync_folder,
    fsync_tree,
    scratch_folder,
    scratch_of,
    sweep,
)
from kdpipe.manifests.errors import KdpipeError
from kdpipe.manifests.prepared import read_prepared
from kdpipe.manifests.progress import Progress
from kdpipe.manifests.samples import Samples
from kdpipe.stages.align.joining import Joining, cache_tokenizer, require_one_way
from kdpipe.stages.extract.reading import INCIDENTS, Reading, incident_notes
from kdpipe.stages.models.vocabularies import SharedVocabulary

KEY_DIGITS = 16


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Aligned:
    """The student's samples, and how they lie beside those of the caches.

    table: the samples; spans: of each, and its place among the caches' samples
    vocabulary: what both tokenizers have
    folder: where all of it lies
    """

    table: Samples
    spans: SpanTable
    record: AlignedRecord
    vocabulary: SharedVocabulary
    folder: Path


def align(
    reading: Reading, caches: Sequence[Cache], progress: Progress, *, vocab_size: int, places: Sequence[Path]
) -> Aligned:
    """The samples of the data for the student of `reading`, joined to those of the caches, made or found.

    reading: whose spec has max_length in the student's tokens, the rest as the caches were made
    vocab_size: ids that the student's head has a row for
    places: folders that may hold them, the first that can be written to
    Raises the errors of data and tokenizers, CacheError for caches made in different ways, DataError for data that are
    not what the caches were made of, SpaceError.
    """
    teacher = cache_tokenizer(caches[0])
    require_one_way(caches)
    joining = Joining(reading, caches, teacher)
    asked = joining.asked(vocab_size)
    places = [place / ALIGNED for place in places]
    for place in places:
        sweep(scratch_of(place, asked[:KEY_DIGITS]))
        if (found := _opened(place / asked[:KEY_DIGITS], asked, joining, vocab_size, progress)) is not None:
            return found
    for place in places:
        try:
            place.mkdir(parents=True, exist_ok=True)
            with scratch_folder(place, asked[:KEY_DIGITS]) as folder:
                joining.write(folder, asked, vocab_size, progress)
                fsync_tree(folder)
                _put(folder, place / asked[:KEY_DIGITS])
            break
        except OSError as err:
            if place == places[-1] or err.errno not in NO_RIGHT:
                raise disk_error(err, place) from err
            progress.note(f"{place} cannot be written to: the aligned samples go to {places[-1]}")
    made = _opened(place / asked[:KEY_DIGITS], asked, joining, vocab_size, progress)
    assert made is not None, "it was written a moment ago"
    return made


def notes_of(aligned: Aligned) -> Iterator[str]:
    """What whoever watches should know of them."""
    found = aligned.record.figures
    yield (
        f"another tokenizer than the teacher's: {found.aligned_rows:,} of {found.num_rows:,} tokens "
        f"({found.share_of_rows:.1%}) and {found.share_of_bytes:.1%} of the bytes are aligned, {found.exact_rows:,} "
        f"token by token; the vocabularies share {found.shared_tokens:,} tokens ({aligned.folder})"
    )
    if found.not_in_cache:
        yield f"{found.not_in_cache:,} samples of the data are not in the caches: they are left out"
    if found.not_in_data:
        yield f"{found.not_in_data:,} samples of the caches are not in the data, or the student has none of them"
    if found.empty_samples:
        yield f"{found.empty_samples:,} of {found.num_samples:,} samples have nothing aligned"
    yield from incident_notes(aligned.table.plan.counts, str(aligned.folder / INCIDENTS))


def _opened(place: Path, asked: str, joining: Joining, vocab_size: int, progress: Progress) -> Aligned | None:
    """What lies in a folder; None where that is nothing, or damaged."""
    try:
        record, prepared = read_aligned(place), read_prepared(place)
        if record is None or prepared is None or record.asked != asked:
            return None
        table = Samples(place, prepared)
        table.verify()
        spans = SpanTable(place / SPANS_FILE, digest=record.spans_digest, num_samples=prepared.num_samples)
    except (KdpipeError, OSError) as err:
        progress.note(f"the aligned samples are made again: {err}")
        shutil.rmtree(place, ignore_errors=True)
        return None
    return Aligned(
        table=table,
        spans=spans,
        record=record,
        vocabulary=joining.vocabulary(vocab_size, record.ends),
        folder=place,
    )


def _put(folder: Path, place: Path) -> None:
    """Give it its name, which another process of the same samples may have been quicker to take."""
    with contextlib.suppress(FileNotFoundError):
        if read_aligned(place) is None:
            shutil.rmtree(place)
    try:
        folder.rename(place)
    except OSError:
        if read_aligned(place) != read_aligned(folder):
            raise
    fsync_folder(place.parent)
