"""Join: which sample of one teacher's caches is which of another's.

Two samples are one where all that makes a sample the one it is agrees: the text's id, token ids and mask. Then a row of
the one teacher and a row of the other stand for the same token.
Cost: nothing where two caches are of the same samples in the same order, which their fingerprints say; else every token
id is read once, and 16 bytes a sample.
"""

# Shapes: N samples of some tables, M of others.

from collections.abc import Sequence

import numpy as np
import xxhash

from kdpipe.manifests.samples import Samples


class Joined:
    """The samples of some tables, found among those of others.

    places: int64 [N], the running index among the others; -1 where it is not there
    missing: int64, the samples that the others lack, and unused, int64: those of the others that are not among these
    """

    def __init__(self, tables: Sequence[Samples], others: Sequence[Samples]) -> None:
        self._tables, self._others = tables, others
        if [table.plan.fingerprint.data for table in tables] == [other.plan.fingerprint.data for other in others]:
            count = sum(table.plan.num_samples for table in tables)
            self.places, self.missing, self.unused = np.arange(count), np.zeros(0, np.int64), np.zeros(0, np.int64)
            return
        ours, theirs = _digests(tables), _digests(others)
        self.places = _found(ours, theirs)
        self.missing, self.unused = np.flatnonzero(self.places < 0), np.flatnonzero(_found(theirs, ours) < 0)

    def problem(self) -> str | None:
        """What of either lacks the other, with the first place of it; None where all is in both."""
        lacking = [(self.missing, self._tables, self._others), (self.unused, self._others, self._tables)]
        parts = [_lack(*each) for each in lacking if len(each[0])]
        if parts and np.intersect1d(_texts(self._tables, self.missing), _texts(self._others, self.unused)).size:
            parts.append("some of these texts are in both, as other tokens: another template, or other [data] settings")
        return "; ".join(parts) or None


def _lack(samples: np.ndarray, tables: Sequence[Samples], others: Sequence[Samples]) -> str:
    there, here = (", ".join(str(table.folder) for table in each) for each in (others, tables))
    count = f"{len(samples):,} sample{'s' * (len(samples) > 1)} of {here}"
    table, first = tables[0], int(samples[0])
    for table in tables:
        if first < table.plan.num_samples:
            break
        first -= table.plan.num_samples
    return f"{count} {'are' if len(samples) > 1 else 'is'} not in {there} (the first is {table.place(first)})"


def _texts(tables: Sequence[Samples], samples: np.ndarray) -> np.ndarray:
    """The ids of some samples' texts, as bytes."""
    ids = np.concatenate([table.column("content_id") for table in tables])[samples]
    return np.ascontiguousarray(ids).view(f"S{ids.shape[1]}").ravel()


def _digests(tables: Sequence[Samples]) -> np.ndarray:
    """Of every sample the xxh3-128 of what makes it the one it is, [N] of 16 bytes."""
    digests = b"".join(xxhash.xxh3_128_digest(each) for table in tables for each in table.identities())
    return np.frombuffer(digests, dtype="S16")


def _found(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """Where each of ours is among theirs, the first of equals; -1 where it is not. int64 [N]"""
    order = np.argsort(theirs, kind="stable")
    at = np.minimum(np.searchsorted(theirs[order], ours), len(theirs) - 1)
    return np.where(theirs[order][at] == ours, order[at], -1)
