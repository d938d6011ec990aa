"""Filling a cache: the shards that are missing, in order, each through the gate before it is committed.

    staged plan -> missing shards -> claimed -> requests -> teach (engine, gate) -> ShardShelf -> commits

Requests for the next shard are made as soon as the engine asks for them, so it works on while the last one is sealed.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from pathlib import Path

import numpy as np

from kdpipe.manifests.cache import Cache
from kdpipe.manifests.claims import Claims, sweep_claims
from kdpipe.manifests.errors import CorruptError
from kdpipe.manifests.fitted import Choice, open_fitted
from kdpipe.manifests.made_with import repair
from kdpipe.manifests.parts import missing_shards, shards_of, shards_to_make
from kdpipe.manifests.plan import PLAN_FILE, EngineRecord, Plan
from kdpipe.manifests.progress import Progress
from kdpipe.manifests.samples import Samples
from kdpipe.manifests.shard import commit_path, planned_bytes, shard_path
from kdpipe.stages.extract.calibrate import calibrate, few_rows
from kdpipe.stages.extract.requests import shard_requests
from kdpipe.stages.extract.shelf import ShardShelf
from kdpipe.stages.extract.spec import ExtractSpec
from kdpipe.stages.extract.staging import Staged, staged
from kdpipe.stages.extract.teach import teach
from kdpipe.stages.models.head import Head
from kdpipe.stages.teacher import engine_class
from kdpipe.stages.teacher.engine import Request, TeacherEngine
from kdpipe.stages.teacher.gate import admit

WAIT_S = 2.0
CANARIES = 3
CANARY_TOKENS = 64


def extract(spec: ExtractSpec, cache: Path, progress: Progress, part: tuple[int, int] | None = None) -> Cache:
    """Extract into `cache` what is missing there; the cache, open and (unless `part` is given) complete.

    part: (i, n) extracts the i-th of n equal ranges of shards, i from 1, for several writers of one cache.
    Raises the errors of planning, GateError, TeacherError for rows that are not finite, DriftError, SpaceError.
    """
    with staged(spec, cache, progress) as found, ExitStack() as stack:
        engine = None
        if found.lacks_codec:
            engine = _started(found, spec, stack, progress)
            found = _with_codec(found, engine, progress)
        if (found.cache / PLAN_FILE).exists():
            todo = shards_to_make(found.plan, found.cache, part, progress)
            require_whole(found.plan, found.cache)
        else:
            todo = missing_shards(found.plan, found.cache, part)
        sweep_claims(found.cache)
        progress.event("plan", digest=found.plan.digest, num_shards=len(found.plan.shards), missing=todo)
        if not todo:
            progress.note(_nothing_to_do(found.plan, found.cache, part))
            return found.publish()
        engine = engine or _started(found, spec, stack, progress)
        opened = found.publish()
        _note_few(opened, progress)
        fill(opened, engine, found.head, progress, todo)
        return opened


def _note_few(cache: Cache, progress: Progress) -> None:
    """A cache that grows keeps the codec that was fitted to its first samples."""
    if cache.plan.generation and Choice.read(cache.plan.settings.codec).is_fitted:
        fitted = open_fitted(cache.path, cache.plan)
        if fitted.is_of_few:
            progress.note(few_rows(fitted))


def _with_codec(found: Staged, engine: TeacherEngine, progress: Progress) -> Staged:
    """Fitted and in the cache: of writers that begin at once each may fit one, and what counts is the first one's."""
    found = found.as_published()
    if found.lacks_codec:
        samples, scratch = found.first_samples(), found.scratch
        found = found.with_codec(calibrate(found.plan, samples, found.head, engine, progress, scratch=scratch))
        found.publish()
    return found.as_published()


