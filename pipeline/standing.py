"""Standing: how each step of a run stands, from its own records and from what Slurm says of its job.

    run file, outputs -> Entry, ... -> their records and one answer of Slurm -> Row, ... -> table, exit code

Who is believed: a finished student is finished whatever its job is called. A job that waits or runs is Slurm's to know.
Of one that ended, or that Slurm has forgotten, the run's own last event says how, and what it leaves open Slurm's state
does. Accounts may lag behind a requeue: a run that is seen to be at work is.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from kdpipe.manifests.submission import Job as Sent
from kdpipe.manifests.submission import Task
from kdpipe.pipeline.queue import ENDED_WELL, RUNNING, STOPPED, WAITING, Job, Queue
from kdpipe.pipeline.runs import RunState

State = Literal["finished", "running", "waiting", "interrupted", "cancelled", "absent", "lost", "failed", "blocked"]
FOR_GOOD: frozenset[State] = frozenset({"failed", "blocked"})
"""Nothing that is under way makes them finish."""
GOING_ON: frozenset[State] = frozenset({"finished", "running", "waiting"})
NEVER = "DependencyNeverSatisfied"

WORDS = {
    "Dependency": "waits for the steps before it",
    "Resources": "waits for nodes that are free",
    "Priority": "waits its turn",
    "BeginTime": "waits for its time to begin",
    "JobHeldUser": "held by its user: scontrol release",
    "JobHeldAdmin": "held by an administrator",
    "JobArrayTaskLimit": "waits for other tasks of its array",
    "PREEMPTED": "preempted by another job",
    "TIMEOUT": "reached its time limit",
    "NODE_FAIL": "its node failed",
    "BOOT_FAIL": "its node did not start",
    "DEADLINE": "reached its deadline",
    "OUT_OF_MEMORY": "was killed for want of memory",
}
"""What Slurm says, for people."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """A step, as a run file or a submission names it.

    own: its own record of how it stands; None for a step that keeps none, as a check or a report does
    made: whether what it is to make is there
    whatever: it is taken however the steps before it ended
    """

    name: str
    output: Path
    own: RunState | None = None
    made: bool = False
    whatever: bool = False
    sent: Sent | None = None
    task: Task | None = None
    log: Path | None = None

    @property
    def number(self) -> str | None:
        """Of its job, "17_3"; None where none was sent, or Slurm's answer was not seen."""
        return self.sent.task_id(self.task) if self.sent and self.task and self.sent.id is not None else None

    @property
    def is_finished(self) -> bool:
        return self.made if self.own is None else self.own.status == "finished"


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """How a step stands. why: why it waits or how it ended, one line; log: what its job prints"""

    name: str
    state: State
    step: int | None = None
    num_steps: int | None = None
    heldout_kl: float | None = None
    job: str | None = None
    node: str = ""
    requeues: int | None = None
    why: str = ""
    output: str = ""
    log: str | None = None


def rows_of(entries: Sequence[Entry], queue: Queue) -> list[Row]:
    """The entries as they stand, in their order."""
    rows = [_row(entry, queue) for entry in entries]
    roots = {row.name: [f"{row.name} ({row.state})"] for row in rows if row.state not in GOING_ON}
    return [_blocked(row, entry, queue, roots) for row, entry in zip(rows, entries, strict=True)]


def exit_code_of(rows: Iterable[Row]) -> int:
    """0 all is finished or under way, 1 something failed for good, 2 something was stopped and is not under way.

    What has not begun is under way while others are at work: a local sweep takes its runs one after the other.
    """
    states = {row.state for row in rows}
    if states & {"running", "waiting"}:
        states -= {"absent"}
    return 1 if states & FOR_GOOD else 0 if states <= GOING_ON else 2


def summary(rows: Sequence[Row]) -> str:
    """ "6 steps: 4 finished, 1 running, 1 failed"."""
    counts = Counter(row.state for row in rows)
    said = ", ".join(f"{count} {state}" for state, count in counts.most_common())
    return f"{len(rows)} step{'s' * (len(rows) != 1)}: {said}"


def _row(entry: Entry, queue: Queue) -> Row:
    job = queue.jobs.get(entry.number or "")
    state, why = _own(entry, job, queue) if entry.own is not None else _of_slurm(entry, job, queue)
    own = entry.own
    return Row(
        name=entry.name,
        state=state,
        step=own.step if own else None,
        num_steps=own.num_steps if own else None,
        heldout_kl=_kl(own),
        job=entry.number,
        node=job.nodes if job else "",
        requeues=job.restarts if job else None,
        why=" ".join(why.split()),
        output=str(entry.output),
        log=None if entry.log is None else str(entry.log),
    )


def _own(entry: Entry, job: Job | None, queue: Queue) -> tuple[State, str]:
    """Of a step that keeps a record: the student's, or a part of the extraction."""
    own = entry.own
    assert own is not None, "asked of those alone"
    if own.status == "finished":
        return "finished", ""
    if job is not None and job.state in WAITING:
        before = own.error or ("it was killed" if own.status == "killed" else "")
        return "waiting", f"{_words(job)}; before: {before}" if before else _words(job)
    if job is not None and job.state in RUNNING:
        return _at_work(own, job)
    if own.status == "running":
        return "running", ""
    if own.status == "failed":
        return "failed", own.error or "its last event says no more"
    if job is not None:
        return _ended(entry, job, own)
    if own.status == "absent":
        return _forgotten(entry, queue)
    return "interrupted", own.error or "killed: the last event is not that of an end; the same command goes on"


