"""Making a cache: the log in it of the command that fills it, and what of its work a signal leaves."""

import os
import time
from pathlib import Path

from kdpipe.manifests.cache import Cache
from kdpipe.manifests.made_with import RUNS
from kdpipe.manifests.plan import PLAN_FILE
from kdpipe.pipeline.progress import EventLog


def log_in(cache: Path) -> EventLog:
    """Events to a file of CACHE/runs, once the cache has a plan and the command has said which it is."""
    name = f"{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}-{os.getpid()}.jsonl"
    return EventLog(cache / RUNS / name, after=cache / PLAN_FILE, once="plan")


def kept_in(cache: Path) -> str:
    """What of the shards of a command that a signal ended is there."""
    if not (cache / PLAN_FILE).exists():
        return "nothing was written"
    opened = Cache.open(cache)
    return f"{len(opened.committed())} of {len(opened.plan.shards)} shards are finished and kept"
