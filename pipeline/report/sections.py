"""Sections: what a report says, each from the records it is about; "" where there is nothing to say."""

import os
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from urllib.parse import quote

from kdpipe.manifests.run import EVENTS
from kdpipe.pipeline.output import human_bytes
from kdpipe.pipeline.progress import duration
from kdpipe.pipeline.report.caches import CacheStory
from kdpipe.pipeline.report.gather import Report
from kdpipe.pipeline.report.markup import Cell, about, dot, listed, pairs, sortable, status, text_of, when
from kdpipe.pipeline.report.plots import colours_of
from kdpipe.pipeline.report.story import Story
from kdpipe.pipeline.report.tables import Column, Row, Table, titled

ELSEWHERE = {"folder", "command", "num_steps", "metrics_step", "exit_code", "heldout_tokens", "teacher_ce"}
"""Columns of a CSV file that the page has in other places, or not at all."""
MOST_NOTES = 100
MOST_COMMANDS = 200


def header(report: Report) -> str:
    count = len(report.stories)
    said = f"{count} run{'s' * (count != 1)}, page made {when(report.made_at)} by kdpipe {report.version}"
    return f'<h1>{escape(report.title)}</h1><p class="soft">{escape(said)}</p>'


def tiles(report: Report) -> str:
    """What one looks for first: is it done, which student won, what has it cost."""
    inner = "".join(
        f'<div class="tile"><b>{escape(big)}</b><span>{escape(small)}</span></div>' for big, small in _tiles(report)
    )
    return f'<div class="tiles">{inner}</div>'


def _tiles(report: Report) -> Iterator[tuple[str, str]]:
    statuses = [story.state.status for story in report.stories]
    others = ", ".join(f"{statuses.count(each)} {each}" for each in dict.fromkeys(statuses) if each != "finished")
    yield f"{statuses.count('finished')} of {len(statuses)}", f"finished{'; ' * bool(others)}{others}"
    result, best = report.table.result, report.table.rows[0]
    if result is not None:
        who = f", best: {best['run']}" if len(statuses) > 1 else ""
        yield text_of(best[result.key], result.kind), f"{titled(result)}{who}"
        if best.get("top1_agreement") is not None:
            yield text_of(best["top1_agreement"], "share"), f"top-1 agreement{' of the same' * (len(statuses) > 1)}"
    if teacher := sum(cache.teacher.seconds for cache in report.caches):
        yield duration(teacher), "teacher, once for all students"
    if students := sum(story.seconds for story in report.stories):
        yield duration(students), f"{len(statuses)} students in all" if len(statuses) > 1 else "student"


def runs(report: Report) -> str:
    table, colours = report.table, colours_of(report)
    shown = [column for column in table.columns if column.key not in ELSEWHERE and _says_something(table, column)]
    best = {column.key: _best(table, column) for column in table.measured if len(table.rows) > 1}
    said = ["Click a column's title to sort by it."]
    if table.result is not None and len(table.rows) > 1:
        said.append(f"Now: the best {table.result.title} first.")
    if any(map(_is_under_way, table.rows)):
        said.append("In italics: the last evaluation of a run that has not finished, over train.eval_tokens.")
    rows = ([_run_cell(row, column, best, colours) for column in shown] for row in table.rows)
    return about(" ".join(said)) + sortable(shown, rows)


def _says_something(table: Table, column: Column) -> bool:
    usual = {"skipped": (None, 0), "sessions": (None, 0, 1)}.get(column.key, (None,))
    return any(row.get(column.key) not in usual for row in table.rows)


def _best(table: Table, column: Column) -> list[Row]:
    """The rows with the best figure, of the finished runs; of all where none of those has it."""
    rows = [row for row in table.rows if isinstance(row.get(column.key), int | float)]
    rows = [row for row in rows if row["status"] == "finished"] or rows
    if not rows or not column.better:
        return []
    best = (min if column.better == "low" else max)(float(str(row[column.key])) for row in rows)
    return [row for row in rows if row[column.key] == best]


def _is_under_way(row: Row) -> bool:
    return row["status"] != "finished" and row["metrics_step"] is not None


def _run_cell(row: Row, column: Column, best: Mapping[str, Sequence[Row]], colours: Mapping[str, str]) -> Cell:
    value = row.get(column.key)
    if column.key == "run":
        return Cell(value=value, html=dot(colours.get(str(value))) + escape(str(value)))
    if column.key == "status":
        return Cell(value=value, html=status(str(value)))
    if column.key == "error":
        return Cell(value=value, classes=("wrap",))
    if column.key == "steps" and row["num_steps"] not in (None, value):
        of_all = f'{text_of(value, "count")} <span class="soft">of {text_of(row["num_steps"], "count")}</span>'
        return Cell(value=value, html=of_all)
    is_best = row in best.get(column.key, ())
    is_late = column.key in best and _is_under_way(row)
    return Cell(value=value, classes=("best",) * is_best + ("underway",) * is_late)


COST = (
    Column(key="run", title="who"),
    Column(key="seconds", title="time", kind="seconds", hint="at work, all sessions together, lost work too"),
    Column(key="tokens", title="tokens", kind="count", hint="that were computed"),
    Column(key="rate", title="tokens/s", kind="number", hint="while steps are made, or shards written"),
    Column(key="sessions", title="sessions", kind="count", hint="how often it was started"),
)


