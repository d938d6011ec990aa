"""Writers of a run: the student itself, or an engine beside it whose weights follow the student's.

follow(version)     the weights of now, proved to be there                  collective, as all of it
start(prompts)      -> result(), this rank's answers; an engine writes while the student trains
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from kdpipe.manifests.specs import Dtype
from kdpipe.stages.ranks import Ranks
from kdpipe.stages.rollout.decode import Ended
from kdpipe.stages.rollout.probe import Probe
from kdpipe.stages.rollout.sampling import Sampling
from kdpipe.stages.rollout.sglang_writer import SglangWriter
from kdpipe.stages.rollout.writer import Answer, Prompt
from kdpipe.stages.student import Student

PROBE_TOKENS = 64
"""Of the fixed text on which engine and student are compared after every update."""


class RunWriter(Protocol):
    """Writes the answers of a run, on every rank that rank's.

    is_apart: it writes while the student trains
    """

    @property
    def is_apart(self) -> bool: ...

    def follow(self, version: int) -> dict[str, float]:
        """Take the student's weights of now, made by so many steps; what to log of it. Nothing is being written then.

        Raises CheckFailed where they are not there after that.
        """

    def start(
        self, prompts: Sequence[Prompt], sampling: Sampling, seed: int, on_answer: Ended
    ) -> Callable[[], list[Answer]]:
        """Begin to write; what is returned waits for the answers.

        on_answer: may be called with an answer that has ended while others are still being written
        """

    def close(self) -> None:
        """End what was started. Running it twice is fine."""


@dataclass(frozen=True, slots=True, eq=False)
class StudentWriter:
    """The student itself, with the weights that it has."""

    student: Student
    vocab_size: int
    is_apart: bool = False

    def follow(self, version: int) -> dict[str, float]:
        return {}

    def start(
        self, prompts: Sequence[Prompt], sampling: Sampling, seed: int, on_answer: Ended
    ) -> Callable[[], list[Answer]]:
        answers = self.student.write(prompts, sampling, seed, self.vocab_size, on_answer)
        return lambda: answers

    def close(self) -> None:
        """There is nothing of its own."""


class EngineWriter:
    """An engine beside rank 0 that writes for all ranks.

    make: starts it, on rank 0
    text: int32 [n], what engine and student are compared on
    dtype: of the engine, which is that of the student's pass
    Cost: an update gathers the whole student on the host of rank 0, in that dtype.
    """

    is_apart = True

    def __init__(
        self, student: Student, ranks: Ranks, make: Callable[[], SglangWriter], text: np.ndarray, dtype: Dtype
    ) -> None:
        self._student, self._ranks, self._dtype = student, ranks, dtype
        self._text, self._probe = text[:PROBE_TOKENS], Probe(dtype)
        self._engine = make() if ranks.rank == 0 else None
        self._pool = ThreadPoolExecutor(1)
        self._version: int | None = None

    def follow(self, version: int) -> dict[str, float]:
        if version == self._version:
            return {}
        dtype = getattr(torch, self._dtype)
        weights = list(self._student.weights(dtype, keep=self._engine is not None, as_filed=True))
        ours = self._student.logprobs(self._text)
        self._version = version
        return self._ranks.together(lambda: self._updated(weights, ours, version))

    def start(
        self, prompts: Sequence[Prompt], sampling: Sampling, seed: int, on_answer: Ended
    ) -> Callable[[], list[Answer]]:
        asked = self._ranks.each(list(prompts))
        first = sum(len(each) for each in asked[: self._ranks.rank])
        written = None
        if self._engine is not None:
            everything = [prompt for each in asked for prompt in each]
            written = self._pool.submit(self._engine.write, everything, sampling, seed)

        def result() -> list[Answer]:
            own = self._ranks.together(lambda: [] if written is None else written.result())
            return self._ranks.from_first(lambda: own)[first : first + len(prompts)]

        return result

    def close(self) -> None:
        if self._engine is not None:
            self._engine.close()
        self._pool.shutdown(wait=False)

    def _updated(self, weights: list[tuple[str, torch.Tensor]], ours: np.ndarray, version: int) -> dict[str, float]:
        if self._engine is None:
            return {}
        report = self._engine.update(weights, version)
        found = self._probe.check(version, self._engine.logprobs(self._text), ours)
        return {
            "update/seconds": report.seconds,
            "update/num_tensors": report.num_tensors,
            "update/num_bytes": report.num_bytes,
            "update/gap": found,
        }
