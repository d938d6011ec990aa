"""Tables: runs as rows, what varies between them and what became of them as columns, as it was recorded."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from kdpipe.pipeline.report.story import Story

Kind = Literal["text", "value", "number", "share", "count", "seconds"]
Row = dict[str, object]


@dataclass(frozen=True, kw_only=True, slots=True)
class Column:
    """key: in a row, and the head of a CSV file; title, unit, hint: for people; better: which end is the good one"""

    key: str
    title: str
    kind: Kind = "text"
    unit: str = ""
    hint: str = ""
    better: Literal["", "low", "high"] = ""

    @property
    def is_numeric(self) -> bool:
        return self.kind not in ("text", "value")


KL = "mean per supervised token of held-out samples"
MEASURED = {
    "heldout_kl": Column(
        key="heldout_kl", title="held-out KL", kind="number", unit="nats", better="low", hint=f"KL(T || S), {KL}"
    ),
    "heldout_reverse_kl": Column(
        key="heldout_reverse_kl", title="reverse KL", kind="number", unit="nats", better="low", hint=f"KL(S || T), {KL}"
    ),
    "top1_agreement": Column(
        key="top1_agreement",
        title="top-1 agreement",
        kind="share",
        better="high",
        hint="share of held-out tokens at which student and teacher think the same token most likely",
    ),
    "heldout_ce": Column(
        key="heldout_ce", title="cross-entropy", kind="number", unit="nats", better="low", hint=f"of the text, {KL}"
    ),
    "perplexity": Column(
        key="perplexity", title="perplexity", kind="number", better="low", hint="exp of the cross-entropy"
    ),
    "teacher_ce": Column(
        key="teacher_ce", title="teacher's CE", kind="number", unit="nats", hint="the teacher's cross-entropy there"
    ),
    "rollout_kl": Column(
        key="rollout_kl",
        title="KL, own answers",
        kind="number",
        unit="nats",
        better="low",
        hint="KL(T || S) over the student's own answers to held-out prompts",
    ),
    "rollout_reverse_kl": Column(
        key="rollout_reverse_kl",
        title="reverse KL, own answers",
        kind="number",
        unit="nats",
        better="low",
        hint="KL(S || T) over the student's own answers to held-out prompts",
    ),
    "rollout_top1_agreement": Column(
        key="rollout_top1_agreement",
        title="top-1, own answers",
        kind="share",
        better="high",
        hint="over the student's own answers to held-out prompts",
    ),
}
RESULTS = ("heldout_kl", "rollout_reverse_kl", "heldout_ce", "perplexity")
"""What runs are ranked by: the first of these that any of them has."""
RENAMED = {"num_tokens": "heldout_tokens"}
"""Figures whose names would be taken for others beside those of the training."""
DIGESTS = {"student": "student", "caches": "cache", "data": "data"}
"""Inputs that are digests, and the option that named what they are of."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """Some runs.

    rows: the best one first, those without a result last
    varied: columns of the keys in which they differ
    result: what they are ranked by; None where nothing was measured
    """

    rows: tuple[Row, ...]
    varied: tuple[Column, ...]
    measured: tuple[Column, ...]
    result: Column | None

    @property
    def columns(self) -> tuple[Column, ...]:
        """All of them, in the order of a CSV file."""
        return (*HEAD, *self.varied, *self.measured, *TAIL)


HEAD = (Column(key="run", title="run"), Column(key="status", title="status"))
TAIL = (
    Column(key="metrics_step", title="measured after step", kind="count"),
    Column(key="heldout_tokens", title="tokens measured", kind="count"),
    Column(key="steps", title="steps", kind="count"),
    Column(key="num_steps", title="steps planned", kind="count"),
    Column(key="train_tokens", title="tokens", kind="count", hint="trained on"),
    Column(key="seconds", title="time", kind="seconds", hint="all sessions at work, evaluations and lost steps too"),
    Column(key="tokens_per_second", title="tokens/s", kind="number", hint="in the steps alone"),
    Column(key="skipped", title="skipped steps", kind="count", hint="loss or gradient was not finite, or no token"),
    Column(key="sessions", title="sessions", kind="count", hint="1 where the run was never interrupted"),
    Column(key="exit_code", title="exit code", kind="count"),
    Column(key="error", title="error"),
    Column(key="command", title="command"),
    Column(key="folder", title="folder"),
)


def tabulate(stories: Sequence[Story]) -> Table:
    """The table of some runs."""
    found = {key for story in stories for key in story.metrics}
    known = [column for key, column in MEASURED.items() if key in found]
    rest = sorted(found - MEASURED.keys() - RENAMED.keys())
    result, varied = result_of(stories), _varied(stories)
    return Table(
        rows=tuple(_row(story, varied) for story in rank(stories, result)),
        varied=tuple(Column(key=key, title=key, kind="value") for key in varied),
        measured=(*known, *(Column(key=key, title=key.replace("_", " "), kind="number") for key in rest)),
        result=result,
    )


def result_of(stories: Iterable[Story]) -> Column | None:
    """What the runs are ranked by; None where none of it was measured."""
    found = {key for story in stories for key in story.metrics}
    return next((MEASURED[key] for key in RESULTS if key in found), None)


def rank(stories: Iterable[Story], result: Column | None) -> list[Story]:
    """The best first; those that are not finished after those that are, and those without a result last."""

    def place(story: Story) -> tuple[object, ...]:
        value = story.metrics.get(result.key) if result is not None else None
        sign = -1.0 if result is not None and result.better == "high" else 1.0
        return (value is None, story.state.status != "finished", 0.0 if value is None else sign * value, story.name)

    return sorted(stories, key=place)


def _row(story: Story, varied: dict[str, dict[str, object]]) -> Row:
    row: Row = {"run": story.name, "status": story.state.status}
    row |= {key: values.get(story.name) for key, values in varied.items()}
    row |= {RENAMED.get(key, key): value for key, value in story.metrics.items()}
    rate = story.num_tokens / story.step_seconds if story.num_tokens and story.step_seconds else None
    made = story.made_with
    return row | {
        "metrics_step": story.measured_after,
        "steps": story.step,
        "num_steps": story.num_steps,
        "train_tokens": story.num_tokens,
        "seconds": story.seconds if story.sessions else None,
        "tokens_per_second": rate,
        "skipped": story.num_skipped,
        "sessions": story.sessions,
        "exit_code": story.state.exit_code,
        "error": story.error or None,
        "command": None if made is None else made.command(),
        "folder": str(story.folder),
    }


def _varied(stories: Sequence[Story]) -> dict[str, dict[str, object]]:
    """The keys in which runs differ: key -> value by run; models and caches by the end of their paths."""
    known = [story for story in stories if story.inputs]
    keys = dict.fromkeys(key for story in known for key in story.inputs)
    found: dict[str, dict[str, object]] = {}
    for key in keys:
        # Only a student that writes answers has keys of how it does: their absence is no value of theirs.
        having = [story for story in known if key in story.inputs or not key.startswith("live.")]
        values = {story.name: story.inputs.get(key) for story in having}
        if len({json.dumps(value, sort_keys=True, default=str) for value in values.values()}) > 1:
            found[DIGESTS.get(key, key)] = _by_path(known, DIGESTS[key]) if key in DIGESTS else values
    kinds: dict[str, object] = {story.name: story.kind for story in stories if story.sessions}
    return ({"mode": kinds} if len(set(kinds.values())) > 1 else {}) | found


def _by_path(stories: Sequence[Story], option: str) -> dict[str, object]:
    paths = {story.name: story.named(option) for story in stories}
    short = tails([path for named in paths.values() for path in named])
    return {name: ", ".join(short[path] for path in named) or None for name, named in paths.items()}


def titled(column: Column) -> str:
    """With its unit: "held-out KL, nats"."""
    return f"{column.title}, {column.unit}" if column.unit else column.title


def in_words(value: object) -> str:
    """A value for people: true and false as a run file has them."""
    if value is None:
        return "not set"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list | tuple):
        return ", ".join(map(in_words, value)) or "none"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def tails(paths: Iterable[Path]) -> dict[Path, str]:
    """The shortest end of each path that tells them all apart: {/a/x: "x"}, {/a/x: "a/x", /b/x: "b/x"}."""
    absolute = {path: path.absolute().parts for path in paths}
    length = 1
    while len({parts[-length:] for parts in absolute.values()}) < len(set(absolute.values())):
        length += 1
    return {path: "/".join(parts[-length:]) for path, parts in absolute.items()}
