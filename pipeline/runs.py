"""Runs: how a run in an output folder stands, read from what it has left there itself.

    state_of(OUTPUT) -> RunState(status, step, num_steps, error, metrics, ...)

kdpipe.json says that it is finished, .running that it is at work, the end of events.jsonl how it ended otherwise.
Invariant: nothing is written, no torch is loaded, and a file that another process is writing is no error.
Cost: some 40 KiB of reads a run, however long its events are: a thousand runs in well under a second.
"""

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

from kdpipe.manifests.durable import open_regular
from kdpipe.manifests.errors import BusyError, KdpipeError, LayoutError
from kdpipe.manifests.run import EVENTS, Metrics, RunRecord, read_run
from kdpipe.manifests.running import require_nobody_in

HEAD_BYTES = 1 << 13
"""The first session's begin: its command, and how many steps there are."""
TAIL_BYTES = 1 << 15
"""The last events: a step, an evaluation, how it ended."""

Status = Literal["absent", "running", "finished", "failed", "interrupted", "killed"]
ENDINGS: Mapping[str, Status] = {
    "finished": "finished",
    "failed": "failed",
    "crashed": "failed",
    "launch_failed": "failed",
    "interrupted": "interrupted",
    "terminated": "interrupted",
}
"""Last event of a run that ended by itself -> its status; without one of them it was killed."""
Event = dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class RunState:
    """How a run stands.

    status: absent (it never began), running, finished (the student is there and measured), failed (it said why),
        interrupted (a signal ended it; the same command goes on), killed (its last event is none of an end)
    step, num_steps: optimizer steps done and in all, None where it does not say yet
    error, exit_code: of one that failed or was interrupted
    metrics: of the finished student; of the last evaluation on the way while it is not
    rate: tokens a second, over all steps or lately
    last_event: when it last said something, unix seconds
    """

    output: Path
    status: Status
    step: int | None = None
    num_steps: int | None = None
    error: str | None = None
    exit_code: int | None = None
    metrics: Metrics | None = None
    record: RunRecord | None = None
    rate: float | None = None
    last_event: float | None = None


def state_of(output: Path) -> RunState:
    """How the run in an output folder stands; the folder may not be there."""
    head, tail = ends_of(output / EVENTS)
    last = tail[-1] if tail else {}
    try:
        record = read_run(output)
    except KdpipeError as err:
        return RunState(output=output, status="failed", error=str(err), exit_code=err.exit_code, last_event=_time(last))
    if record is not None and record.metrics is not None:
        return RunState(
            output=output,
            status="finished",
            step=record.num_steps,
            num_steps=record.num_steps,
            metrics=record.metrics,
            record=record,
            rate=_rate(tail),
            last_event=_time(last),
        )
    status = "running" if _is_busy(output) else _ended(last)
    events = [*head, *tail]
    failed = status in ("failed", "interrupted")
    return RunState(
        output=output,
        status=status,
        step=_last(events, "step", "step"),
        num_steps=_last(events, "start", "num_steps"),
        error=last.get("error") if failed else None,
        exit_code=last.get("exit_code") if failed else None,
        metrics=_last_metrics(events),
        record=record,
        rate=_rate(tail),
        last_event=_time(last),
    )


def events_of(output: Path) -> list[Event]:
    """All events of the runs in an output folder, of its sessions one after the other; torn lines are left out."""
    try:
        with _opened(output / EVENTS) as file:
            return list(_events(file.read()))
    except (OSError, LayoutError):
        return []


def _ended(last: Event) -> Status:
    if not last:
        return "absent"
    return ENDINGS.get(str(last.get("kind")), "killed")


def _is_busy(output: Path) -> bool:
    try:
        require_nobody_in(output)
    except BusyError:
        return True
    return False


def ends_of(path: Path) -> tuple[list[Event], list[Event]]:
    """The first and the last events of a file; of a short one all are among the last."""
    try:
        with _opened(path) as file:
            size = os.fstat(file.fileno()).st_size
            start = max(size - TAIL_BYTES, 0)
            head = file.read(min(HEAD_BYTES, start)).rpartition(b"\n")[0]
            file.seek(start)
            return list(_events(head)), list(_events(file.read()))
    except (OSError, LayoutError):
        return [], []


def _opened(path: Path) -> BinaryIO:
    return open(open_regular(path), "rb")


def _events(data: bytes) -> Iterator[Event]:
    """The events in some bytes; a line that was cut or torn is none."""
    for line in data.split(b"\n"):
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict) and "kind" in event:
            yield event


def _last(events: list[Event], kind: str, field: str) -> int | None:
    value = next((event.get(field) for event in reversed(events) if event["kind"] == kind), None)
    return value if isinstance(value, int) else None


def _last_metrics(events: list[Event]) -> Metrics | None:
    found = next((event for event in reversed(events) if event["kind"] == "eval"), None)
    return (
        None if found is None else {key: value for key, value in found.items() if key not in ("time", "kind", "step")}
    )


def _rate(events: list[Event]) -> float | None:
    """Tokens a second of the last session, as far as it is among some events."""
    for event in reversed(events):
        if event.get("task") == "train" and event["kind"] in ("end", "progress"):
            done, seconds = event.get("done"), event.get("seconds")
            rate = (
                done / seconds
                if isinstance(done, int) and isinstance(seconds, float) and seconds
                else event.get("rate")
            )
            return rate if isinstance(rate, float) else None
    return None


def _time(event: Event) -> float | None:
    value = event.get("time")
    return float(value) if isinstance(value, int | float) else None
