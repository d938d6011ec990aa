"""Entries: the steps that a run file, a submission or some folders name, each with its own record of how it stands.

    run.toml, OUT -> submission's jobs, sweep's members, runs in folders, the cache's sessions -> Entry, ...

Cost: some 40 KiB of reads a step. No torch; pyarrow only where a cache is asked whether it is complete.
"""

import os
import platform
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from kdpipe.manifests.errors import ConfigError, KdpipeError
from kdpipe.manifests.plan import PLAN_FILE
from kdpipe.manifests.run import EVENTS, LOG, RUN_FILE
from kdpipe.manifests.specs import RunFile, load, members_of, sweep_output
from kdpipe.manifests.submission import JOBS_FILE, SUBMIT, Submission, read_submission, submission_folder
from kdpipe.pipeline.runs import ENDINGS, Event, RunState, Status, ends_of, state_of
from kdpipe.pipeline.standing import Entry
from kdpipe.pipeline.steps import EXTRACT, REPORT, SEAL, is_complete

Part = tuple[int, int]
"""The first of four parts of an extraction is (1, 4)."""
WHOLE: Part = (1, 1)
SILENT_S = 60.0
"""Longest silence of an extraction at work, which writes an event every ten seconds."""


def entries_of(place: Path) -> list[Entry]:
    """The steps that a run file or a folder of outputs names, in the order in which they are taken.

    Raises ConfigError for a place that is neither, and the errors of reading a run file.
    """
    if place.is_file():
        return list(_of_run_file(load(place)))
    if (place / SUBMIT / JOBS_FILE).exists():
        return [*_of_submission(place), *_others(place)]
    inside = list(_others(place))
    if is_run(place) and not (inside and _is_of_a_sweep(place)):
        return [_student(place.absolute().name, place)]
    if (place / PLAN_FILE).exists():
        return list(_of_cache(place))
    if inside:
        return inside
    raise ConfigError(
        "no run is here, nor in a folder of it" if place.is_dir() else "there is no such run file or folder",
        where=place,
        hint="name a run file, the folder of a sweep or a student's output",
    )


def is_run(folder: Path) -> bool:
    """Whether a student is, or was, trained into a folder, or was to be."""
    return any((folder / name).exists() for name in (RUN_FILE, EVENTS, LOG))


def _is_of_a_sweep(folder: Path) -> bool:
    """Whether the events in a folder are those of a sweep, whose runs have folders in it, and not a student's."""
    head, tail = ends_of(folder / EVENTS)
    commands = {event.get("command") for event in [*head, *tail] if event["kind"] == "run"}
    return commands == {"sweep"} and not (folder / RUN_FILE).exists()


def _of_run_file(run: RunFile) -> Iterator[Entry]:
    """What was submitted of it, then what was not: an extraction that it describes, and its other members."""
    output = sweep_output(run)
    sent = _of_submission(output) if (submission_folder(output) / JOBS_FILE).exists() else []
    if (
        run.teacher.path is not None
        and len(run.cache.path) == 1
        and not any(each.name.startswith(EXTRACT) for each in sent)
    ):
        yield from _of_cache(run.cache.path[0])
    yield from sent
    known = {each.output.absolute() for each in sent}
    for member in members_of(run):
        if member.output.absolute() not in known:
            yield _student(f"{run.sweep.command}/{member.name}", member.output)


def _of_submission(output: Path) -> list[Entry]:
    """Every step that was submitted, with its last job."""
    record = read_submission(output)
    assert record is not None, "it was looked for"
    return list(_tasks(record, submission_folder(output)))