def _at_work(own: RunState, job: Job) -> tuple[State, str]:
    """Of a job that runs. What the run says of its end is of this start only where it came after it."""
    if own.status in ("failed", "interrupted") and (own.last_event or 0.0) > (job.started or float("inf")):
        return ("failed", own.error or "") if own.status == "failed" else ("running", f"ends: {own.error}")
    if job.state == "SUSPENDED":
        return "waiting", "suspended by Slurm"
    if own.status == "running":
        return "running", ""
    return "running", f"starts; before: {own.error}" if own.error else "starts"


def _ended(entry: Entry, job: Job, own: RunState) -> tuple[State, str]:
    """Of a job that is over, while the step is not finished and did not fail by its own word."""
    again = "; kdpipe submit goes on from what is saved"
    if job.state == ENDED_WELL:
        return "interrupted", f"its job ended as COMPLETED, but it is not finished{again}"
    if job.state.startswith("CANCELLED"):
        return "cancelled", f"cancelled{again}"
    if job.state in STOPPED or own.status == "interrupted":
        return "interrupted", f"{own.error or _words(job)}{again}"
    return "failed", _last_error(entry) or f"{_words(job)}, exit code {_code(job)}; see its log"


def _of_slurm(entry: Entry, job: Job | None, queue: Queue) -> tuple[State, str]:
    """Of a step that keeps no record of its own."""
    if job is None:
        return ("finished", "") if entry.made else _forgotten(entry, queue)
    if job.state in WAITING:
        return "waiting", _words(job)
    if job.state in RUNNING:
        return "running", ""
    if job.state == ENDED_WELL:
        return "finished", ""
    if job.state.startswith("CANCELLED"):
        return "cancelled", "cancelled"
    if job.state in STOPPED:
        return "interrupted", _words(job)
    return "failed", _last_error(entry) or f"{_words(job)}, exit code {_code(job)}; see its log"


def _forgotten(entry: Entry, queue: Queue) -> tuple[State, str]:
    """Of a step that has left nothing, and that Slurm says nothing of."""
    if entry.sent is None:
        refused = _last_error(entry, at_end=True)
        return ("failed", refused) if refused else ("absent", "it has not begun")
    if entry.sent.id is None:
        return "absent", "Slurm's answer to its submission was not seen; kdpipe submit looks for it"
    if queue.silence:
        return "absent", "it has left nothing yet"
    if error := _last_error(entry):
        return "failed", error
    return "lost", "Slurm knows no such job any more, and it has left nothing; kdpipe submit sends it again"


def _blocked(row: Row, entry: Entry, queue: Queue, roots: dict[str, list[str]]) -> Row:
    """A step whose job cannot start, or was taken out, because one before it did not end well: it is named.

    roots: of each step that does not go on the steps that are to blame; this one's are put in
    """
    if row.state not in ("waiting", "cancelled", "lost") or entry.sent is None:
        return row
    job = queue.jobs.get(entry.number or "")
    needs = [name for name in roots if name.partition(" ")[0] in entry.sent.needs and not entry.whatever]
    if (job is None or job.reason != NEVER) and not (row.state != "waiting" and needs):
        return row
    roots[row.name] = list(dict.fromkeys(root for name in needs for root in roots[name])) or [*entry.sent.needs]
    return replace(row, state="blocked", why=f"cannot start without {', '.join(roots[row.name][:3])}")


def _words(job: Job) -> str:
    """What a job waits for, or how it ended."""
    key = job.reason if job.state in WAITING and job.reason else job.state
    return WORDS.get(key) or WORDS.get(key.partition(",")[0]) or (f"Slurm: {key}" if key else "")


def _code(job: Job) -> str:
    return "unknown" if job.exit_code is None else str(job.exit_code)


def _kl(own: RunState | None) -> float | None:
    found = (own.metrics or {}).get("heldout_kl") if own is not None else None
    return float(found) if isinstance(found, int | float) else None


LOG_BYTES = 1 << 13


def _last_error(entry: Entry, *, at_end: bool = False) -> str:
    """The last line of a log that is an error of kdpipe, "" without one: a run that was refused left no event.

    at_end: only where nothing follows it, as in a log that has several tries
    """
    if entry.log is None:
        return ""
    try:
        with open(entry.log, "rb") as file:
            size = file.seek(0, 2)
            file.seek(max(size - LOG_BYTES, 0))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return ""
    lines = [line.strip() for line in lines if line.strip()]
    errors = [line for line in (lines[-1:] if at_end else lines) if line.startswith(("E-", "kdpipe: "))]
    return errors[-1] if errors else ""


COLUMNS: Mapping[str, Callable[[Row], str]] = {
    "NAME": lambda row: row.name,
    "STATE": lambda row: row.state,
    "STEP": lambda row: _of(row.step, row.num_steps),
    "HELD-OUT KL": lambda row: "" if row.heldout_kl is None else f"{row.heldout_kl:.4f}",
    "JOB": lambda row: row.job or "",
    "NODE": lambda row: row.node,
    "REQUEUES": lambda row: "" if not row.requeues else f"{row.requeues}",
    "WHY": lambda row: row.why,
}


def table(rows: Sequence[Row]) -> str:
    """One line a row, a column for each of COLUMNS in which some row has something to say."""
    columns = {title: [cell(row) for row in rows] for title, cell in COLUMNS.items()}
    shown = {title: cells for title, cells in columns.items() if any(cells)}
    widths = {title: max(map(len, [title, *cells])) for title, cells in shown.items()}
    lines = [list(shown), *([shown[title][at] for title in shown] for at in range(len(rows)))]
    return "\n".join(
        "  ".join(f"{text:<{width}}" for text, width in zip(line, widths.values(), strict=True)).rstrip()
        for line in lines
    )


def _of(step: int | None, num_steps: int | None) -> str:
    """ "31/100", "31" where it is not known of how many."""
    if num_steps is None:
        return "" if step is None else f"{step:,}"
    return f"{step or 0:,}/{num_steps:,}"
