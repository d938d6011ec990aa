"""Teach: an engine's answers through the gate and onto a shelf, one request after the other.

    batches -> engine.run -> ack -> gate -> shelf.accept

What lies behind the shelf, a shard of a cache or a ring that a student reads, is not known here.
Invariant: nothing is accepted that the gate has not let through, in the order in which it was asked for.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol

from kdpipe.manifests.errors import GateError
from kdpipe.manifests.progress import Progress
from kdpipe.stages.teacher.engine import Ack, Request, RowTarget, TeacherEngine


class Shelf(Protocol):
    """Where a teacher's rows go. Rows always lie in a file; only their place travels.

    doing: what is being filled, in a few words for whoever watches
    """

    @property
    def doing(self) -> str: ...

    def place(self, sample: int, num_rows: int) -> RowTarget:
        """Where the rows of a sample are to be written."""

    def accept(self, request: Request, ack: Ack) -> None:
        """They are there, and the gate has let them through; the last of a shard commits it."""


def teach(
    engine: TeacherEngine,
    batches: Iterable[Sequence[Request]],
    shelf: Shelf,
    gate: Callable[[Request, Ack], None],
    progress: Progress,
) -> None:
    """Run the engine over the batches, whose targets are places of the shelf.

    gate: raises for an answer that is not to be accepted
    Raises GateError, TeacherError for rows that are not finite, and what the shelf raises.
    """
    waiting: deque[Request] = deque()
    num_done = 0

    def asked() -> Iterator[Sequence[Request]]:
        for batch in batches:
            waiting.extend(batch)
            yield batch

    for ack in engine.run(asked()):
        while engine.notes:
            progress.note(engine.notes.pop(0))
        request = waiting.popleft()
        gate(request, ack)
        num_done += 1
        progress.advance(len(request.token_ids), shelf.doing)
        shelf.accept(request, ack)
    if waiting:
        raise GateError(
            f"the engine stopped after {num_done} of {num_done + len(waiting)} samples; run it again",
            where=shelf.doing,
        )
