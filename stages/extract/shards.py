"""Filling a cache: the shards that are missing, in order, each through the gate before it is committed.

Invariant: no row is committed that the gate has not seen. Requests for the next shard are made as soon as the engine
asks for them, so it works on while the last one is sealed.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from kdpipe.manifests.cache import Cache
from kdpipe.manifests.claims import Claims, sweep_claims
from kdpipe.manifests.durable import QUARANTINE, put_aside
from kdpipe.manifests.errors import CheckFailed, CorruptError, GateError
from kdpipe.manifests.made_with import repair
from kdpipe.manifests.plan import PLAN_FILE, Plan, Samples
from kdpipe.manifests.progress import Progress
from kdpipe.manifests.sample import row_positions
from kdpipe.manifests.shard import NO_DIGEST, ShardWriter, adopt, commit_path, shard_layout, shard_path
from kdpipe.stages.extract.planning import ExtractSpec
from kdpipe.stages.extract.staging import Staged, staged
from kdpipe.stages.teacher import ENGINES
from kdpipe.stages.teacher.engine import Ack, Canary, Request, RowTarget, TeacherEngine
from kdpipe.stages.teacher.gate import (
    check_ack,
    check_finite,
    check_identity,
    choose_probes,
    choose_scored,
    is_probed_inside,
)
from kdpipe.stages.teacher.head import Head

WAIT_S = 2.0
PROBES = 3
"""Rows of a sample whose log-probability is recomputed: the first, one between, the last."""
SEED_STRIDE = 1_000_003
"""Between the draws of two seeds: odd, so that other samples are probed inside."""
CANARIES = 3
CANARY_TOKENS = 64


def extract(spec: ExtractSpec, cache: Path, progress: Progress, part: tuple[int, int] | None = None) -> Cache:
    """Extract into `cache` what is missing there; the cache, open and (unless `part` is given) complete.

    part: (i, n) extracts the i-th of n equal ranges of shards, i from 1, for several writers of one cache.
    Raises the errors of planning, GateError, TeacherError for rows that are not finite, DriftError, SpaceError.
    """
    with staged(spec, cache, progress) as plan:
        todo = [
            number for number in missing_shards(plan.plan, plan.cache, part) if not _adopted(plan, number, progress)
        ]
        if (plan.cache / PLAN_FILE).exists():
            require_whole(plan.plan, plan.cache)
        sweep_claims(plan.cache)
        progress.event("plan", digest=plan.plan.digest, num_shards=len(plan.plan.shards), missing=todo)
        if not todo:
            progress.note(_nothing_to_do(plan.plan, plan.cache, part))
            return plan.publish()
        kind = ENGINES[plan.plan.engine.name]
        progress.note(f"starting {plan.plan.engine.name} with the teacher")
        engine = kind.open(spec.teacher, plan.plan.settings.dtype, spec.resolved_device(), spec.options)
        try:
            _report(engine, engine.canary(plan.head, _canaries(plan.samples())), progress)
            opened = plan.publish()
            fill(opened, engine, plan.head, progress, todo)
        finally:
            engine.close()
        return opened


def require_whole(plan: Plan, cache: Path) -> None:
    """Every committed shard's file is there and has its size: a look at each name. Raises CorruptError."""
    for number in range(len(plan.shards)):
        path = shard_path(cache, number)
        if not commit_path(cache, number).exists():
            continue
        try:
            found, wanted = path.stat().st_size, shard_layout(plan, number, NO_DIGEST).num_bytes
        except FileNotFoundError:
            raise CorruptError("committed, but the file is gone", where=path, hint=repair(cache)) from None
        if found != wanted:
            raise CorruptError(f"{found:,} bytes, the plan says {wanted:,}", where=path, hint=repair(cache))


