"""Progress on stderr and in events.jsonl: the pipeline's answer to kdpipe.manifests.progress.Progress.

On a terminal one line is rewritten in place; elsewhere there is a plain line at the begin, at the end and every ten
seconds between. events.jsonl has one JSON object a line, flushed as it happens, with "time" (unix seconds), "kind" and
the event's own fields; a "progress" event every ten seconds. Cost: a clock reading for each `advance`.
"""

import collections
import contextlib
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from io import BufferedWriter
from pathlib import Path
from typing import TextIO

from kdpipe.manifests.durable import disk_error
from kdpipe.manifests.errors import KdpipeError
from kdpipe.pipeline.output import to_json

REDRAW_S = 0.1
REPORT_S = 10.0
WINDOW_S = 30.0
"""The rate is that of the last half minute, so that work found finished at a resume does not flatter it."""
BAR = 20


class EventLog:
    """Events to a file, or nowhere.

    They are kept in memory until the path `after` exists and an event of kind `once` was seen, where those are given:
    a refused run leaves no file, not even in a cache that is there already.
    """

    def __init__(self, path: Path | None, *, after: Path | None = None, once: str | None = None) -> None:
        self._path, self._after, self._once = path, after, once
        self._waiting: list[str] = []
        self._file: BufferedWriter | None = None

    def write(self, kind: str, fields: dict[str, object]) -> None:
        if self._path is None:
            return
        self._waiting.append(to_json({"time": round(time.time(), 3), "kind": kind} | fields) + "\n")
        if kind == self._once:
            self._once = None
        if self._file is None and (self._once or (self._after is not None and not self._after.exists())):
            return
        try:
            if self._file is None:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._file = open(self._path, "ab")  # noqa: SIM115 - lives as long as the run
            self._file.write("".join(self._waiting).encode())
            self._file.flush()
        except OSError as err:
            raise disk_error(err, self._path) from err
        self._waiting.clear()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


class ConsoleProgress:
    """Progress for whoever looks at stderr, a person or a log file."""

    def __init__(
        self, log: EventLog, *, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._log, self._clock = log, clock
        self._stream = sys.stderr if stream is None else stream
        self._live = self._stream.isatty() and os.environ.get("TERM") != "dumb"
        self._task: str | None = None

    def begin(self, task: str, *, total: int | None, unit: str) -> None:
        self.end()
        self._task, self._total, self._unit = task, total, unit
        self._done, self._detail = 0, ""
        self._began = self._drawn = self._reported = self._clock()
        self._marks = collections.deque([(self._began, 0)])
        self._log.write("begin", {"task": task, "total": total, "unit": unit})
        self._draw()

    def advance(self, amount: int, detail: str = "") -> None:
        if self._task is None:
            return
        self._done += amount
        self._detail = detail or self._detail
        now = self._clock()
        if now - self._drawn < REDRAW_S:
            return
        self._drawn = now
        self._marks.append((now, self._done))
        while len(self._marks) > 2 and now - self._marks[1][0] > WINDOW_S:
            self._marks.popleft()
        report = now - self._reported >= REPORT_S
        if report:
            self._reported = now
            self._log.write("progress", self._fields())
        if report or self._live:
            self._draw()

    def end(self) -> None:
        if self._task is None:
            return
        seconds = self._clock() - self._began
        rate = f", {_number(self._done / seconds)} {self._unit}/s" if seconds > 0 and self._done else ""
        self._log.write("end", {"task": self._task, "done": self._done, "unit": self._unit, "seconds": seconds})
        detail = f", {self._detail}" if self._detail else ""
        self._line(f"{self._task}: {self._done:,} {self._unit} in {_duration(seconds)}{rate}{detail}")
        self._task = None

    def event(self, kind: str, **fields: object) -> None:
        self._log.write(kind, fields)

    def note(self, text: str) -> None:
        self._log.write("note", {"text": text})
        self._line(text)
        if self._live and self._task is not None:
            self._draw()

    def close(self) -> None:
        """Leave the cursor on a line of its own; a task that was not ended is not called done."""
        if self._task is not None and self._live:
            self._stream.write("\n")
            self._stream.flush()
        self._task = None
        self._log.close()

    def _rate(self) -> float | None:
        """Units a second over the last half minute, None before there is anything to go by."""
        (then, before), now = self._marks[0], self._clock()
        return (self._done - before) / (now - then) if now > then and self._done > before else None

    def _fields(self) -> dict[str, object]:
        fields = {"task": self._task, "done": self._done, "total": self._total, "unit": self._unit}
        return fields | {"rate": self._rate(), "detail": self._detail}

    def _draw(self) -> None:
        text = f"{self._task}: {self._state()}"
        if not self._live:
            self._line(text)
            return
        width = shutil.get_terminal_size().columns - 1
        self._stream.write(f"\r{text[:width]}\x1b[K")
        self._stream.flush()

    def _state(self) -> str:
        """[#####     ] 25% 3,000/12,000 tokens, 350 tokens/s, 0:25 left, loss 2.31"""
        done, total, rate = self._done, self._total, self._rate()
        if total is None:
            parts = [f"{done:,} {self._unit}"]
        else:
            share = min(done / total, 1.0) if total else 1.0
            filled = int(share * BAR)
            bar = f"[{'#' * filled}{' ' * (BAR - filled)}] " if self._live else ""
            parts = [f"{bar}{share:.0%} {done:,}/{total:,} {self._unit}"]
        if rate is not None:
            parts.append(f"{_number(rate)} {self._unit}/s")
            if total is not None and total > done:
                parts.append(f"{_duration((total - done) / rate)} left")
        return ", ".join(parts + ([self._detail] if self._detail else []))

    def _line(self, text: str) -> None:
        self._stream.write(f"\r\x1b[K{text}\n" if self._live else f"{text}\n")
        self._stream.flush()


@contextlib.contextmanager
def watch(command: str, log: EventLog, **fields: object) -> Iterator[ConsoleProgress]:
    """Progress for one run of a command: its begin, its end or its error are events too."""
    progress = ConsoleProgress(log)
    progress.event("run", command=command, host=platform.node(), pid=os.getpid(), **fields)
    try:
        yield progress
        progress.end()
        progress.event("finished")
    except KdpipeError as err:
        progress.event("failed", error=str(err), exit_code=err.exit_code)
        raise
    finally:
        progress.close()


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _duration(seconds: float) -> str:
    """3725 -> "1:02:05"."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
