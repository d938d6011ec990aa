"""Serve: the rows that students ask for, through the engine and the gate, into their rings.

    ring.asked -> request -> engine -> gate -> slot published        one ring a student's rank

A key is a sample of the plan, or a text that its ring was told of: an answer that the student wrote itself. One key
asks for another teacher, whose folder the ring was told of: this one is closed and that one opened in its place.

Invariant: nothing is published that the gate has not let through; what a rank asked for reaches it in its order.
Cost: the teacher's pass; rows are written into shared memory once, by the engine itself.
"""

import os
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path

import numpy as np

from kdpipe.manifests.cache import Cache
from kdpipe.manifests.errors import TeacherError, TemporaryError
from kdpipe.manifests.plan import Plan
from kdpipe.manifests.progress import Progress
from kdpipe.manifests.ring import PATIENCE_S, RingWriter, Slot, look_at_all, wait_for_any
from kdpipe.manifests.sample import SampleTokens, num_rows
from kdpipe.manifests.samples import Samples
from kdpipe.manifests.shard import DTYPES, TAGS
from kdpipe.stages.extract.requests import sample_request
from kdpipe.stages.extract.shards import try_out
from kdpipe.stages.extract.spec import ExtractSpec
from kdpipe.stages.extract.teach import teach
from kdpipe.stages.live.answers import UPDATE
from kdpipe.stages.live.kept import Kept, kept_folder
from kdpipe.stages.live.tee import Tee
from kdpipe.stages.models.folder import ModelFolder
from kdpipe.stages.models.head import Head
from kdpipe.stages.teacher import engine_class
from kdpipe.stages.teacher.describe import describe_teacher
from kdpipe.stages.teacher.engine import Ack, Request, RowTarget, TeacherEngine
from kdpipe.stages.teacher.gate import admit, check_identity
from kdpipe.stages.teacher.head import read_head


def serve(
    engine: TeacherEngine,
    head: Head,
    samples: Samples,
    rings: Sequence[RingWriter],
    progress: Progress,
    tee: Tee | None = None,
    kept: Kept | None = None,
) -> "NextTeacher | None":
    """Answer until every reader has said that it asks for nothing more, or one asks for another teacher: which one.

    samples: what the keys in the rings are indices of
    tee: keeps the planned samples' rows that pass by, and has what passed before
    kept: keeps those of texts that the rings were told of
    Raises the errors of the engine and the gate, TemporaryError where a reader is gone, and the error that one left.
    """
    shelf = RingShelf(samples, head, rings, engine.probe_every, tee, kept)
    teach(engine, shelf.batches(), shelf, admit, progress)
    if (following := shelf.next_teacher()) is not None:
        return following
    for ring in rings:
        ring.finish()
    return None


@dataclass(frozen=True, slots=True, eq=False)
class NextTeacher:
    """Another teacher that is asked for: its folder, and the ring of who asked."""

    folder: Path
    ring: RingWriter

    def is_there(self, digest: str) -> None:
        """Answer. digest: of what was opened"""
        words = np.frombuffer(digest.encode(), np.uint8)
        slot = self.ring.reserve(len(words), "the teacher's update")
        slot.array[:] = words
        self.ring.publish(slot, UPDATE)


