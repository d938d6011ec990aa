"""Rollouts: the batches of a student that writes some of its answers itself.

    step's samples (planned) -> drawn: the data's answer, or the student's own -> written with the weights of now
    -> told to the teacher -> its rows -> PackedBatch

Which samples a step has, and which of them the student answers, are functions of seed and step; the answers are
functions of weights and seed. So a run that goes on from a checkpoint makes the same steps.
Invariant: a rollout that is trained on is at most `max_staleness` optimizer steps old; its divergence is that of the
student as it is then, over the whole vocabulary, whatever wrote it. What is left out of the loss is counted.
Cost: writing. With overlap the teacher scores the answers of a later step while this one is trained on.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from pydantic import JsonValue

from kdpipe.manifests.specs import LiveSpec
from kdpipe.stages.draws import mixed_seed, uniform
from kdpipe.stages.feed.batches import PlannedBatches
from kdpipe.stages.feed.packing import PackedBatch, Packer
from kdpipe.stages.live.answers import OwnAnswers
from kdpipe.stages.live.rollout_log import Rollout, RolloutLog
from kdpipe.stages.live.writers import RunWriter
from kdpipe.stages.loss import Importance
from kdpipe.stages.ranks import Ranks
from kdpipe.stages.rollout.sampling import Sampling
from kdpipe.stages.rollout.writer import Answer, Prompt

DRAW = 0x6C6D626461
"""Keeps the draw of who answers apart from other draws of the same seed and step."""


def of_student(samples: np.ndarray, step: int, seed: int, lmbda: float) -> np.ndarray:
    """Which samples of a step the student answers itself, bool [N]: a share `lmbda` of them, drawn one by one."""
    numbers = uniform(torch.from_numpy(samples.astype(np.int64)), 1, mixed_seed(seed, step, DRAW))[:, 0]
    return (numbers < lmbda).numpy()


@dataclass(slots=True, eq=False)
class _Step:
    """A step that was written: this rank's micro-batches, and figures over all ranks."""

    batches: list[np.ndarray]
    rollouts: list[Rollout]
    seconds: float = 0.0
    sums: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Wanted:
    """An answer that is to be written; as in Rollout."""

    index: int
    sample: int
    number: int


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Begun:
    """A step whose answers are being written.

    batches: samples of each micro-batch; result: waits for its answers
    """

    batches: list[np.ndarray]
    result: Callable[[], list[Rollout]]
    is_new: bool
    started: float


SUMS = (
    "num_supervised",
    "num_answers",
    "num_written",
    "num_ended",
    "num_old",
    "num_cut",
    "entropy",
    "staleness",
    "num_taught",
    "num_aligned",
)