def _started(found: Staged, spec: ExtractSpec, stack: ExitStack, progress: Progress) -> TeacherEngine:
    """The plan's engine, tried out on a few samples; it ends with the stack."""
    progress.note(f"starting {found.plan.engine.name} with the teacher")
    engine = engine_class(found.plan.engine.name)(
        found.teacher, dtype=found.plan.settings.dtype, device=spec.resolved_device(), options=spec.options
    )
    stack.callback(engine.close)
    try_out(engine, found.plan.engine, found.head, found.samples(), progress)
    return engine


def require_whole(plan: Plan, cache: Path) -> None:
    """Every committed shard's file is there and has its size: a look at each name. Raises CorruptError."""
    for number in range(len(plan.shards)):
        path = shard_path(cache, number)
        if not commit_path(cache, number).exists():
            continue
        try:
            found, wanted = path.stat().st_size, planned_bytes(cache, plan, number)
        except FileNotFoundError:
            raise CorruptError("committed, but the file is gone", where=path, hint=repair(cache)) from None
        if found != wanted:
            raise CorruptError(f"{found:,} bytes, the plan says {wanted:,}", where=path, hint=repair(cache))


def fill(cache: Cache, engine: TeacherEngine, head: Head, progress: Progress, todo: Sequence[int]) -> None:
    """Run the engine over what nobody else is at work on, until every shard of `todo` is committed by somebody."""
    with closing(Claims(cache.path)) as claims:
        waited = False
        while todo:
            _fill_free(cache, engine, head, progress, claims, todo)
            todo = [number for number in todo if not commit_path(cache.path, number).exists()]
            if todo and all(claims.held_by_another(number) for number in todo):
                if not waited:
                    progress.note(f"waiting for other writers' {len(todo)} shards; a silent one's are taken over")
                waited = True
                time.sleep(WAIT_S)


def _fill_free(
    cache: Cache, engine: TeacherEngine, head: Head, progress: Progress, claims: Claims, todo: Sequence[int]
) -> None:
    """Run the engine over those of the shards that can be claimed."""
    free = [number for number in todo if not claims.held_by_another(number)]
    if not free:
        return
    progress.begin("extract", total=sum(cache.plan.shards[number].num_tokens for number in free), unit="tokens")
    with ShardShelf(cache, head, claims, progress) as shelf:
        teach(engine, _batches(cache, engine, shelf, free), shelf, admit, progress)
    progress.end()


def _batches(cache: Cache, engine: TeacherEngine, shelf: ShardShelf, todo: Sequence[int]) -> Iterator[list[Request]]:
    """The planned batches of every missing shard, made when the engine asks for them."""
    for number in todo:
        if shelf.open(number):
            yield from shard_requests(cache, number, engine.probe_every, shelf.place)


def try_out(engine: TeacherEngine, record: EngineRecord, head: Head, samples: Samples, progress: Progress) -> None:
    """Run the engine on the first few samples' first tokens; what they showed is for the log and whoever watches.

    Raises as TeacherEngine.canary.
    """
    first = samples.shard(0).column("token_ids")
    canary = engine.canary(head, [np.asarray(ids.values.to_numpy()[:CANARY_TOKENS]) for ids in first[:CANARIES]])
    progress.event(
        "canary",
        engine=record.name,
        version=record.version,
        logit_error=None if canary.skipped else canary.logit_error,
        row_error=None if canary.skipped else canary.row_error,
        skipped=canary.skipped,
    )
    if canary.skipped:
        progress.note(f"canary: not compared with transformers, {canary.skipped}")
    elif record.name != "transformers":
        progress.note(f"canary: rows differ from transformers' own by {canary.row_error:.1e}")


def _nothing_to_do(plan: Plan, cache: Path, part: tuple[int, int] | None) -> str:
    """Why no shard of a part is missing: it has none, or all of its own are there."""
    missing = len(missing_shards(plan, cache, None))
    if part is None or not missing:
        return "every shard is there already"
    counts = f"({len(plan.shards)} in all, {missing} missing)"
    if not shards_of(plan, part):
        return f"part {part[0]} of {part[1]} has none of the plan's shards {counts}: the others extract them"
    return f"every shard of part {part[0]} of {part[1]} is there already {counts}"
