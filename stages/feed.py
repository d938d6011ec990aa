"""Feed: which samples a step takes, on which rank, and how they are packed; a cache's rows into reused buffers.

    indices -> order(seed, epoch) -> steps(batch_tokens) -> deal(ranks x accumulation) -> pack -> PackedBatch

Everything before `pack` is a pure function of lengths, seed and world size, so there is no state to save: step s of a
run is the same samples whatever was done before it, and the same on any number of ranks.
Cost: one copy of the rows, from the mapping into the batch buffer (memcpy speed); the kernel reads a step's rows from
the disk while the step before is computed (`want`).
"""

# Shapes: L tokens of a batch, S samples in it, R supervised rows, E teacher width.

import contextlib
import mmap
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import torch

from kdpipe.manifests.cache import Cache
from kdpipe.manifests.errors import CacheError, ConfigError
from kdpipe.manifests.sample import SampleView, row_positions
from kdpipe.stages.draws import mixed, mixed_seed

ROWS_A_SAMPLE = 2**32
"""More than any sample has."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class PackedBatch:
    """Samples ready for a forward pass: laid end to end in one row, or padded to one length each in a row of its own.

    input_ids, position_ids: int64 [1, L], or [S, L] padded; positions restart at every sample
    seq_lens: int32 [S], tokens of each sample
    bounds: where each packed sample begins, and L at the end: on the CPU, so that nobody waits for a GPU to read them;
        () where padded
    attention_mask: bool [S, L] where padded, None where packed
    rows: int64 [R], places in the flattened [S*L] whose next token is supervised
    labels: int64 [R], that next token
    keys: int64 [R], of each row a number that no other row of the run has: what a sampled loss draws by
    teacher_rows: [R, E] in the cache's dtype, [0, E] where the loss takes none; valid until the next batch is made
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    seq_lens: torch.Tensor
    attention_mask: torch.Tensor | None
    rows: torch.Tensor
    labels: torch.Tensor
    keys: torch.Tensor
    teacher_rows: torch.Tensor
    bounds: tuple[int, ...] = ()

    def to(self, device: torch.device) -> "PackedBatch":
        """The batch on another device; itself where it is there already."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        moved: dict[str, Any] = {
            name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in values.items()
        }
        return PackedBatch(**moved)


def shuffle(indices: np.ndarray, seed: int, epoch: int) -> np.ndarray:
    """The order of an epoch: sample indices sorted by a hash of (seed, epoch, index).

    A hash, not a random generator: the order cannot change with numpy's version, and a sample's rank does not depend
    on how many others there are.
    """
    places = mixed(torch.from_numpy(indices.copy()) ^ mixed_seed(seed, epoch)).numpy().view(np.uint64)
    return indices[np.argsort(places, kind="stable")]


def num_steps(num_tokens: np.ndarray, batch_tokens: int) -> int:
    """Steps of an epoch: as few as keep the mean step within batch_tokens, and no more than there are samples."""
    return min(max(-(-int(num_tokens.sum()) // batch_tokens), 1), len(num_tokens))


def cut_steps(order: np.ndarray, num_tokens: np.ndarray, batch_tokens: int) -> list[np.ndarray]:
    """An epoch's order cut into steps of nearly equal tokens, instead of full ones and a remainder.

    num_tokens: of every sample in `order`. A sample belongs to the step in which its middle token falls, except that
    no step is left empty:

    tokens 4 4 4 4, batch_tokens 7 -> 3 steps of 5.33 -> [4] [4 4] [4]
    """
    steps = num_steps(num_tokens, batch_tokens)
    middles = np.cumsum(num_tokens) * 2 - num_tokens
    step_of = middles * steps // (2 * int(num_tokens.sum()))
    bounds = np.searchsorted(step_of, np.arange(1, steps))
    for step in range(1, steps):
        previous = bounds[step - 2] if step > 1 else 0
        bounds[step - 1] = min(max(bounds[step - 1], previous + 1), len(order) - (steps - step))
    return np.split(order, bounds)


def deal(samples: np.ndarray, num_tokens: np.ndarray, num_bins: int) -> list[np.ndarray]:
    """One step's samples dealt into bins of nearly equal tokens: longest first, each to the lightest bin.

    num_tokens: of every sample in `samples`. Fewer samples than bins leave some bins empty.
    """
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    load = [0] * num_bins
    for place in np.argsort(-num_tokens, kind="stable"):
        lightest = load.index(min(load))
        bins[lightest].append(int(samples[place]))
        load[lightest] += int(num_tokens[place])
    return [np.array(members, dtype=np.int64) for members in bins]


class Rows:
    """Samples of one or more caches of the same teacher, under one running index.

    Raises IncompleteError or CorruptError for a cache that is not whole, CacheError for caches that do not go together.
    """

    def __init__(self, caches: Sequence[Cache]) -> None:
        for number, cache in enumerate(caches):
            cache.require_complete()
            cache.samples.verify()
            _require_one_teacher(cache, caches[0])
            for earlier in caches[:number]:
                _require_other_samples(cache, earlier)
        self.caches = tuple(caches)
        self._first = [0, *accumulate(len(cache) for cache in caches)]
        self.num_tokens = np.concatenate([cache.num_tokens() for cache in caches]).astype(np.int64)
        self.num_supervised = np.concatenate([cache.num_supervised() for cache in caches]).astype(np.int64)
        self.hidden_size = caches[0].plan.head.hidden_size
        self.dtype: torch.dtype = getattr(torch, caches[0].plan.settings.dtype)

    def __getitem__(self, index: int) -> SampleView:
        which, within = self._locate(index)
        return self.caches[which][within]

    def without_rows(self, index: int) -> SampleView:
        which, within = self._locate(index)
        return self.caches[which].without_rows(within)

    def prefetch(self, index: int) -> None:
        which, within = self._locate(index)
        self.caches[which].prefetch(within)

    def _locate(self, index: int) -> tuple[int, int]:
        which = bisect_right(self._first, index) - 1
        return which, index - self._first[which]

    @property
    def heldout_fraction(self) -> float:
        """The largest of the caches' own: a text that one of them holds out is held out of all."""
        return max(cache.plan.heldout_fraction for cache in self.caches)

    def split(self, heldout_fraction: float | None) -> tuple[np.ndarray, np.ndarray]:
        """(training, held-out) sample indices by one fraction for all caches, their own where none is given."""
        fraction = self.heldout_fraction if heldout_fraction is None else heldout_fraction
        heldout = np.concatenate([cache.heldout(fraction) for cache in self.caches])
        return np.flatnonzero(~heldout), np.flatnonzero(heldout)


