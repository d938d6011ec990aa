"""Progress on stderr and in events.jsonl: the pipeline's answer to kdpipe.manifests.progress.Progress.

On a terminal one line is rewritten in place; elsewhere there is a plain line at the begin, at the end and every ten
seconds between. events.jsonl has one JSON object a line, flushed as it happens, with "time" (unix seconds), "kind" and
the event's own fields; a "progress" event every ten seconds. The last event says how the run ended: "finished",
"failed", "interrupted", "terminated" or "crashed"; without one of them it runs, or was killed.
Invariant: an event or a line that cannot be written is lost, said once, and never an error of the run.
Cost: a clock reading for each `advance`.
"""

import collections
import contextlib
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TextIO

from kdpipe.manifests.errors import stopped
from kdpipe.pipeline.endings import ending
from kdpipe.pipeline.exporters import Exporters
from kdpipe.pipeline.machine import environment
from kdpipe.pipeline.output import to_json
from kdpipe.pipeline.streams import lost

REDRAW_S = 0.1
REPORT_S = 10.0
WINDOW_S = 30.0
"""The rate is that of the last half minute, so that work found finished at a resume does not flatter it."""
BAR = 20
NARROWEST_BAR = 8


class EventLog:
    """Events to a file, or nowhere.

    They are kept in memory until the path `after` exists and an event of kind `once` was seen, where those are given:
    a refused run leaves no file, not even in a cache that is there already.

    exporters: are given each event that goes to the file, whether it can be written or not
    """

    def __init__(
        self,
        path: Path | None,
        *,
        after: Path | None = None,
        once: str | None = None,
        exporters: Exporters | None = None,
    ) -> None:
        self.path, self._after, self._once, self._exporters = path, after, once, exporters
        self._waiting: list[str] = []
        self._file: int | None = None
        self.error: OSError | None = None
        """Why events were lost, the first time; None while none was."""

    def write(self, kind: str, fields: dict[str, object]) -> None:
        """Write an event, or lose it: each is tried anew, so that a disk that has room again gets the later ones."""
        if self.path is None:
            return
        self._waiting.append(to_json({"time": round(time.time(), 3), "kind": kind} | fields) + "\n")
        if kind == self._once:
            self._once = None
        if self._file is None and (self._once or (self._after is not None and not self._after.exists())):
            return
        lines, self._waiting = self._waiting, []
        if self._exporters is not None:
            for line in lines:
                self._exporters.take(line)
        data = "".join(lines).encode("utf-8", "backslashreplace")
        try:
            if self._file is None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._file = _open_to_append(self.path)
            while data:
                data = data[os.write(self._file, data) :]
        except OSError as err:
            self.error = self.error or err
            self.close()

    def problems(self) -> list[str]:
        """What the exporters have to say, once."""
        if self._exporters is None:
            return []
        said, self._exporters.problems = self._exporters.problems, []
        return said

    def close(self) -> None:
        """The file; a later event opens it again."""
        if self._file is not None:
            with contextlib.suppress(OSError):
                os.close(self._file)
        self._file = None

    def end(self) -> None:
        """The file and what the exporters have open: no event follows."""
        self.close()
        if self._exporters is not None:
            self._exporters.close()


