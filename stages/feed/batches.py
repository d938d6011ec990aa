"""Batches: what each step of a run trains on.

    batches.step(s) -> this rank's micro-batches of step s, PackedBatch each

A run's steps are planned (PlannedBatches) or, with a student that writes its own answers, made as it goes.
Cost: one copy of the rows, from their source into the batch buffer (memcpy speed); a source reads the next step's rows
while this one is computed.
"""

from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
from pydantic import JsonValue

from kdpipe.manifests.errors import ConfigError
from kdpipe.stages.feed.dataset import Dataset
from kdpipe.stages.feed.lengths import planned_steps
from kdpipe.stages.feed.mixture import Epochs, Mixture, Shuffled
from kdpipe.stages.feed.order import cut, deal
from kdpipe.stages.feed.packing import PackedBatch, Packer


class Batches(Protocol):
    """The batches of all steps of a run, on one rank."""

    num_steps: int

    def num_supervised(self, step: int) -> int:
        """Supervised tokens of a step over all ranks: what its loss is divided by, once; 0 where nothing is learnt."""

    def step(self, step: int) -> Iterator[PackedBatch]:
        """This rank's micro-batches of a step, equally many on every rank; each is valid until the next is taken."""

    def num_tokens(self, first: int, after: int) -> int | None:
        """Tokens of the steps `first` to `after` over all ranks; None where that is not known beforehand."""

    def told(self, step: int) -> dict[str, float]:
        """Further figures of a step that was made, for its event."""

    def state(self) -> dict[str, JsonValue]:
        """What a checkpoint must keep so that the same steps follow; {} where they are functions of the step."""

    def resume(self, state: dict[str, JsonValue]) -> None:
        """Go on from a checkpoint's `state`."""


class PlannedBatches:
    """The batches of a run over a data set, pure functions of the step.

    epochs, max_steps: how many steps there are: the smaller of the two
    weights: the share of each table in an epoch's supervised tokens; () takes every sample once
    Raises ConfigError where there are fewer training samples than ranks.
    """

    def __init__(
        self,
        dataset: Dataset,
        samples: np.ndarray,
        *,
        seed: int,
        batch_tokens: int,
        epochs: float = 1.0,
        max_steps: int | None = None,
        weights: Sequence[float] = (),
        grad_accum: int = 1,
        rank: int = 0,
        world_size: int = 1,
        padded: bool = False,
        pin: bool = False,
    ) -> None:
        require_samples(samples, world_size)
        self._dataset = dataset
        self._epochs: Epochs = Shuffled(dataset, samples, seed, batch_tokens)
        if weights:
            self._epochs = Mixture(dataset, samples, seed, batch_tokens, weights)
        self._grad_accum, self._rank, self._world_size = grad_accum, rank, world_size
        self._packer = Packer(dataset, padded=padded, pin=pin)
        self.steps_per_epoch = self._epochs.num_steps
        self.num_steps = planned_steps(self.steps_per_epoch, epochs=epochs, max_steps=max_steps)
        self._cuts: dict[int, list[np.ndarray]] = {}
        self._whole: list[tuple[int, int]] = []
        """Samples and tokens of each epoch, from the first."""
        self._wanted_to = -1
        self._waited_before = 0.0

    def num_supervised(self, step: int) -> int:
        return int(self._dataset.num_supervised[self.samples(step)].sum())

    def num_tokens(self, first: int, after: int) -> int:
        return self._num_tokens_before(after) - self._num_tokens_before(first)

    def told(self, step: int) -> dict[str, float]:
        """Seconds that this rank has waited for a teacher at work while its batches were packed."""
        waited = self._waited()
        return {} if waited is None else {"wait/teacher/seconds": waited - self._waited_before}

    def _waited(self) -> float | None:
        """For all teachers so far; None where none is at work."""
        waited = [teacher.rows.waited_s for teacher in self._dataset.teachers]
        return sum(filter(None, waited)) if waited and None not in waited else None

    def state(self) -> dict[str, JsonValue]:
        return {}

    def resume(self, state: dict[str, JsonValue]) -> None:
        """There is nothing that the step does not say."""

    def samples(self, step: int) -> np.ndarray:
        """Samples of a step, those of all ranks."""
        epoch, within = divmod(step, self.steps_per_epoch)
        return self._epoch(epoch)[within]

    def num_samples_before(self, step: int) -> int:
        """Samples of all steps before, those that came again counted again."""
        return self._before(step)[0]

    def step(self, step: int) -> Iterator[PackedBatch]:
        """Exactly grad_accum micro-batches; the rows of the next step are asked for before the first is packed."""
        self._waited_before = self._waited() or 0.0
        for each in (step, step + 1):
            self.read_ahead(each)
        for samples in self.mine(step):
            yield self._packer.pack(samples) if len(samples) else self._packer.empty()

    def read_ahead(self, step: int) -> None:
        """Ask for the rows of a step, once."""
        if self._wanted_to < step < self.num_steps:
            self._wanted_to = step
            for teacher in self._dataset.teachers:
                teacher.rows.want(np.concatenate(self.mine(step)))

    def _num_tokens_before(self, step: int) -> int:
        return self._before(step)[1]

    def _before(self, step: int) -> tuple[int, int]:
        """Samples and tokens of all steps before."""
        epochs, within = divmod(step, self.steps_per_epoch)
        while len(self._whole) < epochs:
            self._whole.append(self._size(self._epochs.members(len(self._whole))))
        started = [self._size(step) for step in self._epoch(epochs)[:within]] if within else []
        parts = [*self._whole[:epochs], *started]
        return sum(samples for samples, _ in parts), sum(tokens for _, tokens in parts)

    def _size(self, samples: np.ndarray) -> tuple[int, int]:
        return len(samples), int(self._dataset.num_tokens[samples].sum())

    def _epoch(self, epoch: int) -> list[np.ndarray]:
        """The steps of an epoch. Two epochs are kept: what is read ahead at the end of one belongs to the next."""
        if epoch not in self._cuts:
            if len(self._cuts) == 2:
                self._cuts.pop(next(iter(self._cuts)))
            order = self._epochs.order(epoch)
            self._cuts[epoch] = cut(order, self._dataset.num_tokens[order], self.steps_per_epoch)
        return self._cuts[epoch]

    def mine(self, step: int) -> list[np.ndarray]:
        """This rank's samples of a step, by micro-batch."""
        samples = self.samples(step)
        bins = deal(samples, self._dataset.num_tokens[samples], self._world_size * self._grad_accum)
        return bins[self._rank :: self._world_size]


def require_samples(samples: np.ndarray, world_size: int) -> None:
    """Every rank needs a training sample. Raises ConfigError."""
    if len(samples) < world_size:
        raise ConfigError(
            f"{world_size} ranks for {len(samples)} training samples; use at most --nproc {max(len(samples), 1)}",
            where="--nproc",
        )
