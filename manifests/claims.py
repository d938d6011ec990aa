"""Claims: who is working on which shard, so that several writers of one cache share the work. Only advice.

A claim is a file claims/NNNNNN.json, alive while its modification time is younger than CLAIM_S; its holder touches it
on the way. What must hold without it (a writer that was stopped and wakes, two that claim at once) is the commit
protocol's business: equal bytes are fine, others are refused.
Invariant: nothing here is waited for without a bound, and a lost claim costs work, never bytes.
"""

import contextlib
import json
import os
import platform
import time
from pathlib import Path

from kdpipe.manifests.durable import read_small
from kdpipe.manifests.errors import LayoutError
from kdpipe.manifests.shard import commit_path

CLAIM_S = 600.0
"""Longest silence of a writer at work; a shard takes seconds to minutes."""

WRITING_S = 5.0
"""Longest time for which a claim is empty; a power cut may leave it so."""

MAX_CLAIM_BYTES = 1 << 12


class Claims:
    """The claims on one cache, as one writer sees them."""

    def __init__(self, cache: Path, *, seconds: float | None = None) -> None:
        """seconds: of silence after which a writer counts as gone, CLAIM_S without"""
        self._cache, self._folder = cache, cache / "claims"
        self._seconds = CLAIM_S if seconds is None else seconds
        self._mine: set[int] = set()
        self._touched = time.monotonic()
        self._folder.mkdir(exist_ok=True)
        self._ahead = self._clock_ahead()

    def path(self, number: int) -> Path:
        return self._folder / f"{number:06d}.json"

    def take(self, number: int) -> bool:
        """Claim a shard; False where another writer is at work on it. Of several that claim at once one has it."""
        with contextlib.suppress(OSError):  # no room for advice: the work goes on
            try:
                self._write(number, os.O_EXCL)
            except FileExistsError:
                if self.held_by_another(number):
                    return False
                # No link is followed and no pipe waited for: others may have filled the folder.
                self._write(number, os.O_TRUNC | os.O_NOFOLLOW | os.O_NONBLOCK)
        self._mine.add(number)
        return True

    def _write(self, number: int, flags: int) -> None:
        with open(os.open(self.path(number), os.O_WRONLY | os.O_CREAT | flags, 0o666), "w") as file:
            file.write(json.dumps({"host": platform.node(), "pid": os.getpid()}))

    def held_by_another(self, number: int) -> bool:
        """Whether a living claim of somebody else is on the shard."""
        if number in self._mine:
            return False
        try:
            age = time.time() + self._ahead - self.path(number).stat().st_mtime
            text = read_small(self.path(number), MAX_CLAIM_BYTES)
            holder = json.loads(text) if text else None
        except (OSError, ValueError, LayoutError):
            return False  # none, gone by now, or nothing that we wrote
        longest = self._seconds if text else min(self._seconds, WRITING_S)
        # Of the future by more than clocks differ: nobody keeps it alive, and it would count for ever.
        return -longest < age < longest and not _is_dead(holder)

    def keep(self) -> None:
        """Say that this writer is alive; cheap enough for every sample."""
        if time.monotonic() - self._touched < self._seconds / 20:
            return
        self._touched = time.monotonic()
        for number in self._mine:
            with contextlib.suppress(OSError):
                os.utime(self.path(number))

    def drop(self, number: int) -> None:
        """The shard is committed, or given up."""
        self._mine.discard(number)
        with contextlib.suppress(OSError):
            self.path(number).unlink(missing_ok=True)

    def close(self) -> None:
        for number in list(self._mine):
            self.drop(number)

    def _clock_ahead(self) -> float:
        """Seconds by which the file system's clock is ahead of this machine's: a server has its own."""
        try:
            os.utime(self._folder)
            return self._folder.stat().st_mtime - time.time()
        except OSError:
            return 0.0


def sweep_claims(cache: Path) -> None:
    """Remove the claims on shards that are committed, as a kill right after the commit leaves them."""
    for path in (cache / "claims").glob("*.json"):
        if path.stem.isdecimal() and commit_path(cache, int(path.stem)).exists():
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)


def _is_dead(holder: object) -> bool:
    """Whether a claim's holder was a process of this machine that is no more."""
    if not isinstance(holder, dict) or holder.get("host") != platform.node() or not isinstance(holder.get("pid"), int):
        return False
    return not Path(f"/proc/{holder['pid']}").exists()