def _open_to_append(path: Path) -> int:
    """A descriptor at the end of the file, on a line of its own: a full disk may have torn the last one."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
    size = os.fstat(descriptor).st_size
    if size and os.pread(descriptor, 1, size - 1) != b"\n":
        os.write(descriptor, b"\n")
    return descriptor


class ConsoleProgress:
    """Progress for whoever looks at stderr, a person or a log file."""

    def __init__(
        self, log: EventLog, *, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._log, self._clock = log, clock
        self._stream = sys.stderr if stream is None else stream
        self._live = self._stream.isatty() and os.environ.get("TERM") != "dumb"
        self._task: str | None = None
        self._said: set[str] = set()

    def begin(self, task: str, *, total: int | None, unit: str) -> None:
        self.end()
        self._task, self._total, self._unit = task, total, unit
        self._done, self._detail = 0, ""
        self._began = self._drawn = self._reported = self._clock()
        self._marks = collections.deque([(self._began, 0)])
        self._record("begin", {"task": task, "total": total, "unit": unit})
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
            self._record("progress", self._fields())
        if report or self._live:
            self._draw()

    def end(self) -> None:
        if self._task is None:
            return
        seconds = self._clock() - self._began
        rate = f", {_number(self._done / seconds)} {self._unit}/s" if seconds > 0 and self._done else ""
        self._record("end", {"task": self._task, "done": self._done, "unit": self._unit, "seconds": seconds})
        detail = f", {self._detail}" if self._detail else ""
        self._line(f"{self._task}: {self._done:,} {self._unit} in {duration(seconds)}{rate}{detail}")
        self._task = None

    def event(self, kind: str, **fields: object) -> None:
        self._record(kind, fields)

    def note(self, text: str) -> None:
        self._record("note", {"text": text})
        self._line(text)
        if self._live and self._task is not None:
            self._draw()

    def close(self) -> None:
        """Leave the cursor on a line of its own; a task that was not ended is not called done."""
        if self._task is not None and self._live:
            self._put("\n")
        self._task = None
        self._log.end()
        for problem in self._log.problems():
            self._line(problem)

    def _rate(self) -> float | None:
        """Units a second over the last half minute, None before there is anything to go by."""
        (then, before), now = self._marks[0], self._clock()
        return (self._done - before) / (now - then) if now > then and self._done > before else None

    def _fields(self) -> dict[str, object]:
        fields = {"task": self._task, "done": self._done, "total": self._total, "unit": self._unit}
        return fields | {"rate": self._rate(), "detail": self._detail}

    def _draw(self) -> None:
        if self._live:
            self._put(f"\r{self._fitting(_columns(self._stream) - 1)}\x1b[K")
        else:
            self._line(f"{self._task}: {', '.join(self._parts())}")

    def _parts(self) -> list[str]:
        """What there is to say, the most wanted first: loss 2.31 | 35 tokens/s | 0:25 left | 25% 3,000/12,000 tokens"""
        done, total, rate = self._done, self._total, self._rate()
        parts = [self._detail] if self._detail else []
        if rate is not None:
            parts.append(f"{_number(rate)} {self._unit}/s")
            if total is not None and total > done:
                parts.append(f"{duration((total - done) / rate)} left")
        counted = f"{done:,}" if total is None else f"{self._share():.0%} {done:,}/{total:,}"
        return [*parts, f"{counted} {self._unit}"]

    def _share(self) -> float:
        return min(self._done / self._total, 1.0) if self._total else 1.0

    def _fitting(self, width: int) -> str:
        """The parts that fit, from the first; the bar takes what room is left over.

        80 columns: train: step 31/100 loss 2.3145, 254 tokens/s, 0:05 left, 31% 547/1,771 tokens
        40 columns: train: step 31/100 loss 2.3145, 254/s
        """
        parts = self._parts()
        texts = [f"{self._task}: {', '.join(parts[:count])}" for count in range(len(parts), 1, -1)]
        short = ", ".join(part.replace(f" {self._unit}/s", "/s") for part in parts[:2])
        texts += [f"{self._task}: {short}", short]
        text = next((text for text in texts if len(text) <= width), short[:width])
        room = min(width - len(text) - len(" []"), BAR)
        if self._total is None or text != texts[0] or room < NARROWEST_BAR:
            return text
        return f"{text} [{'#' * int(self._share() * room):<{room}}]"

    def _line(self, text: str) -> None:
        self._put(f"\r\x1b[K{text}\n" if self._live else f"{text}\n")

    def _put(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()
        if (err := lost(self._stream)) is not None:
            self._say_lost("stderr", err)

    def _record(self, kind: str, fields: dict[str, object]) -> None:
        self._log.write(kind, fields)
        if (err := self._log.error) is not None:
            self._say_lost(str(self._log.path), err)
        for problem in self._log.problems():
            self.note(problem)

    def _say_lost(self, what: str, err: OSError) -> None:
        """Once, to whoever can still be reached."""
        if what not in self._said:
            self._said.add(what)
            self.note(f"{what} cannot be written ({os.strerror(err.errno or 0).lower()}): the work goes on without it")


@contextlib.contextmanager
def watch(
    command: str, log: EventLog, *, where: object = None, kept: Callable[[], str] = str, **fields: object
) -> Iterator[ConsoleProgress]:
    """Progress for one run of a command: its begin and how it ended are events too.

    kept: says what is kept of the work at `where`, for one that a signal ends: it becomes an error like any other
    """
    progress = ConsoleProgress(log)
    ran_on = {} if log.path is None else {"environment": environment()}
    progress.event("run", command=command, host=platform.node(), pid=os.getpid(), **ran_on, **fields)
    try:
        yield progress
        progress.end()
        progress.event("finished")
    except BaseException as err:
        raised = err
        if isinstance(err, KeyboardInterrupt):
            raised = stopped(getattr(err, "signal_name", "SIGINT"), where=where, kept=kept())
        end = ending(raised)
        progress.event(end.kind, error=end.error, exit_code=end.exit_code)
        if raised is err:
            raise
        raise raised from None
    finally:
        progress.close()


def _columns(stream: TextIO) -> int:
    """Width of the terminal a stream leads to; 80 where it does not say."""
    with contextlib.suppress(ValueError, OSError):
        return int(os.environ.get("COLUMNS", 0)) or os.get_terminal_size(stream.fileno()).columns or 80
    return 80


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def duration(seconds: float) -> str:
    """3725 -> "1:02:05"."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
