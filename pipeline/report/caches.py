"""Caches: what a teacher's pass has left behind and what it cost, from the cache's own records.

Cost: the name of each shard is looked at; no row is read.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kdpipe.manifests.cache import Cache
from kdpipe.manifests.errors import KdpipeError
from kdpipe.manifests.fitted import Choice, loss_of, open_fitted, source_codec
from kdpipe.manifests.made_with import LOG_NAME, RUNS, MadeWith, last_extraction


@dataclass(kw_only=True, slots=True)
class Pass:
    """What the extractions into a cache have done, all processes together.

    seconds: at work, a process that was killed up to its last event; failed ones included
    num_tokens, shard_seconds: of the shards that were written
    """

    num_runs: int = 0
    num_failed: int = 0
    seconds: float = 0.0
    shard_seconds: float = 0.0
    num_tokens: int = 0
    hosts: set[str] = field(default_factory=set)
    notes: dict[str, int] = field(default_factory=dict)

    @property
    def rate(self) -> float | None:
        """Tokens a second."""
        return self.num_tokens / self.shard_seconds if self.shard_seconds else None


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheInfo:
    """What is in a cache. codec: how rows are stored, and what was measured of it, in words by name"""

    num_samples: int
    num_tokens: int
    num_rows: int
    num_bytes: int
    num_shards: int
    num_committed: int
    heldout_fraction: float
    codec: dict[str, str]
    teacher: str
    engine: str
    fingerprint: str

    @property
    def is_complete(self) -> bool:
        return self.num_committed == self.num_shards


@dataclass(kw_only=True, slots=True)
class CacheStory:
    """A cache by its folder. info: None with an error where that cannot be read as a cache"""

    path: Path
    info: CacheInfo | None
    teacher: Pass
    made_with: MadeWith | None = None
    error: str = ""


def read_cache(path: Path) -> CacheStory:
    """A cache as its folder tells it, whatever of it is there."""
    teacher = _pass(path)
    try:
        opened = Cache.open(path)
        info: CacheInfo | None = _info(opened)
        error = ""
    except (KdpipeError, OSError) as err:
        info, error = None, str(err)
    return CacheStory(path=path, info=info, teacher=teacher, made_with=last_extraction(path), error=error)


def _info(cache: Cache) -> CacheInfo:
    plan, head = cache.plan, cache.plan.head
    return CacheInfo(
        num_samples=plan.num_samples,
        num_tokens=plan.num_tokens,
        num_rows=plan.num_rows,
        num_bytes=cache.num_bytes(),
        num_shards=len(plan.shards),
        num_committed=len(cache.committed()),
        heldout_fraction=plan.heldout_fraction,
        codec=_codec(cache) | {"rows": f"{head.hidden_size:,} wide, {plan.settings.dtype}"},
        teacher=f"{head.architecture}, {head.vocab_size:,} words",
        engine=f"{plan.engine.name} {plan.engine.version}, {plan.engine.determinism}",
        fingerprint=plan.fingerprint.overall(),
    )


def _codec(cache: Cache) -> dict[str, str]:
    """What it is and, of one that is fitted, what it takes and loses; of a side-car what that is."""
    sidecar, told = cache.plan.head.sidecar, {"codec": cache.plan.settings.codec}
    if sidecar is not None:
        told = {"side-car": sidecar.has, "serves": sidecar.serves, "bias": sidecar.bias}
        source, lost = source_codec(cache.plan), loss_of(cache.path, cache.plan)
        if source is not None:
            told["codec of its cache"] = source + ("" if lost is None else f", mean KL {lost:.2g} nats")
        return told
    if not Choice.read(told["codec"]).is_fitted:
        return told
    record = open_fitted(cache.path, cache.plan).record
    return told | {
        "bytes of a row": f"{record.share:.3f} of a raw one",
        "loss of the codec": f"mean KL {record.kl_mean:.2g} nats, 99th percentile {record.kl_p99:.2g}",
    }


def _pass(path: Path) -> Pass:
    """From the logs of its extractions; a stream that kept its rows writes none."""
    found = Pass()
    try:
        names = sorted(path.name for path in (path / RUNS).iterdir() if LOG_NAME.fullmatch(path.name))
    except OSError:
        return found
    for name in names:
        _add(found, _events(path / RUNS / name))
    return found


def _add(found: Pass, events: Iterable[dict[str, Any]]) -> None:
    began = last = None
    ended = False
    for event in events:
        last = event.get("time")
        match event.get("kind"):
            case "run":
                began, ended = last, False
                found.hosts.add(str(event.get("host")))
            case "shard":
                found.num_tokens += int(event.get("num_tokens") or 0)
                found.shard_seconds += float(event.get("seconds") or 0.0)
            case "note":
                text = str(event.get("text", ""))
                found.notes[text] = found.notes.get(text, 0) + 1
            case "finished":
                ended = True
    if isinstance(began, int | float) and isinstance(last, int | float):
        found.num_runs += 1
        found.num_failed += not ended
        found.seconds += max(last - began, 0.0)


def _events(path: Path) -> Iterator[dict[str, Any]]:
    """The whole lines of a log; one that a kill has torn is left out."""
    try:
        with open(path, "rb") as file:
            for line in file:
                try:
                    event = json.loads(line)
                except ValueError:
                    continue
                if isinstance(event, dict):
                    yield event
    except OSError:
        return
