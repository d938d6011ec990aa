"""Overlap: samples that two caches of one training both hold, by their text, whatever became of it as tokens.

Invariant: no sample is trained on twice as often as its cache says without a word. A cache of which every sample is in
another is refused: the same data extracted once more, by another engine or with other settings. Where a part is shared
that is noted: two data sets may have texts in common, and to repeat some of them may be meant.
Cost: 16 bytes of memory a sample, and sorting them.
"""

from collections.abc import Iterator, Sequence
from itertools import combinations

import numpy as np

from kdpipe.manifests.cache import Cache
from kdpipe.manifests.errors import CacheError


def shared_samples(caches: Sequence[Cache]) -> list[str]:
    """A line for each two caches that share a part of their samples. Raises CacheError where one is all in another."""
    if len(caches) == 1:
        return []
    ids = [np.unique(_content_ids(cache)) for cache in caches]
    together = np.concatenate(ids)
    if len(np.unique(together)) == len(together):
        return []
    return [note for one, other in combinations(range(len(caches)), 2) for note in _notes(caches, ids, one, other)]


def _notes(caches: Sequence[Cache], ids: Sequence[np.ndarray], one: int, other: int) -> Iterator[str]:
    """The line for two of the caches, none where they share nothing."""
    less, more = sorted((one, other), key=lambda number: len(ids[number]))
    shared = np.intersect1d(ids[less], ids[more], assume_unique=True)
    if not len(shared):
        return
    smaller, larger = caches[less].path, caches[more].path
    found = f"(the first is {_first_place(caches[less], shared)})"
    if len(shared) == len(ids[less]):
        raise CacheError(
            f"all its {len(shared):,} texts are in {larger} too {found}, so each would be trained on twice; leave one "
            "of the two caches out",
            where=smaller,
        )
    yield (
        f"{len(shared):,} of the {len(ids[less]):,} texts of {smaller} are in {larger} too {found}: each is trained on "
        "twice"
    )


def _content_ids(cache: Cache) -> np.ndarray:
    """The id of every sample's text, as bytes [N]."""
    ids = np.ascontiguousarray(cache.samples.column("content_id"))
    return ids.view(f"S{ids.shape[1]}").ravel()


def _first_place(cache: Cache, shared: np.ndarray) -> str:
    """File and line of the first of the shared samples."""
    return cache.samples.place(int(np.flatnonzero(np.isin(_content_ids(cache), shared))[0]))
