"""Stories: what one run has written down, in the order of its steps: curves, cost, notes, and how to repeat it.

    events.jsonl -> sessions -> the steps that count -> Story

A run that was interrupted repeats the steps after its checkpoint: of two events of one step the later one counts.
Hours are those in which a session was at work, sessions laid end to end.
"""

import contextlib
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from kdpipe.manifests.made_with import MadeWith
from kdpipe.manifests.run import LOG
from kdpipe.pipeline.runs import RunState, events_of, state_of

Event = Mapping[str, Any]
Point = dict[str, float]
"""One step or evaluation: "step", "tokens" and "hours" so far, and its figures."""
AXES = ("step", "tokens", "hours")
MOST_LOG_BYTES = 4096
"""Of its end that are looked at."""


@dataclass(kw_only=True, slots=True)
class Story:
    """A run as its folder tells it.

    kind: the command, "train"
    inputs: by key, "train.lr"; what is not known is missing
    step: of the last one that was made
    steps, evals: in the order of steps, each step once
    measured_after: step of the evaluation that `metrics` are of
    num_tokens: trained on; None where neither record nor event says so
    num_missing: steps up to the last one that left no event: a full disk loses events, never steps
    seconds: of all sessions at work, lost steps included
    step_seconds: of the steps that count
    metrics: final figures; those of the last evaluation after a step where there are none yet
    notes: with how often each was said
    error: how it ended, where that was not well; of one that was refused before it began, the last line of its log
    commands: of its sessions, the last one last
    environments: of its sessions, each once
    """

    name: str
    folder: Path
    state: RunState
    kind: str = "train"
    inputs: dict[str, object] = field(default_factory=dict)
    steps: list[Point] = field(default_factory=list)
    evals: list[Point] = field(default_factory=list)
    step: int | None = None
    num_steps: int | None = None
    measured_after: int | None = None
    num_tokens: int | None = None
    num_skipped: int = 0
    num_missing: int = 0
    sessions: int = 0
    seconds: float = 0.0
    step_seconds: float = 0.0
    metrics: dict[str, float] = field(default_factory=dict)
    notes: dict[str, int] = field(default_factory=dict)
    commands: list[MadeWith] = field(default_factory=list)
    environments: list[dict[str, object]] = field(default_factory=list)
    error: str = ""

    @property
    def made_with(self) -> MadeWith | None:
        record = self.state.record
        if record is not None and record.made_with is not None:
            return record.made_with
        return self.commands[-1] if self.commands else None

    def forget_points(self) -> None:
        """Of one whose curves are not drawn."""
        self.steps, self.evals = [], []

    def named(self, what: str) -> tuple[Path, ...]:
        """What its command named, "cache" or "student"."""
        made = self.made_with
        return tuple(Path(path) for path in made.paths.get(what, ())) if made is not None else ()


def read_story(name: str, folder: Path) -> Story:
    """The story of the run in a folder, whatever of it is there."""
    state = state_of(folder)
    error = state.error or (_last_line(folder / LOG) if state.status == "absent" else "")
    story = Story(name=name, folder=folder, state=state, step=state.step, error=error)
    tell(story, events_of(folder))
    if (record := story.state.record) is not None:
        story.inputs, story.num_steps = by_key(record.inputs.model_dump(mode="json")), record.num_steps
        story.num_tokens, story.num_skipped = record.num_tokens, record.num_skipped
        if record.metrics:
            story.metrics, story.measured_after = numbers(record.metrics), record.num_steps
    return story


def tell(story: Story, events: Iterable[Event]) -> None:
    """Fill a story from events in the order in which they were written."""
    steps: dict[int, Point] = {}
    evals: dict[int, Point] = {}
    began, worked = None, 0.0
    for event in events:
        kind, time, step = event.get("kind"), event.get("time"), event.get("step")
        if not isinstance(time, int | float):
            continue
        if kind == "run":
            worked, began = story.seconds, float(time)
            _begin(story, event)
        if began is not None:
            story.seconds = worked + max(float(time) - began, 0.0)
        if kind in ("step", "eval") and isinstance(step, int):
            points = steps if kind == "step" else evals
            points[step] = numbers(event) | {"hours": story.seconds / 3600}
        elif kind == "start":
            story.num_steps = _whole(event.get("num_steps")) or story.num_steps
            if story.environments and "device" in event:
                story.environments[-1].setdefault("device", event["device"])
            _forget(_whole(event.get("first_step")) or 1, steps, evals)
        elif kind == "accepted" and isinstance(event.get("inputs"), Mapping):
            story.inputs = by_key(event["inputs"])
        elif kind == "note":
            text = str(event.get("text", ""))
            story.notes[text] = story.notes.get(text, 0) + 1
    _sum_up(story, steps, evals)


