"""The contract of a teacher engine: ids in, rows into their final place, an acknowledgement out.

An engine never sees text and never decides what is kept: the plan gives it batches of requests, each with the
positions to keep and the place in the shard's mapped file where those rows belong. What comes back is checked by the
gate, whatever engine it was. Engines are listed in `stages/teacher/__init__.py`.
"""

# Shapes: n tokens of one sample, R rows kept of it, K probed rows, E teacher width.

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np

if TYPE_CHECKING:
    from kdpipe.stages.teacher.head import Head


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class RowTarget:
    """Where the rows of one sample belong.

    array: [R, E] view of the shard's mapping, for an engine in this process
    path, offset: the same place as a file and a byte offset, for an engine in another process
    """

    array: np.ndarray
    path: Path
    offset: int


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Request:
    """One sample to run.

    sample: its index in the plan
    token_ids: int32 [n]
    positions: int64 [R], the positions whose head input is kept, ascending
    probes: int64 [K], indices into `positions` whose next-token log-probability the engine must report
    target: where the rows go
    """

    sample: int
    token_ids: np.ndarray
    positions: np.ndarray
    probes: np.ndarray
    target: RowTarget


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Ack:
    """What an engine says it did for one request.

    num_rows: rows written
    checksum: xxh3-64 of their bytes, taken by whoever wrote them
    probe_logprobs: float32 [K], the engine's own log p(token_ids[t+1] | token_ids[:t+1]) at the probed positions t,
        over the teacher's whole (padded) vocabulary, by the engine's own logits path, not from the stored rows
    """

    sample: int
    num_rows: int
    checksum: int
    probe_logprobs: np.ndarray


class TeacherEngine(Protocol):
    """Runs the teacher over planned batches. `determinism` says whether a repeated batch gives the same bits."""

    name: str
    version: str
    determinism: Literal["bitwise", "tolerance"]

    def canary(self, head: "Head", samples: Sequence[np.ndarray]) -> float:
        """Run a few samples (int32 [n] each) before anything is written; the relative error that was measured.

        Raises TeacherError where rows and head do not give the teacher's own logits.
        """
        ...

    def run(self, batches: Iterable[Sequence[Request]]) -> Iterator[Ack]:
        """Run the batches in order, one Ack a request, in the order of the requests.

        `batches` is consumed lazily; an engine may take the next ones before it yields the acks of the last.
        """
        ...

    def close(self) -> None:
        """Free the model and end whatever was started. Running it twice is fine."""
        ...
