"""Comparing two caches: how far apart the rows are that two passes gave for the same samples.

What an engine, a batch or a machine changes is rounding, some 1e-7 of a row in fp32 and some 1e-2 in bf16; another
token's row is at about 1. Cost: both caches are read once, each sample in fp64.
"""

# Shapes: R rows of one sample, E teacher width.

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from kdpipe.manifests.cache import Cache
from kdpipe.manifests.errors import CacheError

TOLERANCE = {"float32": 1e-4, "float16": 0.02, "bfloat16": 0.1}
"""Allowed |difference| over |row| between two implementations of one model: several times what was measured between
SGLang and transformers (fp32 1e-7 to 8e-7, bf16 0.01 to 0.02). Another model, or another token's row, is at 1."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """All distances are |a - b| / |a| of whole rows.

    rows_equal: share of the rows that are the same bit for bit
    mean_distance, worst_distance: over all rows
    worst_sample, worst_row: where the worst is; None where no two rows differ
    heads_equal: whether both hold the same lm_head, so that equal rows mean equal logits
    """

    num_samples: int
    num_rows: int
    rows_equal: float
    mean_distance: float
    worst_distance: float
    worst_sample: int | None
    worst_row: int | None
    heads_equal: bool


def compare(first: Cache, second: Cache, advance: Callable[[int], None] = lambda rows: None) -> Comparison:
    """Measure it; `advance` is told of every sample's rows.

    Raises CacheError where the two are not of the same samples, IncompleteError and CorruptError as reading does.
    """
    for name in ("num_samples", "num_rows"):
        ours, theirs = getattr(first.plan, name), getattr(second.plan, name)
        if ours != theirs:
            raise CacheError(f"{name} is {ours} there and {theirs} here; not of the same data", where=second.path)
    if first.plan.head.hidden_size != second.plan.head.hidden_size:
        widths = f"{first.plan.head.hidden_size} and {second.plan.head.hidden_size}"
        raise CacheError(f"rows are {widths} wide; not of the same teacher", where=second.path)
    equal, total, worst = 0, 0.0, 0.0
    place: tuple[int | None, int | None] = (None, None)
    for sample, (ours, theirs) in enumerate(zip(first, second, strict=True)):
        same_ids = np.array_equal(ours.token_ids, theirs.token_ids)
        if not (same_ids and np.array_equal(ours.supervised, theirs.supervised)):
            raise CacheError(f"sample {sample} has other tokens or another mask; not the same data", where=second.path)
        distance = row_distance(ours.rows, theirs.rows)
        equal += int((distance == 0.0).sum())
        total += float(distance.sum())
        if len(distance) and not distance.max() <= worst:
            row = int(distance.argmax())  # a NaN counts as the largest
            worst, place = float(distance[row]), (sample, row)
        advance(len(distance))
    num_rows = first.plan.num_rows
    return Comparison(
        num_samples=len(first),
        num_rows=num_rows,
        rows_equal=equal / max(num_rows, 1),
        mean_distance=total / max(num_rows, 1),
        worst_distance=worst,
        worst_sample=place[0],
        worst_row=place[1],
        heads_equal=_same_head(first, second),
    )


def row_distance(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """|ours - theirs| / |ours| of each row of two [R, E], float64 [R]; 0 for a row of zeros in both."""
    ours, theirs = ours.astype(np.float64), theirs.astype(np.float64)
    apart, size = np.linalg.norm(ours - theirs, axis=1), np.linalg.norm(ours, axis=1)
    return np.where(apart == 0.0, 0.0, apart / np.where(size > 0.0, size, np.finfo(np.float64).tiny))


def _same_head(first: Cache, second: Cache) -> bool:
    ours, theirs = first.head(), second.head()
    same_arrays = _equal(ours.weight, theirs.weight) and _equal(ours.bias, theirs.bias)
    return first.plan.head == second.plan.head and same_arrays


def _equal(ours: np.ndarray | None, theirs: np.ndarray | None) -> bool:
    if ours is None or theirs is None:
        return ours is theirs
    return ours.dtype == theirs.dtype and np.array_equal(ours.view(np.uint8), theirs.view(np.uint8))