def _last_line(path: Path) -> str:
    """Of a log; "" where there is none."""
    try:
        with open(path, "rb") as file:
            file.seek(max(os.fstat(file.fileno()).st_size - MOST_LOG_BYTES, 0))
            lines = file.read().decode("utf-8", "replace").split("\n")
    except OSError:
        return ""
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


def _begin(story: Story, event: Event) -> None:
    """A session."""
    story.sessions += 1
    story.kind = str(event.get("command", story.kind))
    with contextlib.suppress(ValidationError):  # an older version's, or none
        story.commands.append(MadeWith.model_validate(event.get("made_with")))
    known = event.get("environment")
    environment = {"host": event.get("host"), "ranks": event.get("num_ranks")}
    environment |= dict(known) if isinstance(known, Mapping) else {}
    story.environments.append(environment)


def _forget(first: int, *points: dict[int, Point]) -> None:
    """A session goes on with a step: what was written of it and of later ones is replaced by what follows."""
    for each in points:
        for step in [step for step in each if step >= first]:
            del each[step]


def _sum_up(story: Story, steps: Mapping[int, Point], evals: Mapping[int, Point]) -> None:
    """The points in order, with the tokens up to and with each; and what there is of them in all."""
    total = 0.0
    tokens = {0: 0.0}
    for step in sorted(steps):
        total += steps[step].get("num_tokens", 0.0)
        tokens[step] = total
        story.steps.append(steps[step] | {"tokens": total})
    story.evals = [evals[step] | {"tokens": tokens.get(step, total)} for step in sorted(evals)]
    story.environments = [each for at, each in enumerate(story.environments) if each not in story.environments[:at]]
    story.step_seconds = sum(step.get("seconds", 0.0) for step in story.steps)
    if story.steps:
        last = story.steps[-1]
        story.num_tokens, story.num_skipped = int(total), int(last.get("num_skipped", 0))
        story.step, story.num_missing = int(last["step"]), int(last["step"]) - len(story.steps)
    if story.evals and story.evals[-1]["step"]:  # before the first step it is the untrained student
        story.metrics = {key: value for key, value in story.evals[-1].items() if key not in AXES}
        story.measured_after = int(story.evals[-1]["step"])


def numbers(fields: Mapping[str, object]) -> Point:
    """The fields that are numbers: null stands for one that was not finite, and is left out."""
    return {
        key: value
        for key, value in fields.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and key != "time"
    }


def _whole(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def by_key(inputs: Mapping[str, Any]) -> dict[str, object]:
    """A run's inputs by the run file's keys: {"spec": {"train": {"lr": 1e-4}}, ...} -> {"train.lr": 1e-4, ...}"""
    found: dict[str, object] = {}

    def walk(branch: Mapping[str, Any], prefix: str) -> None:
        for key, value in branch.items():
            if isinstance(value, Mapping):
                walk(value, f"{prefix}{key}.")
            else:
                found[prefix + key] = value

    walk(inputs.get("spec") or {}, "")
    walk(inputs.get("rollouts") or {}, "live.")
    # The rest are digests: tables.py has them by the names that the command gave them.
    return found | {key: inputs[key] for key in ("student", "caches", "data") if inputs.get(key)}


def thinned(points: Sequence[Point], most: int, by: str) -> list[Point]:
    """At most `most` of the points, none changed: the first, the last, and of equal stretches the lowest and highest.

    by: the figure whose extremes are kept, so that a spike is still seen
    """
    if len(points) <= most:
        return list(points)
    num_stretches = max((most - 2) // 2, 1)
    kept = {0, len(points) - 1}
    for stretch in range(num_stretches):
        first, after = (1 + (len(points) - 2) * edge // num_stretches for edge in (stretch, stretch + 1))
        there = [at for at in range(first, after) if by in points[at]]
        if there:
            kept |= {min(there, key=lambda at: points[at][by]), max(there, key=lambda at: points[at][by])}
    return [points[at] for at in sorted(kept)]