class RolloutBatches:
    """Batches whose samples are answered by the data or by the student, on one rank.

    planned: the steps and their samples
    writer: asked on every rank for that rank's prompts
    importance: the student's, which weighs its older answers; None where these count like others
    """

    def __init__(
        self,
        planned: PlannedBatches,
        dataset: OwnAnswers,
        writer: RunWriter,
        ranks: Ranks,
        live: LiveSpec,
        log: RolloutLog,
        *,
        seed: int,
        stop_ids: frozenset[int],
        importance: Importance | None = None,
        padded: bool = False,
        pin: bool = False,
    ) -> None:
        self.num_steps = planned.num_steps
        self._planned, self._dataset, self._writer, self._ranks = planned, dataset, writer, ranks
        self._live, self._seed, self._importance = live, seed, importance
        self._sampling = sampling_of(live, stop_ids)
        self._packer = Packer(dataset, padded=padded, pin=pin)
        self._log, self._is_new, self._next = log, True, 0
        self._ahead: dict[int, dict[int, Rollout]] = {}
        self._pending: dict[int, _Begun] = {}
        self._steps: dict[int, _Step] = {}
        self._followed: dict[str, float] = {}
        self._begun_at = -1
        self._waited_s = 0.0
        self._made: _Step | None = None

    def num_supervised(self, step: int) -> int:
        self._ready(step)
        return int(self._steps[step].sums["num_supervised"])

    def step(self, step: int) -> Iterator[PackedBatch]:
        self._ready(step)
        made = self._made = self._steps.pop(step)
        self._next = step + 1
        for samples in made.batches:
            yield self._packer.pack(samples) if len(samples) else self._packer.empty()
        self._dataset.drop(each.index for each in made.rollouts)

    def num_tokens(self, first: int, after: int) -> int | None:
        return None

    def told(self, step: int) -> dict[str, float]:
        """Of the rollouts of the step that was made last, and of their weights. Collective."""
        assert self._made is not None
        before, self._waited_s = self._waited_s, self._dataset.waited_s
        waited = {"wait/teacher/seconds": self._waited_s - before} | self._followed
        self._followed = {}
        return waited | figures(self._made.sums, self._made.seconds) | self._weights_told()

    def _weights_told(self) -> dict[str, float]:
        if self._importance is None:
            return {}
        sums, largest = self._importance.take(self._ranks.device)
        (count, total, cut), (largest,) = self._ranks.sums(sums), self._ranks.largest([largest])
        if not count:
            return {}
        return {"importance/mean": total / count, "importance/max": largest, "importance/clip_ratio": cut / count}

    def state(self) -> dict[str, JsonValue]:
        """The steps that were made, and how long each rank's file is. Collective."""
        return {"step": self._next, "lengths": self._ranks.each(self._log.length())}

    def resume(self, state: dict[str, JsonValue]) -> None:
        """What was written ahead of the checkpoint's steps is taken up; what later weights wrote is cut off."""
        lengths, step = state["lengths"], state["step"]
        assert isinstance(lengths, list)
        assert isinstance(step, int)
        rank = self._ranks.rank
        self._log.cut(int(str(lengths[rank])) if rank < len(lengths) else 0)
        if rank == 0:
            for other in range(self._ranks.world_size, len(lengths)):  # of ranks that there are no more
                self._log.of_rank(other).cut(int(str(lengths[other])))
        self._ranks.barrier()
        self._next, self._is_new, self._ahead = step, False, self._log.ahead(step)

    def _ready(self, step: int) -> None:
        """Have the answers of a step, and those begun that are to be ahead of it. Collective."""
        if step in self._steps and step == self._begun_at:
            return
        if self._is_new:
            self._log.cut(0)
            self._is_new = False
        for each in sorted(self._pending):  # what an engine wrote while the last step was trained on
            self._collect(each)
        begun = [
            each for each in range(step, min(step + self._live.overlap + 1, self.num_steps)) if each not in self._steps
        ]
        for each in begun:
            self._begin(each, version=step)
            if each == step or not self._writer.is_apart:
                self._collect(each)
        self._begun_at = step

    def _begin(self, step: int, version: int) -> None:
        """Ask for the answers of a step, unless they were written before the run was interrupted."""
        started = time.perf_counter()
        batches = self._planned.mine(step)
        wanted = [each for samples in batches for each in self._wanted(samples, step)]
        known = self._ahead.pop(step, {})
        lacks = any(each.index not in known for each in wanted)
        (write,) = self._ranks.largest([float(lacks)])  # ranks that hold parts of the weights write together
        if write:
            self._followed |= self._writer.follow(version)
        # The teacher scores the data's answers while others are written, and each of those as soon as it has ended.
        self._want(np.concatenate([samples[~self._asked(samples, step)] for samples in batches]))
        result = self._write(wanted, step, version) if write else partial(_known, known, wanted)
        self._pending[step] = _Begun(batches=batches, result=result, is_new=bool(write), started=started)

    def _collect(self, step: int) -> None:
        """The answers of a step that was begun; their teacher is told of them."""
        begun = self._pending.pop(step)
        made = _Step(batches=[], rollouts=[])
        made.rollouts += begun.result()
        taken = [each for each in made.rollouts if not self._is_left_out(each, step)]
        for each in taken:
            if not self._dataset.has(each.index):
                self._tell(each, step)
        mine: dict[int, list[int]] = {each.sample: [] for each in made.rollouts}
        for each in taken:
            mine[each.sample].append(each.index)
        made.batches += [_in_order(samples, mine) for samples in begun.batches]
        if begun.is_new:
            self._log.write(step, made.rollouts)
        made.seconds = time.perf_counter() - begun.started
        made.sums = self._over_all_ranks(made, step)
        self._steps[step] = made

    def _wanted(self, samples: np.ndarray, step: int) -> list[_Wanted]:
        """The answers that take the place of samples, in order."""
        first, place = self._first(step), {int(each): at for at, each in enumerate(self._planned.samples(step))}
        return [
            _Wanted(index=first + place[sample] * self._count + number, sample=sample, number=number)
            for sample in samples[self._asked(samples, step)].tolist()
            for number in range(self._count)
        ]

    def _write(self, wanted: Sequence[_Wanted], step: int, version: int) -> Callable[[], list[Rollout]]:
        prompts = [Prompt(key=each.index, token_ids=self._dataset.prompt(each.sample)) for each in wanted]

        def rollout(each: _Wanted, answer: Answer) -> Rollout:
            return Rollout(index=each.index, sample=each.sample, number=each.number, version=version, answer=answer)

        def ended(place: int, answer: Answer) -> None:
            if not self._is_left_out(rollout(wanted[place], answer), step):
                self._tell(rollout(wanted[place], answer), step)

        answers = self._writer.start(prompts, self._sampling, self._seed, ended)
        return lambda: list(map(rollout, wanted, answers()))

    def _asked(self, samples: np.ndarray, step: int) -> np.ndarray:
        """Which samples the student answers: those drawn, and those that the data has no answer to."""
        drawn = of_student(samples, step, self._seed, self._live.lmbda)
        return drawn | (self._dataset.num_supervised[samples] == 0)

    def _tell(self, rollout: Rollout, step: int) -> None:
        """The teacher of an answer, and ask for its rows."""
        written = rollout.answer.logprobs if self._importance is not None and rollout.version < step else None
        self._dataset.add(rollout.index, rollout.sample, rollout.answer, written=written)
        self._want(np.array([rollout.index], dtype=np.int64))

    def _want(self, samples: np.ndarray) -> None:
        for teacher in self._dataset.teachers:
            teacher.rows.want(samples)

    def _is_left_out(self, rollout: Rollout, step: int) -> bool:
        """Of such an answer nobody is told; no other text takes its place."""
        return self._is_old(rollout, step) or self._is_cut(rollout)

    def _is_old(self, rollout: Rollout, step: int) -> bool:
        return step - rollout.version > self._live.staleness_bound

    def _is_cut(self, rollout: Rollout) -> bool:
        return self._live.truncated == "drop" and not rollout.answer.ended

    @property
    def _count(self) -> int:
        return self._live.samples_per_prompt

    def _first(self, step: int) -> int:
        """The index of the first answer of a step, as if every sample of every step had as many as it may have."""
        return len(self._dataset) + self._planned.num_samples_before(step) * self._count

    def _over_all_ranks(self, made: _Step, step: int) -> dict[str, float]:
        """SUMS, the shortest and longest answer, and how old the oldest is that is not too old. Collective."""
        lengths = [len(each.answer.token_ids) for each in made.rollouts]
        young = [each for each in made.rollouts if not self._is_old(each, step)]
        found = ((each, self._dataset.num_aligned(each.index)) for each in made.rollouts)
        retold = [(each, aligned) for each, aligned in found if aligned is not None]
        own = dict.fromkeys(SUMS, 0.0) | {
            "num_supervised": float(sum(self._supervised(batch) for batch in made.batches)),
            "num_answers": float(len(lengths)),
            "num_written": float(sum(lengths)),
            "num_ended": float(sum(each.answer.ended for each in made.rollouts)),
            "num_old": float(len(made.rollouts) - len(young)),
            "num_cut": float(sum(self._is_cut(each) for each in young)),
            "staleness": float(sum(step - each.version for each in young)),
            "entropy": float(sum(float(each.answer.entropies.sum()) for each in made.rollouts)),
            "num_taught": float(sum(len(each.answer.token_ids) for each, _ in retold)),
            "num_aligned": float(sum(aligned for _, aligned in retold)),
        }
        total = torch.tensor([own[name] for name in SUMS], dtype=torch.float64, device=self._ranks.device)
        longest, shortest, stalest, made.seconds = self._ranks.largest(
            [
                float(max(lengths, default=0)),
                -float(min(lengths, default=1 << 40)),
                float(max((step - each.version for each in young), default=0)),
                made.seconds,
            ]
        )
        further = {"longest": longest, "shortest": -shortest, "stalest": stalest}
        return dict(zip(SUMS, self._ranks.sums(total), strict=True)) | further

    def _supervised(self, batch: np.ndarray) -> int:
        planned = batch[batch < len(self._dataset)]
        own = sum(int(self._dataset.tokens(each).supervised.sum()) for each in batch[batch >= len(self._dataset)])
        return int(self._dataset.num_supervised[planned].sum()) + own


