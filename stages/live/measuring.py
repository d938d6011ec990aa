"""Measuring on-policy: the student answers held-out prompts, and is compared with its teacher on what it wrote."""

from collections.abc import Iterator, Sequence

import numpy as np

from kdpipe.manifests.progress import Silent
from kdpipe.stages.evaluate import measure
from kdpipe.stages.feed.order import cut_steps
from kdpipe.stages.feed.packing import PackedBatch, Packer
from kdpipe.stages.live.answers import MEASURED, OwnAnswers
from kdpipe.stages.ranks import Ranks
from kdpipe.stages.rollout.sampling import Sampling
from kdpipe.stages.rollout.writer import Prompt
from kdpipe.stages.student import Student, TeacherHead

MEASURED_ANSWERS = 128
"""Answers that are measured in each evaluation: to the first held-out prompts by content, one each, or ..."""
MOST_EACH = 4
"""... up to so many to each where there are fewer prompts, as single answers differ much."""
MEASURED_SEED = 0x6D656173
"""Keeps the draws of an evaluation apart from those of steps: they are the same in each, so that it is comparable."""
FIGURES = {
    "rollout_kl": "heldout_kl",
    "rollout_reverse_kl": "heldout_reverse_kl",
    "rollout_top1_agreement": "top1_agreement",
    "rollout_tokens": "num_tokens",
    "rollout_exact_tokens": "exact_tokens",
}
"""What of the measured figures is said, by its name; the last one across tokenizers, where it is what the others are
over."""


class Measuring:
    """heldout: samples whose prompts are answered, the first of them, in every evaluation with the same draws"""

    def __init__(self, dataset: OwnAnswers, heldout: np.ndarray, sampling: Sampling) -> None:
        self._dataset, self._sampling = dataset, sampling
        drawn = sampling.temperature > 0.0
        times = min(MEASURED_ANSWERS // max(len(heldout), 1), MOST_EACH) if drawn else 1
        again = [heldout[:MEASURED_ANSWERS] + time * len(dataset) for time in range(max(times, 1))]
        self._keys = np.concatenate(again)
        """Of the answers: a sample, and how often it was answered before, times the number of samples."""

    def measure(
        self, student: Student, heads: Sequence[TeacherHead], ranks: Ranks | None, batch_tokens: int
    ) -> dict[str, float]:
        """KL in both directions and agreement on the student's own answers to held-out prompts; {} without any."""
        rank, world_size = (0, 1) if ranks is None else (ranks.rank, ranks.world_size)
        mine = self._keys[rank::world_size]
        if not len(self._keys):
            return {}
        asked = mine % len(self._dataset)
        answers = student.write(
            [Prompt(key=key, token_ids=self._dataset.prompt(sample)) for key, sample in _pairs(mine, asked)],
            self._sampling,
            MEASURED_SEED,
            self._dataset.vocab_size or heads[0].vocab_size,
        )
        indices = MEASURED + mine
        for (index, sample), answer in zip(_pairs(indices, asked), answers, strict=True):
            self._dataset.add(index, sample, answer, imitated=True)
        packer = Packer(self._dataset, padded=student.padded, pin=student.model.device.type == "cuda")
        feed = self._feed(packer, indices, batch_tokens, -(-len(self._keys) // world_size))
        found = measure(student, heads, feed, student.model.device, Silent())
        self._dataset.drop(indices.tolist())
        return {name: found[measured] for name, measured in FIGURES.items() if measured in found}

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


def _pairs(indices: np.ndarray, samples: np.ndarray) -> Iterator[tuple[int, int]]:
    return zip(indices.tolist(), samples.tolist(), strict=True)
