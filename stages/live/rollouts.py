"""Rollouts: the batches of a student that writes some of its answers itself.

    step's samples (planned) -> drawn: the data's answer, or the student's own -> written with the weights of now
    -> told to the teacher -> its rows -> PackedBatch

Which samples a step has, and which of them the student answers, are functions of seed and step; the answers are
functions of weights and seed. So a run that goes on from a checkpoint makes the same steps.
Invariant: a rollout that is trained on is at most `overlap` optimizer steps old; its divergence is that of the student
as it is then, over the whole vocabulary, whatever wrote it.
Cost: writing. With overlap the teacher scores the answers of a later step while this one is trained on.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from pydantic import JsonValue

from kdpipe.manifests.sample import prompt_of
from kdpipe.manifests.specs import LiveSpec
from kdpipe.stages.draws import mixed_seed, uniform
from kdpipe.stages.feed.batches import PlannedBatches
from kdpipe.stages.feed.packing import PackedBatch, Packer
from kdpipe.stages.live.answers import OwnAnswers, joined
from kdpipe.stages.ranks import Ranks
from kdpipe.stages.rollout.sampling import Sampling
from kdpipe.stages.rollout.writer import Answer, Prompt, Writer

DRAW = 0x6C6D626461
"""Keeps the draw of who answers apart from other draws of the same seed and step."""


def of_student(samples: np.ndarray, step: int, seed: int, lmbda: float) -> np.ndarray:
    """Which samples of a step the student answers itself, bool [N]: a share `lmbda` of them, drawn one by one."""
    numbers = uniform(torch.from_numpy(samples.astype(np.int64)), 1, mixed_seed(seed, step, DRAW))[:, 0]
    return (numbers < lmbda).numpy()


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Rollout:
    """One answer of the student's own.

    index: in OwnAnswers; sample: whose prompt it answers; version: optimizer steps of the weights that wrote it
    """

    index: int
    sample: int
    number: int
    version: int
    answer: Answer


@dataclass(slots=True, eq=False)
class _Step:
    """A step that was written: this rank's micro-batches, and figures over all ranks."""

    batches: list[np.ndarray]
    rollouts: list[Rollout]
    version: int
    seconds: float
    sums: dict[str, float] = field(default_factory=dict)


SUMS = ("num_supervised", "num_answers", "num_written", "num_ended", "entropy")


