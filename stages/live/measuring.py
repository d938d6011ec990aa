"""Measuring on-policy: the student answers held-out prompts, and is compared with its teacher on what it wrote."""

from collections.abc import Iterator, Sequence

import numpy as np

from kdpipe.manifests.progress import Silent
from kdpipe.manifests.sample import prompt_of
from kdpipe.stages.evaluate import measure
from kdpipe.stages.feed.order import cut_steps
from kdpipe.stages.feed.packing import PackedBatch, Packer
from kdpipe.stages.live.answers import MEASURED, OwnAnswers, joined
from kdpipe.stages.ranks import Ranks
from kdpipe.stages.rollout.sampling import Sampling
from kdpipe.stages.rollout.writer import Prompt
from kdpipe.stages.student import Student, TeacherHead

MEASURED_PROMPTS = 128
"""Held-out prompts that the student answers in each evaluation, the first by content."""
MEASURED_SEED = 0x6D656173
"""Keeps the draws of an evaluation apart from those of steps: they are the same in each, so that it is comparable."""


class Measuring:
    """heldout: samples whose prompts are answered, the first of them, in every evaluation with the same draws"""

    def __init__(self, dataset: OwnAnswers, heldout: np.ndarray, sampling: Sampling) -> None:
        self._dataset, self._heldout, self._sampling = dataset, heldout[:MEASURED_PROMPTS], sampling

    def measure(
        self, student: Student, heads: Sequence[TeacherHead], ranks: Ranks | None, batch_tokens: int
    ) -> dict[str, float]:
        """KL in both directions and agreement on the student's own answers to held-out prompts; {} without any."""
        rank, world_size = (0, 1) if ranks is None else (ranks.rank, ranks.world_size)
        mine = self._heldout[rank::world_size]
        if not len(self._heldout):
            return {}
        prompts = [prompt_of(self._dataset.tokens(int(sample))) for sample in mine]
        answers = student.write(
            [Prompt(key=int(sample), token_ids=prompt) for sample, prompt in zip(mine, prompts, strict=True)],
            self._sampling,
            MEASURED_SEED,
            heads[0].vocab_size,
        )
        indices = MEASURED + mine
        for index, prompt, answer in zip(indices.tolist(), prompts, answers, strict=True):
            self._dataset.add(index, joined(prompt, answer.token_ids, imitated=True))
        packer = Packer(self._dataset, padded=student.padded, pin=student.model.device.type == "cuda")
        feed = self._feed(packer, indices, batch_tokens, -(-len(self._heldout) // world_size))
        found = measure(student, heads, feed, student.model.device, Silent())
        self._dataset.drop(indices.tolist())
        return {
            "rollout_kl": found["heldout_kl"],
            "rollout_reverse_kl": found["heldout_reverse_kl"],
            "rollout_top1_agreement": found["top1_agreement"],
            "rollout_tokens": found["num_tokens"],
        }

    def _feed(
        self, packer: Packer, indices: np.ndarray, batch_tokens: int, count: int
    ) -> Iterator[tuple[PackedBatch, int]]:
        """A batch a sample where samples are long; equally many on every rank."""
        for teacher in self._dataset.teachers:
            teacher.rows.want(indices)
        lengths = np.array([len(self._dataset.tokens(index).token_ids) for index in indices.tolist()], dtype=np.int64)
        cuts = cut_steps(indices, lengths, batch_tokens) if len(indices) else []
        for number in range(count):
            samples = cuts[number] if number < len(cuts) else indices[:0]
            yield (packer.pack(samples) if len(samples) else packer.empty()), 0
