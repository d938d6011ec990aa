"""The rollouts of a run as a file for each rank, OUTPUT/rollouts-00000.jsonl: for people, and for a run that goes on.

    {"step", "index", "sample", "number", "version", "ended", "logprob", "entropy", "token_ids", "logprobs", "text"}

is an answer; logprob and entropy are means, logprobs every token's, in as many digits as give the same float32 again.

A checkpoint keeps how long the files were. What was written after it is cut off; what was written ahead of its steps is
taken up again, so that a run that goes on trains on the answers that the weights of then had written.
Invariant: what a checkpoint counts is on the disk before the checkpoint is.
"""

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from kdpipe.manifests.errors import CorruptError
from kdpipe.manifests.run import ROLLOUTS
from kdpipe.stages.rollout.writer import Answer


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Rollout:
    """One answer of the student's own.

    index: in OwnAnswers; sample: whose prompt it answers; number: of its answers; version: optimizer steps that had
    made the weights that wrote it
    """

    index: int
    sample: int
    number: int
    version: int
    answer: Answer


class RolloutLog:
    """One rank's file, opened by its first use. text: what token ids say"""

    def __init__(self, output: Path, rank: int, text: Callable[[Sequence[int]], str]) -> None:
        self._output, self._path, self._text = output, output / ROLLOUTS.replace("*", f"{rank:05d}"), text

    def of_rank(self, rank: int) -> "RolloutLog":
        return RolloutLog(self._output, rank, self._text)

    @cached_property
    def _file(self) -> BinaryIO:
        return open(self._path, "ab")

    def write(self, step: int, rollouts: Sequence[Rollout]) -> None:
        for each in rollouts:
            ids = each.answer.token_ids.tolist()
            line = {
                "step": step,
                "index": each.index,
                "sample": each.sample,
                "number": each.number,
                "version": each.version,
                "ended": each.answer.ended,
                "logprob": float(each.answer.logprobs.mean()),
                "entropy": float(each.answer.entropies.mean()) if len(each.answer.entropies) else None,
                "token_ids": ids,
                "logprobs": [float(str(logprob)) for logprob in each.answer.logprobs],
                "text": self._text(ids),
            }
            self._file.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
        self._file.flush()

    def length(self) -> int:
        """Bytes, all on the disk."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return self._file.tell()

    def cut(self, length: int) -> None:
        """Back to what it was at a checkpoint; 0 at the start. Raises CorruptError where it is shorter."""
        found = self._file.tell()
        if found < length:
            raise CorruptError(
                f"{found:,} bytes, the checkpoint says {length:,}; put it back from a copy, or start again with "
                "--resume never",
                where=self._path,
            )
        self._file.truncate(length)
        self._file.seek(length)

    def ahead(self, step: int) -> dict[int, dict[int, Rollout]]:
        """Of all ranks: the rollouts of `step` and of steps after it, by step and index."""
        found: dict[int, dict[int, Rollout]] = {}
        for path in sorted(self._output.glob(ROLLOUTS)):
            with open(path, "rb") as file:
                for record in map(json.loads, file):
                    if record["step"] >= step:
                        found.setdefault(record["step"], {})[record["index"]] = _rollout(record)
        return found


def _rollout(record: dict[str, Any]) -> Rollout:
    """Entropies are their mean here."""
    ids = np.array(record["token_ids"], dtype=np.int32)
    answer = Answer(
        token_ids=ids,
        logprobs=np.array(record["logprobs"], dtype=np.float32),
        entropies=np.full(len(ids) if record["entropy"] is not None else 0, record["entropy"] or 0.0, np.float32),
        ended=record["ended"],
    )
    places = {name: record[name] for name in ("index", "sample", "number", "version")}
    return Rollout(answer=answer, **places)