def _require_one_teacher(cache: Cache, first: Cache) -> None:
    ours, theirs = (
        {
            "teacher": one.plan.fingerprint.teacher[:12],
            "tokenizer": one.plan.fingerprint.tokenizer[:12],
            "dtype": one.plan.settings.dtype,
        }
        for one in (cache, first)
    )
    for field in ours:
        if ours[field] != theirs[field]:
            raise CacheError(
                f"its {field} is {ours[field]}, that of {first.path} is {theirs[field]}; "
                "caches trained on together must come from one teacher, in one dtype",
                where=cache.path,
            )


def _require_other_samples(cache: Cache, earlier: Cache) -> None:
    """A cache given twice would be twice the epoch that the user means, without a word."""
    ours, theirs = ({one.plan.digest, *(plan.plan for plan in one.plan.grown_from)} for one in (cache, earlier))
    if ours & theirs:
        raise CacheError(
            f"its samples are those of {earlier.path} again: the same cache, a copy, or one that grew from it; "
            "name each cache once",
            where=cache.path,
        )


class Packer:
    """Packs samples into batches, in one row buffer that grows to the largest batch and is used again.

    with_rows: whether batches have teacher_rows; without, no row is read
    """

    def __init__(self, rows: Rows, *, padded: bool = False, pin: bool = False, with_rows: bool = True) -> None:
        self._rows, self._padded, self._pin = rows, padded, pin
        self._sample = rows.__getitem__ if with_rows else rows.without_rows
        self._buffer = torch.empty(0, rows.hidden_size, dtype=rows.dtype)
        self._bits = self._buffer.view(torch.uint8).numpy()

    def pack(self, members: Sequence[int] | np.ndarray) -> PackedBatch:
        """The samples as one batch, in this order, without padding unless the packer was made for it."""
        views = [self._sample(int(member)) for member in members]
        lengths = np.array([len(view.token_ids) for view in views], dtype=np.int64)
        firsts = np.cumsum(lengths) - lengths
        ids = np.concatenate([view.token_ids for view in views]).astype(np.int64)
        supervised = np.concatenate([view.supervised for view in views])
        supervised[firsts] = False  # no sample's first token is predicted: the one before it is another sample's
        rows = row_positions(supervised)
        keys = _row_keys(np.asarray(members), np.add.reduceat(supervised.astype(np.int64), firsts))
        labels = ids[rows + 1]
        positions = np.arange(len(ids)) - np.repeat(firsts, lengths)
        shape, mask = (1, len(ids)), None
        if self._padded:
            shape = (len(views), int(lengths.max()))
            places = np.repeat(np.arange(len(views)) * shape[1], lengths) + positions
            ids, positions, rows = _spread(ids, places, shape), _spread(positions, places, shape), places[rows]
            mask = torch.from_numpy(np.arange(shape[1]) < lengths[:, None])
        return PackedBatch(
            input_ids=torch.from_numpy(ids.reshape(shape)),
            position_ids=torch.from_numpy(positions.reshape(shape)),
            seq_lens=torch.from_numpy(lengths.astype(np.int32)),
            bounds=() if self._padded else (*firsts.tolist(), int(lengths.sum())),
            attention_mask=mask,
            rows=torch.from_numpy(rows),
            labels=torch.from_numpy(labels),
            keys=torch.from_numpy(keys),
            teacher_rows=self._gather(views),
        )

    def empty(self) -> PackedBatch:
        """The shortest thing a model can run with nothing to learn from: keeps a rank without samples in step."""
        return PackedBatch(
            input_ids=torch.zeros(1, 1, dtype=torch.int64),
            position_ids=torch.zeros(1, 1, dtype=torch.int64),
            seq_lens=torch.ones(1, dtype=torch.int32),
            bounds=() if self._padded else (0, 1),
            attention_mask=torch.ones(1, 1, dtype=torch.bool) if self._padded else None,
            rows=torch.zeros(0, dtype=torch.int64),
            labels=torch.zeros(0, dtype=torch.int64),
            keys=torch.zeros(0, dtype=torch.int64),
            teacher_rows=self._buffer[:0],
        )

    def _gather(self, views: Sequence[SampleView]) -> torch.Tensor:
        total = sum(len(view.rows) for view in views)
        if total > len(self._buffer):
            self._buffer = row_buffer(total, self._rows.hidden_size, self._rows.dtype, pin=self._pin)
            self._bits = self._buffer.view(torch.uint8).numpy()
        # The copy moves bits and knows no dtype: torch and numpy do not share bfloat16.
        at = 0
        for view in views:
            after = at + len(view.rows)
            self._bits[at:after] = view.rows.view(np.uint8)
            at = after
        return self._buffer[:total]


