"""Markup: numbers, pairs and tables as HTML. Every text is escaped here; what is HTML already says so in its name."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from html import escape

from kdpipe.pipeline.progress import duration
from kdpipe.pipeline.report.tables import Column, Kind, in_words


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """A value with how it looks, where that is not as its column has it.

    html: instead of the value's text; classes: of the style sheet
    """

    value: object
    html: str | None = None
    classes: tuple[str, ...] = ()


def text_of(value: object, kind: Kind) -> str:
    """A value as a reader wants it: 0.041 nats, 91.32%, 1,024,000, 1:02:05."""
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return in_words(value)
    if not math.isfinite(value):
        return "not finite"
    match kind:
        case "seconds":
            return duration(value)
        case "share":
            return f"{value:.2%}"
        case "count":
            return f"{value:,.0f}"
        case "number":
            return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
        case _:
            return in_words(value)


def sortable(columns: Sequence[Column], rows: Iterable[Sequence[Cell]]) -> str:
    """A table whose heads are buttons that sort it; each cell has its whole value in data-value."""
    body = "".join(
        f"<tr>{''.join(_cell(cell, column) for cell, column in zip(row, columns, strict=True))}</tr>" for row in rows
    )
    heads = "".join(map(_head, columns))
    return f'<div class="scroll"><table><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div>'


def _head(column: Column) -> str:
    unit = f' <span class="soft">{escape(column.unit)}</span>' if column.unit else ""
    hint = f' title="{escape(column.hint)}"' if column.hint else ""
    numeric = ' class="n"' if column.is_numeric else ""
    return (
        f'<th scope="col" data-key="{escape(column.key)}"{numeric}>'
        f"<button{hint}>{escape(column.title)}{unit}</button></th>"
    )


def _cell(cell: Cell, column: Column) -> str:
    raw = "" if cell.value is None else str(cell.value) if isinstance(cell.value, float) else in_words(cell.value)
    html = escape(text_of(cell.value, column.kind)) if cell.html is None else cell.html
    classes = " ".join([*(["n"] if column.is_numeric else []), *cell.classes])
    attributes = f' class="{classes}"' if classes else ""
    attributes += f' data-value="{escape(raw)}"'
    attributes += f' title="{escape(raw)}"' if isinstance(cell.value, float) else ""
    return f'<th scope="row"{attributes}>{html}</th>' if column.key == "run" else f"<td{attributes}>{html}</td>"


def pairs(named: Iterable[tuple[str, str]]) -> str:
    """Names and their values, which are HTML, beside each other; those that are "" are left out."""
    inner = "".join(f"<dt>{escape(name)}</dt><dd>{html}</dd>" for name, html in named if html)
    return f'<dl class="pairs">{inner}</dl>' if inner else ""


def listed(html: Iterable[str]) -> str:
    return f'<ul class="notes">{"".join(f"<li>{each}</li>" for each in html)}</ul>'


def about(text: str) -> str:
    return f'<p class="about">{escape(text)}</p>' if text else ""


def status(word: str) -> str:
    return f'<span class="status {escape(word)}">{escape(word)}</span>'


def dot(colour: str | None) -> str:
    """The mark of a run's curves."""
    return f'<span class="dot"{f" style=--c:{colour}" if colour else ""}></span>'


def when(seconds: float) -> str:
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M} UTC"