def cost(report: Report) -> str:
    rows: list[tuple[object, ...]] = [
        (f"teacher: {cache.path.name}", pass_.seconds, pass_.num_tokens, pass_.rate, pass_.num_runs)
        for cache in report.caches
        if (pass_ := cache.teacher).num_runs
    ]
    rows += [
        (f"student: {row['run']}", row["seconds"], row["train_tokens"], row["tokens_per_second"], row["sessions"])
        for row in report.table.rows
        if row["seconds"] is not None
    ]
    if not rows:
        return ""
    return about(_in_all(report)) + sortable(COST, ([Cell(value=value) for value in row] for row in rows))


def _in_all(report: Report) -> str:
    teacher = sum(cache.teacher.seconds for cache in report.caches)
    students = sum(story.seconds for story in report.stories)
    said = f"Students: {duration(students)} in all."
    if teacher:
        return f"Teacher, once: {duration(teacher)}, {teacher / (teacher + students):.0%} of all. {said}"
    if any(story.kind in ("stream", "onpolicy") for story in report.stories):
        return f"{said} The teacher of a live run is at work beside it, in the same time."
    if report.caches:
        return (
            f"{said} What the teacher's pass has cost is not known: the cache has no log of it, or lies elsewhere now."
        )
    return said


def caches(report: Report) -> str:
    return "".join(map(_cache, report.caches))


def _cache(cache: CacheStory) -> str:
    where, info = ("cache", f"<code>{escape(str(cache.path))}</code>"), cache.info
    if info is None:
        return pairs([where, ("not read", escape(cache.error))])
    done = f"{info.num_committed:,} of {info.num_shards:,} shards"
    return pairs(
        [
            where,
            ("complete", f"yes, {done}" if info.is_complete else f"no, {done}"),
            ("size", f"{human_bytes(info.num_bytes)}: {info.num_rows:,} rows of {info.num_tokens:,} tokens"),
            ("samples", f"{info.num_samples:,}, {info.heldout_fraction:.3g} of them held out"),
            *((name, escape(text)) for name, text in info.codec.items()),
            ("teacher", escape(info.teacher)),
            ("engine", escape(info.engine)),
            ("fingerprint", f"<code>{escape(info.fingerprint)}</code>"),
        ]
    )


def notes(report: Report) -> str:
    parts = {
        "Errors": [
            f"{status(story.state.status)} <b>{escape(story.name)}</b> {escape(story.error)}"
            for story in report.stories
            if story.error
        ],
        "Warnings": [escape(text) for text in _warnings(report)],
        "What the runs noted": [
            f'{escape(text)} <span class="soft">({escape(who)})</span>' for text, who in _said(report)
        ],
    }
    return "".join(f"<h3>{title}</h3>{_some(html)}" for title, html in parts.items() if html)


def _some(html: list[str]) -> str:
    left = len(html) - MOST_NOTES
    return listed(html[:MOST_NOTES]) + (about(f"{left:,} more are in the events.") if left > 0 else "")


def _warnings(report: Report) -> Iterator[str]:
    for story in report.stories:
        if story.state.status == "running" and story.state.last_event is not None:
            ago = duration(max(report.made_at - story.state.last_event, 0.0))
            yield f"{story.name}: at work; its last event was {ago} before this page was made"
        if story.num_skipped:
            yield (
                f"{story.name}: {story.num_skipped:,} of its steps changed nothing: loss or gradient was not finite, "
                "or there was no token to learn"
            )
        if story.num_missing:
            yield f"{story.name}: {story.num_missing:,} steps left no event (a full disk?); curves and tokens lack them"
        if story.state.status == "finished" and not story.metrics:
            yield f"{story.name}: no sample was held out, so nothing was measured"
    for cache in report.caches:
        if cache.info is not None and not cache.info.is_complete:
            yield f"{cache.path}: the cache is not complete"
        if cache.teacher.num_failed:
            of_all = f"{cache.teacher.num_failed} of {cache.teacher.num_runs} extractions"
            yield f"{cache.path}: {of_all} did not end well, or are at work"


def _said(report: Report) -> list[tuple[str, str]]:
    """Every note once, with who said it."""
    speakers: dict[str, list[str]] = {}
    for who, said in (
        *((f"extract {cache.path.name}", cache.teacher.notes) for cache in report.caches),
        *((story.name, story.notes) for story in report.stories),
    ):
        for text in said:
            speakers.setdefault(text, []).append(who)
    return [(text, ", ".join(who) if len(who) <= 3 else f"{len(who)} runs") for text, who in speakers.items()]


def repeat(report: Report, out: Path) -> str:
    """The commands, the machines they ran on, and the way to the raw events. out: where the page will lie"""
    extractions = [
        f"<h3>{escape(cache.path.name)}</h3><pre>{escape(cache.made_with.command())}</pre>"
        for cache in report.caches
        if cache.made_with is not None
    ]
    students = [_command(story, out) for story in report.stories[:MOST_COMMANDS]]
    left = len(report.stories) - MOST_COMMANDS
    return "".join((*extractions, *students)) + (about(f"{left:,} more: kdpipe report --csv has all.") * (left > 0))


def _command(story: Story, out: Path) -> str:
    made, events = story.made_with, story.folder / EVENTS
    command = f"<pre>{escape(made.command())}</pre>" if made is not None else about("Its command is not known.")
    link = ""
    if events.exists():
        target = quote(os.path.relpath(events.absolute(), out.absolute().parent))
        link = f'<p class="about">Raw events: <a href="{target}">{escape(str(events))}</a></p>'
    machines = "".join(
        pairs((key.replace("_", " "), escape(_machine(value))) for key, value in each.items() if value is not None)
        for each in story.environments
    )
    return f"<details><summary>{escape(story.name)}</summary>{command}{link}{machines}</details>"


def _machine(value: object) -> str:
    return ", ".join(f"{key} {text}" for key, text in value.items()) if isinstance(value, Mapping) else str(value)