def _row_keys(members: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """A sample's number and a row's number within it as one, for every row: int64 [R]; counts: rows of each sample."""
    within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    return np.repeat(members.astype(np.int64) * ROWS_A_SAMPLE, counts) + within


def _spread(values: np.ndarray, places: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """values at their places in a flattened array of this shape, zero elsewhere."""
    flat = np.zeros(shape[0] * shape[1], dtype=values.dtype)
    flat[places] = values
    return flat


def row_buffer(num_rows: int, width: int, dtype: torch.dtype, *, pin: bool) -> torch.Tensor:
    """An uninitialised [num_rows, width] buffer: pinned, or in huge pages where the kernel has them."""
    if pin:
        # A copy to the GPU takes it as it is; from other memory the driver copies it to a pinned place first.
        return torch.empty(num_rows, width, dtype=dtype, pin_memory=True)
    # Measured: rows of 256 x 1024 bf16 copy at 1.0 of memcpy into huge pages, at 0.8-0.9 into small ones.
    memory = mmap.mmap(-1, num_rows * width * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(num_rows, width)


class Feed:
    """The batches of a training run: `feed.step(s)` yields this rank's micro-batches of step s.

    with_rows: whether the loss takes the teacher's rows
    Raises ConfigError where there are fewer training samples than ranks.
    """

    def __init__(
        self,
        rows: Rows,
        members: np.ndarray,
        *,
        seed: int,
        batch_tokens: int,
        grad_accum: int = 1,
        rank: int = 0,
        world_size: int = 1,
        padded: bool = False,
        pin: bool = False,
        with_rows: bool = True,
    ) -> None:
        if len(members) < world_size:
            raise ConfigError(
                f"{world_size} ranks for {len(members)} training samples; use at most --nproc {max(len(members), 1)}",
                where="--nproc",
            )
        self._rows, self._members, self._seed, self._batch_tokens = rows, members, seed, batch_tokens
        self._grad_accum, self._rank, self._world_size, self._with_rows = grad_accum, rank, world_size, with_rows
        self._packer = Packer(rows, padded=padded, pin=pin, with_rows=with_rows)
        self.steps_per_epoch = num_steps(rows.num_tokens[members], batch_tokens)
        self._cuts: dict[int, list[np.ndarray]] = {}

    def num_supervised(self, step: int) -> int:
        """Supervised tokens of a step over all ranks: what its loss is divided by, once."""
        return int(self._rows.num_supervised[self.members(step)].sum())

    def num_tokens_before(self, step: int) -> int:
        """Tokens of all the steps before this one, over all ranks."""
        epochs, within = divmod(step, self.steps_per_epoch)
        started = [self._rows.num_tokens[cut].sum() for cut in self._epoch(epochs)[:within]] if within else []
        return epochs * int(self._rows.num_tokens[self._members].sum()) + int(sum(started))

    def members(self, step: int) -> np.ndarray:
        """Samples of a step, those of all ranks."""
        epoch, within = divmod(step, self.steps_per_epoch)
        return self._epoch(epoch)[within]

    def _epoch(self, epoch: int) -> list[np.ndarray]:
        """The steps of an epoch. Two epochs are kept: what is read ahead at the end of one belongs to the next."""
        if epoch not in self._cuts:
            if len(self._cuts) == 2:
                self._cuts.pop(next(iter(self._cuts)))
            order = shuffle(self._members, self._seed, epoch)
            self._cuts[epoch] = cut_steps(order, self._rows.num_tokens[order], self._batch_tokens)
        return self._cuts[epoch]

    def _mine(self, step: int) -> list[np.ndarray]:
        """This rank's samples of a step, by micro-batch."""
        members = self.members(step)
        bins = deal(members, self._rows.num_tokens[members], self._world_size * self._grad_accum)
        return bins[self._rank :: self._world_size]

    def want(self, step: int) -> None:
        """Have the kernel read this rank's rows of a step ahead: called before the step before it is computed."""
        if self._with_rows:
            for member in np.concatenate(self._mine(step)):
                self._rows.prefetch(int(member))

    def step(self, step: int) -> Iterator[PackedBatch]:
        """This rank's micro-batches of a step, exactly grad_accum of them; each is valid until the next is taken."""
        for micro in self._mine(step):
            yield self._packer.pack(micro) if len(micro) else self._packer.empty()