class RolloutBatches:
    """Batches whose samples are answered by the data or by the student, on one rank.

    planned: the steps and their samples
    writer: the student's; asked on every rank for that rank's prompts
    """

    def __init__(
        self,
        planned: PlannedBatches,
        dataset: OwnAnswers,
        writer: Writer,
        ranks: Ranks,
        live: LiveSpec,
        *,
        seed: int,
        stop_ids: frozenset[int],
        padded: bool = False,
        pin: bool = False,
    ) -> None:
        self.num_steps = planned.num_steps
        self._planned, self._dataset, self._writer, self._ranks = planned, dataset, writer, ranks
        self._live, self._seed = live, seed
        self._sampling = sampling_of(live, stop_ids)
        self._packer = Packer(dataset, padded=padded, pin=pin)
        self._steps: dict[int, _Step] = {}
        self._made: _Step | None = None

    def num_supervised(self, step: int) -> int:
        """At least one, so that a step with nothing to learn changes nothing."""
        self._ready(step)
        return max(int(self._steps[step].sums["num_supervised"]), 1)

    def step(self, step: int) -> Iterator[PackedBatch]:
        self._ready(step)
        self._made = made = self._steps.pop(step)
        for samples in made.batches:
            yield self._packer.pack(samples) if len(samples) else self._packer.empty()
        self._dataset.drop(each.index for each in made.rollouts)

    def num_tokens(self, first: int, after: int) -> int | None:
        return None

    def told(self, step: int) -> dict[str, float]:
        """Of the rollouts of the step that was made last."""
        assert self._made is not None
        return figures(self._made.sums, self._made.seconds, step - self._made.version)

    def state(self) -> dict[str, JsonValue]:
        return {}

    def resume(self, state: dict[str, JsonValue]) -> None:
        """Rollouts are written again, with the weights of then."""

    def _ready(self, step: int) -> None:
        """Write the answers of a step, and of those that are to be ahead of it. Collective."""
        for each in range(step, min(step + self._live.overlap + 1, self.num_steps)):
            if each not in self._steps:
                self._steps[each] = self._written(each, version=step)

    def _written(self, step: int, version: int) -> _Step:
        started = time.perf_counter()
        first, place = self._first(step), {int(each): at for at, each in enumerate(self._planned.samples(step))}
        made = _Step(batches=[], rollouts=[], version=version, seconds=0.0)
        for samples in self._planned.mine(step):
            asked = self._asked(samples, step)
            prompts = [(int(sample), number) for sample in samples[asked] for number in range(self._count)]
            indices = [first + place[sample] * self._count + number for sample, number in prompts]
            answers = self._writer.write(
                [
                    Prompt(key=index, token_ids=prompt_of(self._dataset.tokens(sample)))
                    for index, (sample, _) in zip(indices, prompts, strict=True)
                ],
                self._sampling,
                self._seed,
            )
            rollouts = [
                Rollout(index=index, sample=sample, number=number, version=version, answer=answer)
                for index, (sample, number), answer in zip(indices, prompts, answers, strict=True)
            ]
            made.batches.append(self._in_order(samples, rollouts))
            made.rollouts += rollouts
        made.seconds = time.perf_counter() - started
        made.sums = self._over_all_ranks(made)
        return made

    def _asked(self, samples: np.ndarray, step: int) -> np.ndarray:
        """Which samples the student answers: those drawn, and those that the data has no answer to."""
        drawn = of_student(samples, step, self._seed, self._live.lmbda)
        return drawn | (self._dataset.num_supervised[samples] == 0)

    def _in_order(self, samples: np.ndarray, rollouts: Sequence[Rollout]) -> np.ndarray:
        """A micro-batch: each sample, or the answers that take its place; their teacher is told of them and asked."""
        mine: dict[int, list[int]] = {}
        for each in rollouts:
            prompt = prompt_of(self._dataset.tokens(each.sample))
            text = joined(prompt, each.answer.token_ids)
            self._dataset.add(each.index, text)
            mine.setdefault(each.sample, []).append(each.index)
        batch = np.array([index for sample in samples.tolist() for index in mine.get(sample, [sample])], dtype=np.int64)
        for teacher in self._dataset.teachers:
            teacher.rows.want(batch)
        return batch

    @property
    def _count(self) -> int:
        return self._live.samples_per_prompt

    def _first(self, step: int) -> int:
        """The index of the first answer of a step, as if every sample of every step had as many as it may have."""
        return len(self._dataset) + self._planned.num_samples_before(step) * self._count

    def _over_all_ranks(self, made: _Step) -> dict[str, float]:
        """SUMS, and the shortest and longest answer. Collective."""
        lengths = [len(each.answer.token_ids) for each in made.rollouts]
        own = dict.fromkeys(SUMS, 0.0) | {
            "num_supervised": float(sum(self._supervised(batch) for batch in made.batches)),
            "num_answers": float(len(lengths)),
            "num_written": float(sum(lengths)),
            "num_ended": float(sum(each.answer.ended for each in made.rollouts)),
            "entropy": float(sum(float(each.answer.entropies.sum()) for each in made.rollouts)),
        }
        total = torch.tensor([own[name] for name in SUMS], dtype=torch.float64, device=self._ranks.device)
        longest, shortest, seconds = self._ranks.largest(
            [float(max(lengths, default=0)), -float(min(lengths, default=1 << 40)), made.seconds]
        )
        made.seconds = seconds
        return dict(zip(SUMS, self._ranks.sums(total), strict=True)) | {"longest": longest, "shortest": -shortest}

    def _supervised(self, batch: np.ndarray) -> int:
        planned = batch[batch < len(self._dataset)]
        own = sum(int(self._dataset.tokens(each).supervised.sum()) for each in batch[batch >= len(self._dataset)])
        return int(self._dataset.num_supervised[planned].sum()) + own


def sampling_of(live: LiveSpec, stop_ids: frozenset[int]) -> Sampling:
    return Sampling(
        temperature=live.temperature,
        top_p=live.top_p,
        top_k=live.top_k,
        max_new_tokens=live.max_new_tokens,
        stop_ids=stop_ids,
    )


def figures(sums: dict[str, float], seconds: float, staleness: int) -> dict[str, float]:
    """What a step's event says of its rollouts; nothing where there were none."""
    count, written = sums["num_answers"], sums["num_written"]
    if not count:
        return {"rollout/num_answers": 0}
    return {
        "rollout/num_answers": count,
        "rollout/num_tokens": written,
        "rollout/seconds": seconds,
        "rollout/tokens_per_second": written / max(seconds, 1e-9),
        "rollout/entropy/mean": sums["entropy"] / written,
        "response_length/min": sums["shortest"],
        "response_length/mean": written / count,
        "response_length/max": sums["longest"],
        "response_length/clip_ratio": 1.0 - sums["num_ended"] / count,
        "staleness/mean": float(staleness),
        "staleness/max": float(staleness),
    }