def fill(cache: Cache, engine: TeacherEngine, head: Head, progress: Progress, todo: Sequence[int]) -> None:
    """Run the engine over what nobody else is at work on, until every shard of `todo` is committed by somebody."""
    with closing(Claims(cache.path)) as claims:
        filling, waited = Filling(cache, engine, head, progress, claims), False
        while todo:
            filling.run(todo)
            todo = [number for number in todo if not commit_path(cache.path, number).exists()]
            if todo and all(claims.held_by_another(number) for number in todo):
                if not waited:
                    progress.note(f"waiting for other writers' {len(todo)} shards; a silent one's are taken over")
                waited = True
                time.sleep(WAIT_S)


def _report(engine: TeacherEngine, canary: Canary, progress: Progress) -> None:
    """What the canary samples showed, for the log and for whoever watches."""
    progress.event(
        "canary",
        engine=engine.name,
        version=engine.version,
        logit_error=None if canary.skipped else canary.logit_error,
        row_error=None if canary.skipped else canary.row_error,
        skipped=canary.skipped,
    )
    if canary.skipped:
        progress.note(f"canary: not compared with transformers, {canary.skipped}")
    elif engine.name != "transformers":
        progress.note(f"canary: rows differ from transformers' own by {canary.row_error:.1e}")


def _adopted(plan: Staged, number: int, progress: Progress) -> bool:
    """Whether a shard was only in want of its commit record; one that is not what its header says is put aside."""
    try:
        return (plan.cache / PLAN_FILE).exists() and adopt(plan.cache, plan.plan, number)
    except CheckFailed as err:
        put_aside(plan.cache, shard_path(plan.cache, number))
        progress.note(f"{err}; it is in {QUARANTINE}/ now and is made again")
        return False


def missing_shards(plan: Plan, cache: Path, part: tuple[int, int] | None) -> list[int]:
    """Numbers of the shards without a commit record, those of one part of each generation where one is asked for."""
    return [number for number in _shards_of(plan, part) if not commit_path(cache, number).exists()]