class RingShelf:
    """The rings of some readers as a Shelf; `batches` is what they ask for, a sample at a time."""

    def __init__(
        self,
        samples: Samples,
        head: Head,
        rings: Sequence[RingWriter],
        probe_every: int,
        tee: Tee | None = None,
        kept: Kept | None = None,
    ) -> None:
        self._tee, self._kept = tee, kept
        self._samples, self._head, self._rings, self._probe_every = samples, head, rings, probe_every
        assert isinstance(samples.plan, Plan), "these samples have a teacher"
        self._plan = samples.plan
        self._dtype = DTYPES[TAGS[self._plan.settings.dtype]]
        self._row_bytes = self._plan.head.hidden_size * self._dtype.itemsize
        self._under_way: deque[tuple[RingWriter, Slot, SampleTokens]] = deque()
        self._num_served = 0

    @property
    def doing(self) -> str:
        return f"{self._num_served:,} samples served"

    def batches(self) -> Iterator[Sequence[Request]]:
        """One request a batch, the readers in turn; an empty one where nothing can be started just now."""
        turn = 0
        while True:
            look_at_all(self._rings, "what is asked for")
            turns = islice(cycle(range(len(self._rings))), turn, turn + len(self._rings))
            ready = next((at for at in turns if self._can_start(self._rings[at])), None)
            if ready is not None:
                turn = (ready + 1) % len(self._rings)
                if not self._again(self._rings[ready]):
                    yield [self._request(self._rings[ready])]
            elif self._under_way:
                yield []
            elif self._asked_to_update() or all(ring.ended and not ring.asked for ring in self._rings):
                return
            else:
                wait_for_any(self._rings, "the students", PATIENCE_S)

    def next_teacher(self) -> NextTeacher | None:
        """The one that is asked for next, where `batches` has ended for it."""
        if (ring := self._asked_to_update()) is None:
            return None
        ring.asked.popleft()
        return NextTeacher(Path(os.fsdecode(ring.told.pop(UPDATE))), ring)

    def _asked_to_update(self) -> RingWriter | None:
        return next((ring for ring in self._rings if ring.asked and ring.asked[0] == UPDATE), None)

    def place(self, sample: int, num_rows: int) -> RowTarget:
        """Of the request that was made last."""
        _, slot, _ = self._under_way[-1]
        array = slot.array.view(self._dtype).reshape(num_rows, self._plan.head.hidden_size)
        return RowTarget(array=array, path=Path(slot.path), offset=slot.offset)

    def accept(self, request: Request, ack: Ack) -> None:
        ring, slot, text = self._under_way.popleft()
        check_identity([request], [ack], self._head)
        if request.sample >= self._plan.num_samples:
            if self._kept is not None:
                self._kept.keep(request.sample, text, request.target.array, ack.checksum)
        elif self._tee is not None:
            self._tee.keep(request.sample, request.target.array)
        ring.publish(slot, request.sample, ack.checksum)
        self._num_served += 1

    def _can_start(self, ring: RingWriter) -> bool:
        if not ring.asked or ring.asked[0] == UPDATE:
            return False
        return ring.has_room(self._num_rows(ring.asked[0], ring) * self._row_bytes)

    def _num_rows(self, key: int, ring: RingWriter) -> int:
        return num_rows(self._text(key, ring).supervised, every=self._plan.settings.rows == "all")

    def _text(self, key: int, ring: RingWriter) -> SampleTokens:
        """Raises TemporaryError for a key that means nothing here."""
        if key < self._plan.num_samples:
            return self._samples.tokens(key)
        if key not in ring.told:
            raise TemporaryError("it was asked for and never told of; run the same command again", where=f"text {key}")
        return SampleTokens.from_bytes(ring.told[key])

    def _again(self, ring: RingWriter) -> bool:
        """Publish what a ring asks for next from what was kept; whether it was."""
        planned = ring.asked[0] < self._plan.num_samples
        rows = self._tee.rows(ring.asked[0]) if self._tee is not None and planned else None
        if rows is None:
            return False
        sample = ring.asked.popleft()
        slot = ring.reserve(rows.nbytes, f"sample {sample}")
        slot.array[:] = rows.view(np.uint8).reshape(-1)
        ring.publish(slot, sample)
        return True

    def _request(self, ring: RingWriter) -> Request:
        key = ring.asked.popleft()
        text, num_rows = self._text(key, ring), self._num_rows(key, ring)
        ring.told.pop(key, None)
        slot = ring.reserve(num_rows * self._row_bytes, f"sample {key}")
        self._under_way.append((ring, slot, text))
        return sample_request(self._plan, key, text, self._probe_every, self.place(key, num_rows))


def serve_plan(
    spec: ExtractSpec,
    cache: Cache,
    rings: Sequence[RingWriter],
    progress: Progress,
    *,
    tee: Path | None = None,
    output: Path,
) -> None:
    """A teacher's whole life beside its students: opened, tried on the first samples, asked until nobody asks more.

    cache: the plan whose samples are asked for; none of its rows need be there
    tee: where rows are kept: in this cache as its shards, or for another one the answers that students wrote; they are
        those of the first teacher
    output: of the students' run
    Raises as serve, and the errors of opening a teacher.
    """
    teacher = ModelFolder(spec.teacher, TeacherError, spec.options.trust)
    with _opened(teacher, spec, cache, progress) as (engine, head), ExitStack() as stack:
        shards = stack.enter_context(Tee(cache, progress)) if tee == cache.path else None
        kept = stack.enter_context(Kept(kept_folder(tee, output))) if tee is not None and shards is None else None
        following = serve(engine, head, cache.samples, rings, progress, shards, kept)
    while following is not None:
        teacher = teacher.at(following.folder)
        with _opened(teacher, spec, cache, progress) as (engine, head):
            following.is_there(teacher.digest())
            following = serve(engine, head, cache.samples, rings, progress)


@contextmanager
def _opened(
    teacher: ModelFolder, spec: ExtractSpec, cache: Cache, progress: Progress
) -> Iterator[tuple[TeacherEngine, Head]]:
    """An engine with the teacher in a folder, tried out, for the block; and its head."""
    plan = cache.plan
    head = read_head(describe_teacher(teacher, plan.settings.dtype))
    engine = engine_class(plan.engine.name)(
        teacher, dtype=plan.settings.dtype, device=spec.resolved_device(), options=spec.options
    )
    try:
        try_out(engine, plan.engine, head, cache.samples, progress)
        yield engine, head
    finally:
        engine.close()
