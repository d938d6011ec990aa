"""Feed: which samples a step takes, on which rank, and how they are packed; a cache's rows into reused buffers.

    indices -> order(seed, epoch) -> steps(batch_tokens) -> deal(ranks x accumulation) -> pack -> PackedBatch

Everything before `pack` is a pure function of lengths, seed and world size, so there is no state to save: step s of a
run is the same samples whatever was done before it, and the same on any number of ranks.
Cost: one copy of the rows, from the mapping into the batch buffer (memcpy speed).
"""

# Shapes: L tokens of a batch, S samples in it, R supervised rows, E teacher width.

import contextlib
import mmap
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

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
    attention_mask: bool [S, L] where padded, None where packed
    rows: int64 [R], places in the flattened [S*L] whose next token is supervised
    labels: int64 [R], that next token
    keys: int64 [R], of each row a number that no other row of the run has: what a sampled loss draws by
    teacher_rows: [R, E] in the cache's dtype; valid until the feed makes its next batch
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    seq_lens: torch.Tensor
    attention_mask: torch.Tensor | None
    rows: torch.Tensor
    labels: torch.Tensor
    keys: torch.Tensor
    teacher_rows: torch.Tensor

    def to(self, device: torch.device) -> "PackedBatch":
        """The batch on another device; itself where it is there already."""
        moved = {
            name: value.to(device) if isinstance(value := getattr(self, name), torch.Tensor) else value
            for name in self.__dataclass_fields__
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
    """Samples of one or more caches of the same teacher, under one running index."""

    def __init__(self, caches: Sequence[Cache]) -> None:
        for cache in caches:
            cache.require_complete()
            cache.samples.verify()
            ours, first = (
                {
                    "teacher": one.plan.fingerprint.teacher[:12],
                    "tokenizer": one.plan.fingerprint.tokenizer[:12],
                    "dtype": one.plan.settings.dtype,
                }
                for one in (cache, caches[0])
            )
            for field in ours:
                if ours[field] != first[field]:
                    raise CacheError(
                        f"its {field} is {ours[field]}, that of {caches[0].path} is {first[field]}; "
                        "caches trained on together must come from one teacher, in one dtype",
                        where=cache.path,
                    )
        self.caches = tuple(caches)
        self._first = [0, *accumulate(len(cache) for cache in caches)]
        self.num_tokens = np.concatenate([cache.num_tokens() for cache in caches]).astype(np.int64)
        self.num_supervised = np.concatenate([cache.num_supervised() for cache in caches]).astype(np.int64)
        self.hidden_size = caches[0].plan.head.hidden_size
        self.dtype: torch.dtype = getattr(torch, caches[0].plan.settings.dtype)

    def __getitem__(self, index: int) -> SampleView:
        which, within = self._locate(index)
        return self.caches[which][within]

    def prefetch(self, index: int) -> None:
        which, within = self._locate(index)
        self.caches[which].prefetch(within)

    def _locate(self, index: int) -> tuple[int, int]:
        which = bisect_right(self._first, index) - 1
        return which, index - self._first[which]

    def split(self, heldout_fraction: float | None) -> tuple[np.ndarray, np.ndarray]:
        """(training, held-out) sample indices, the caches' own fraction where none is given."""
        heldout = np.concatenate([cache.heldout(heldout_fraction) for cache in self.caches])
        return np.flatnonzero(~heldout), np.flatnonzero(heldout)


class Packer:
    """Packs samples into batches, in one row buffer that grows to the largest batch and is used again."""

    def __init__(self, rows: Rows, *, padded: bool = False, pin: bool = False) -> None:
        self._rows, self._padded, self._pin = rows, padded, pin
        self._buffer = torch.empty(0, rows.hidden_size, dtype=rows.dtype)
        self._bits = self._buffer.view(torch.uint8).numpy()

    def pack(self, members: Sequence[int] | np.ndarray) -> PackedBatch:
        """The samples as one batch, in this order, without padding unless the packer was made for it."""
        views = [self._rows[int(member)] for member in members]
        lengths = np.array([len(view.token_ids) for view in views], dtype=np.int64)
        firsts = np.cumsum(lengths) - lengths
        ids = np.concatenate([view.token_ids for view in views]).astype(np.int64)
        supervised = np.concatenate([view.supervised for view in views])
        supervised[firsts] = False  # no sample's first token is predicted: the one before it is another sample's
        rows = row_positions(supervised)
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
            attention_mask=mask,
            rows=torch.from_numpy(rows),
            labels=torch.from_numpy(labels),
            keys=torch.from_numpy(_row_keys(members, views)),
            teacher_rows=self._gather(views),
        )

    def empty(self) -> PackedBatch:
        """The shortest thing a model can run with nothing to learn from: keeps a rank without samples in step."""
        return PackedBatch(
            input_ids=torch.zeros(1, 1, dtype=torch.int64),
            position_ids=torch.zeros(1, 1, dtype=torch.int64),
            seq_lens=torch.ones(1, dtype=torch.int32),
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


def _row_keys(members: Sequence[int] | np.ndarray, views: Sequence[SampleView]) -> np.ndarray:
    """A sample's number and a row's number within it as one, for every row."""
    return np.concatenate(
        [int(member) * ROWS_A_SAMPLE + np.arange(len(view.rows)) for member, view in zip(members, views, strict=True)]
    )


def _spread(values: np.ndarray, places: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """values at their places in a flattened array of this shape, zero elsewhere."""
    flat = np.zeros(shape[0] * shape[1], dtype=values.dtype)
    flat[places] = values
    return flat


def row_buffer(num_rows: int, width: int, dtype: torch.dtype, *, pin: bool) -> torch.Tensor:
    """An uninitialised [num_rows, width] buffer: pinned, or in huge pages where the kernel has them."""
    if pin:
        # Pinned memory is what lets a copy to the GPU run while the next batch is packed.
        return torch.empty(num_rows, width, dtype=dtype, pin_memory=True)
    # Measured: rows of 256 x 1024 bf16 copy at 1.0 of memcpy into huge pages, at 0.8-0.9 into small ones.
    memory = mmap.mmap(-1, num_rows * width * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(num_rows, width)


class Feed:
    """The batches of a training run: `feed.step(s)` yields this rank's micro-batches of step s.

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
    ) -> None:
        if len(members) < world_size:
            raise ConfigError(
                f"{world_size} ranks for {len(members)} training samples; use at most --nproc {max(len(members), 1)}",
                where="--nproc",
            )
        self._rows, self._members, self._seed, self._batch_tokens = rows, members, seed, batch_tokens
        self._grad_accum, self._rank, self._world_size = grad_accum, rank, world_size
        self._packer = Packer(rows, padded=padded, pin=pin)
        self.steps_per_epoch = num_steps(rows.num_tokens[members], batch_tokens)
        self._epoch, self._cuts = -1, [members]

    def num_supervised(self, step: int) -> int:
        """Supervised tokens of a step over all ranks: what its loss is divided by, once."""
        return int(self._rows.num_supervised[self.members(step)].sum())

    def num_tokens_before(self, step: int) -> int:
        """Tokens of all steps before this one; reads no more than the order of one epoch."""
        epochs, within = divmod(step, self.steps_per_epoch)
        lengths = self._rows.num_tokens
        rest = sum(int(lengths[self.members(epochs * self.steps_per_epoch + each)].sum()) for each in range(within))
        return epochs * int(lengths[self._members].sum()) + rest

    def members(self, step: int) -> np.ndarray:
        """Samples of a step, those of all ranks."""
        epoch, within = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            order = shuffle(self._members, self._seed, epoch)
            self._epoch, self._cuts = epoch, cut_steps(order, self._rows.num_tokens[order], self._batch_tokens)
        return self._cuts[within]

    def step(self, step: int) -> Iterator[PackedBatch]:
        """This rank's micro-batches of a step, exactly grad_accum of them; each is valid until the next is taken."""
        members = self.members(step)
        bins = deal(members, self._rows.num_tokens[members], self._world_size * self._grad_accum)
        for member in np.concatenate(bins[self._rank :: self._world_size]):
            self._rows.prefetch(int(member))
        for micro in bins[self._rank :: self._world_size]:
            yield self._packer.pack(micro) if len(micro) else self._packer.empty()
