"""The contract of a teacher engine: ids in, rows into their final place, an acknowledgement out.

An engine never sees text and never decides what is kept: the plan gives it batches of requests, each with the
positions to keep and the place in the shard's mapped file where those rows belong. What comes back is checked by the
gate, whatever engine it was. Engines are listed in `stages/teacher/__init__.py`.
"""

# Shapes: n tokens of one sample, R rows kept of it, K probed rows, M scored ids of each, E teacher width.

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np

from kdpipe.manifests.engine import EngineOptions
from kdpipe.manifests.specs import Device, Dtype

if TYPE_CHECKING:
    from kdpipe.stages.models.folder import ModelFolder
    from kdpipe.stages.models.head import Head

Determinism = Literal["bitwise", "tolerance"]


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
    probes: int64 [K], indices into `positions` at which the engine must report log-probabilities
    scored: int64 [K, M], the ids whose log-probability is wanted there; the first of each row is the next token
    target: where the rows go
    """

    sample: int
    token_ids: np.ndarray
    positions: np.ndarray
    probes: np.ndarray
    scored: np.ndarray
    target: RowTarget


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Ack:
    """What an engine says it did for one request.

    num_rows: rows written
    checksum: xxh3-64 of their bytes, taken by whoever wrote them
    probe_rows: [K, E] the rows where probe_logprobs were taken, if that was another forward than the stored rows came
        from; None where it was the same
    probe_logprobs: float32 [K, M], the engine's own log p(scored id | token_ids[:t+1]) at the probed positions t,
        over the teacher's whole (padded) vocabulary, by the engine's own logits path, not from the stored rows
    """

    sample: int
    num_rows: int
    checksum: int
    probe_logprobs: np.ndarray
    probe_rows: np.ndarray | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Canary:
    """What a few samples showed before anything was written; root mean square of differences over that of the values.

    logit_error: logits of rows and head, by the formula of HeadRecord, against transformers' own
    row_error: rows of the engine against transformers' own; 0 where the engine is transformers
    skipped: why the two could not be compared, "" where they were
    """

    logit_error: float
    row_error: float
    skipped: str = ""


class TeacherEngine(Protocol):
    """Runs the teacher over planned batches.

    batches_itself: a planned batch is not run as one
    probe_every: of how many samples one is probed at several rows, the others at their last one only; scoring rows
        anywhere in a prompt costs some engines the head on every token
    notes: what it has to say to whoever watches, oldest first; a reader takes them out
    """

    batches_itself: bool
    probe_every: int
    notes: list[str]

    def __init__(self, folder: "ModelFolder", *, dtype: Dtype, device: Device, options: EngineOptions) -> None:
        """It may start only when it is used."""
        ...

    @classmethod
    def version(cls) -> str:
        """Names its libraries. Raises ConfigError where they are absent or were not tried."""
        ...

    @classmethod
    def determinism(cls, device: Device, options: EngineOptions) -> Determinism:
        """Whether the same planned batch gives the same bits again. Raises ConfigError for options it cannot have."""
        ...

    def canary(self, head: "Head", samples: Sequence[np.ndarray]) -> "Canary":
        """Run a few samples (int32 [n] each) before anything is written; what was measured.

        Raises TeacherError where rows and head do not give the teacher's own logits, or rows are not transformers' own.
        """
        ...

    def run(self, batches: Iterable[Sequence[Request]]) -> Iterator[Ack]:
        """Run the batches in order, one Ack a request, in the order of the requests.

        `batches` is consumed lazily; an engine may take the next ones before it yields the acks of the last. An empty
        batch says that nothing more is to be had just now: the acks of those before it must be yielded first.
        """
        ...

    def close(self) -> None:
        """Free the model and end whatever was started. Running it twice is fine."""
        ...