def _tasks(record: Submission, folder: Path) -> Iterator[Entry]:
    sessions: dict[Path, dict[Part, RunState]] = {}
    for (step, part), (job, task) in record.latest().items():
        where, log = Path(task.output), job.log(folder, task)
        entry = Entry(name=step, output=where, sent=job, task=task, log=log)
        if step == EXTRACT:
            if where not in sessions:
                sessions[where] = _sessions(where)
            name = f"{EXTRACT} {part}/{task.parts or '?'}" if part is not None else EXTRACT
            sent = WHOLE if part is None else (part, task.parts or 1)
            own = sessions[where].get(sent) or RunState(output=where, status="absent")
            yield Entry(name=name, output=where, own=own, sent=job, task=task, log=log)
        elif step in (SEAL, REPORT):
            made = _complete(where) if step == SEAL else _is_newer(where, job.sent)
            yield Entry(name=step, output=where, made=made, whatever=step == REPORT, sent=job, task=task, log=log)
        else:
            yield Entry(name=step, output=where, own=state_of(where), sent=job, task=task, log=entry.log)


def _others(folder: Path) -> Iterator[Entry]:
    """The runs in the folders of a folder, but for those that a submission there has sent."""
    record = read_submission(folder) if (folder / SUBMIT / JOBS_FILE).exists() else None
    sent = {Path(task.output).absolute() for _, task in record.latest().values()} if record else set()
    try:
        names = sorted(os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return
    for name in names:
        if is_run(folder / name) and (folder / name).absolute() not in sent:
            yield _student(name, folder / name)


def _student(name: str, output: Path) -> Entry:
    log = output / LOG
    return Entry(name=name, output=output, own=state_of(output), log=log if log.exists() else None)


def _of_cache(cache: Path) -> Iterator[Entry]:
    """The extraction of a cache as it was asked for last, a row for each part where it was shared."""
    sessions = _sessions(cache) or {WHOLE: RunState(output=cache, status="absent")}
    _, count = next(reversed(sessions))
    for index, own in sorted((part[0], own) for part, own in sessions.items() if part[1] == count):
        yield Entry(name=EXTRACT if count == 1 else f"{EXTRACT} {index}/{count}", output=cache, own=own)


def _sessions(cache: Path) -> dict[Part, RunState]:
    """How the last extraction of each part of a cache stands, the newest last; all finished where the cache is."""
    found: dict[Part, RunState] = {}
    for path in sorted((cache / "runs").glob("*.jsonl")):
        head, tail = ends_of(path)
        begun = next((event for event in [*head, *tail] if event["kind"] == "run"), None)
        if begun is not None and begun.get("command") == "extract":
            index, count = begun.get("part") or WHOLE
            found.pop((index, count), None)
            found[index, count] = _session(cache, begun, head, tail)
    if not _complete(cache):
        return found
    return {part: RunState(output=cache, status="finished") for part in found or [WHOLE]}


def _session(cache: Path, begun: Event, head: Sequence[Event], tail: Sequence[Event]) -> RunState:
    last = tail[-1]
    status: Status = ENDINGS.get(str(last["kind"])) or ("running" if _lives(begun, last) else "killed")
    ended_badly = status in ("failed", "interrupted")
    events = [*reversed(tail), *reversed(head)]
    missing = next((list(event.get("missing") or ()) for event in events if event["kind"] == "plan"), None)
    shard = next((event.get("shard") for event in events if event["kind"] == "shard"), None)
    return RunState(
        output=cache,
        status=status,
        step=None if missing is None else missing.index(shard) + 1 if shard in missing else 0,
        num_steps=None if missing is None else len(missing),
        error=last.get("error") if ended_badly else None,
        exit_code=last.get("exit_code") if ended_badly else None,
        last_event=float(last.get("time", 0.0)),
    )


def _lives(begun: Event, last: Event) -> bool:
    """Whether an extraction without a last word is at work: seen by its process here, by its events elsewhere."""
    if begun.get("host") == platform.node():
        return Path(f"/proc/{begun.get('pid')}").exists()
    return time.time() - float(last.get("time", 0.0)) < SILENT_S


def _complete(cache: Path) -> bool:
    try:
        return is_complete(cache)
    except KdpipeError:
        return False


def _is_newer(path: Path, then: float) -> bool:
    try:
        return path.stat().st_mtime >= then
    except OSError:
        return False