def _in_order(samples: np.ndarray, mine: dict[int, list[int]]) -> np.ndarray:
    """A micro-batch: each sample, or the answers that take its place."""
    return np.array([index for sample in samples.tolist() for index in mine.get(sample, [sample])], dtype=np.int64)


def _known(known: dict[int, Rollout], wanted: Sequence[_Wanted]) -> list[Rollout]:
    return [known[each.index] for each in wanted]


def sampling_of(live: LiveSpec, stop_ids: frozenset[int]) -> Sampling:
    return Sampling(
        temperature=live.temperature,
        top_p=live.top_p,
        top_k=live.top_k,
        max_new_tokens=live.max_new_tokens,
        stop_ids=stop_ids,
    )


def figures(sums: dict[str, float], seconds: float) -> dict[str, float]:
    """What a step's event says of its rollouts; nothing where there were none."""
    count, written = sums["num_answers"], sums["num_written"]
    if not count:
        return {"rollout/num_answers": 0}
    # An engine does not measure the entropy; no distribution that is drawn from has one of 0.
    entropy = {"rollout/entropy/mean": sums["entropy"] / written} if sums["entropy"] else {}
    aligned = {"rollout/aligned_share": sums["num_aligned"] / sums["num_taught"]} if sums["num_taught"] else {}
    return (
        entropy
        | aligned
        | {
            "rollout/num_answers": int(count),
            "rollout/num_tokens": int(written),
            "rollout/num_dropped": int(sums["num_cut"]),
            "rollout/seconds": seconds,
            "rollout/tokens_per_second": written / max(seconds, 1e-9),
            "response_length/min": int(sums["shortest"]),
            "response_length/mean": written / count,
            "response_length/max": int(sums["longest"]),
            "response_length/clip_ratio": 1.0 - sums["num_ended"] / count,
            "staleness/mean": sums["staleness"] / max(count - sums["num_old"], 1.0),
            "staleness/max": int(sums["stalest"]),
            "staleness/dropped": int(sums["num_old"]),
        }
    )