def _shards_of(plan: Plan, part: tuple[int, int] | None) -> list[int]:
    """Numbers of the shards of a part; all of them without one."""
    index, count = part or (1, 1)
    return [
        number
        for brought in plan.brought()
        for number in brought[len(brought) * (index - 1) // count : len(brought) * index // count]
    ]


def _nothing_to_do(plan: Plan, cache: Path, part: tuple[int, int] | None) -> str:
    """Why no shard of a part is missing: it has none, or all of its own are there."""
    missing = len(missing_shards(plan, cache, None))
    if part is None or not missing:
        return "every shard is there already"
    counts = f"({len(plan.shards)} in all, {missing} missing)"
    if not _shards_of(plan, part):
        return f"part {part[0]} of {part[1]} has none of the plan's shards {counts}: the others extract them"
    return f"every shard of part {part[0]} of {part[1]} is there already {counts}"


@dataclass(slots=True, eq=False)
class OpenShard:
    """A shard on its way: its writer, its requests in the engine's order, the acks that came so far."""

    number: int
    writer: ShardWriter
    requests: list[Request]
    acks: list[Ack] = field(default_factory=list)


class Filling:
    """Runs the engine over the missing shards and commits each when its last ack is in."""

    def __init__(self, cache: Cache, engine: TeacherEngine, head: Head, progress: Progress, claims: Claims) -> None:
        self._cache, self._engine, self._head, self._progress = cache, engine, head, progress
        self._claims = claims
        self._open: list[OpenShard] = []

    def run(self, todo: Sequence[int]) -> None:
        """Fill those of the shards that can be claimed."""
        shards = self._cache.plan.shards
        free = [number for number in todo if not self._claims.held_by_another(number)]
        if not free:
            return
        self._progress.begin("extract", total=sum(shards[number].num_tokens for number in free), unit="tokens")
        started = time.perf_counter()
        try:
            for ack in self._engine.run(self._batches(free)):
                while self._engine.notes:
                    self._progress.note(self._engine.notes.pop(0))
                shard = self._open[0]
                request = shard.requests[len(shard.acks)]
                check_ack(request, ack)
                check_finite(request)
                shard.acks.append(ack)
                self._claims.keep()
                self._progress.advance(len(request.token_ids), f"shard {shard.number + 1}/{len(shards)}")
                if len(shard.acks) == len(shard.requests):
                    self._seal(shard, started)
                    started = time.perf_counter()
            if self._open:
                done = len(self._open[0].acks)
                raise GateError(
                    f"the engine stopped after {done} of {len(self._open[0].requests)} samples; run it again",
                    where=f"shard {self._open[0].number}",
                )
        finally:
            for shard in self._open:
                shard.writer.__exit__()
        self._progress.end()

    def _seal(self, shard: OpenShard, started: float) -> None:
        """The last look, then the commit."""
        error = check_identity(shard.requests, shard.acks, self._head)
        commit = shard.writer.commit()
        shard.writer.__exit__()
        self._open.remove(shard)
        self._claims.drop(shard.number)
        self._progress.event(
            "shard",
            shard=shard.number,
            num_tokens=self._cache.plan.shards[shard.number].num_tokens,
            num_bytes=commit.num_bytes,
            digest=commit.digest,
            worst_logprob_error=error,
            seconds=time.perf_counter() - started,
        )

    def _batches(self, todo: Sequence[int]) -> Iterator[list[Request]]:
        """The planned batches of every missing shard, made when the engine asks for them."""
        plan = self._cache.plan
        for number in todo:
            if commit_path(self._cache.path, number).exists() or not self._claims.take(number):
                continue
            samples = self._cache.samples.shard(number)
            writer = ShardWriter(self._cache.path, plan, number, samples)
            batches = shard_requests(self._cache, number, self._engine.probe_every, partial(_place, writer))
            self._open.append(
                OpenShard(number=number, writer=writer, requests=[request for batch in batches for request in batch])
            )
            yield from batches


def _place(writer: ShardWriter, first_row: int, num_rows: int) -> RowTarget:
    array, offset = writer.rows(first_row, num_rows)
    return RowTarget(array=array, path=writer.path, offset=offset)


def shard_requests(
    cache: Cache, number: int, probe_every: int, place: Callable[[int, int], RowTarget]
) -> list[list[Request]]:
    """The planned batches of a shard; `place(first_row, num_rows)` says where a sample's rows go."""
    plan, samples = cache.plan, cache.samples.shard(number)
    columns = {name: samples.column(name).to_numpy() for name in ("batch", "first_row", "num_rows", "num_tokens")}
    token_ids = samples.column("token_ids").values.to_numpy()
    supervised = samples.column("supervised").values.to_numpy(zero_copy_only=False)
    starts = np.cumsum(columns["num_tokens"]) - columns["num_tokens"]
    batches: list[list[Request]] = [[] for _ in range(int(columns["batch"].max()) + 1)]
    for index, start in enumerate(starts):
        stop = start + columns["num_tokens"][index]
        sample = plan.shards[number].first_sample + index
        num_rows = int(columns["num_rows"][index])
        draw = sample + plan.settings.seed * SEED_STRIDE
        ids = token_ids[start:stop]
        positions = row_positions(supervised[start:stop], every=plan.settings.rows == "all")
        count = PROBES if is_probed_inside(draw, probe_every) else 1
        probes = choose_probes(draw, num_rows, count)
        request = Request(
            sample=sample,
            token_ids=ids,
            positions=positions,
            probes=probes,
            scored=choose_scored(draw, ids, positions[probes], plan.head.vocab_size),
            target=place(int(columns["first_row"][index]), num_rows),
        )
        batches[int(columns["batch"][index])].append(request)
    return batches


def _canaries(samples: Samples) -> list[np.ndarray]:
    """The first few samples' first tokens, int32 [n] each."""
    first = samples.shard(0).column("token_ids")
    return [np.asarray(ids.values.to_numpy()[:CANARY_TOKENS]) for ids in first[:CANARIES]]
