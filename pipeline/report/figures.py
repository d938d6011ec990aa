"""Figures: what is drawn, as Vega-Lite specifications: plain data, the same for the page and for a picture.

A figure names its data ("steps", "evals", "runs"), which are given once for all of them. Its first axis is by training
steps; the page puts tokens or hours in their place, whose columns the data have too.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kdpipe.pipeline.report.story import AXES, Point, Story, thinned
from kdpipe.pipeline.report.tables import Column, Row, Table, in_words, titled

Spec = dict[str, Any]
Data = dict[str, list[dict[str, object]]]
"""Rows by the names of the data."""
MOST_CURVES = 12
"""Runs whose curves are drawn, the best; more are not told apart by eye."""
MOST_POINTS = 2000
"""Points of a figure's curves together; of a run of many at least FEWEST_POINTS."""
FEWEST_POINTS = 200
MOST_PANELS = 6
MOST_COLOURS = 10
MOST_MARKS = 8
"""Values of a key that an axis has a mark for each of."""
WIDE = 10.0
"""Values this many times apart are shown on a logarithmic axis."""
COLOURS = (
    "#2563a8", "#e07b1a", "#2f9e5b", "#c93c54", "#7a5bc0", "#8a5a3c",
    "#d667a9", "#5f6b76", "#9a9a16", "#18a3b8", "#1f3d7a", "#f0a35e",
)  # fmt: skip
"""Told apart in print too; of the best run first."""
X_TITLES = {"step": "optimizer step", "tokens": "tokens trained on", "hours": "hours at work"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Figure:
    """group: figures that the same controls of the page change; logs: whether a logarithmic axis makes sense"""

    name: str
    title: str
    group: str
    spec: Spec
    about: str = ""
    logs: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Curve:
    """A figure of one column of the data "steps" or "evals", a line a run."""

    title: str
    data: str
    column: str
    unit: str
    about: str = ""
    logs: bool = False


LOSS = "loss/mean"
CURVES = (
    Curve(
        title="Training loss",
        data="steps",
        column=LOSS,
        unit="nats per token",
        logs=True,
        about="of each step's own tokens, as it is minimised: divergence and cross-entropy in their mixture",
    ),
    Curve(
        title="Held-out KL",
        data="evals",
        column="heldout_kl",
        unit="nats per token",
        logs=True,
        about="KL(teacher || student); the last point is over all held-out samples, others over train.eval_tokens",
    ),
    Curve(
        title="Held-out reverse KL",
        data="evals",
        column="heldout_reverse_kl",
        unit="nats per token",
        logs=True,
        about="KL(student || teacher) over the same",
    ),
    Curve(
        title="Top-1 agreement",
        data="evals",
        column="top1_agreement",
        unit="share of tokens",
        about="held-out tokens at which both think the same token most likely",
    ),
    Curve(
        title="Held-out cross-entropy",
        data="evals",
        column="heldout_ce",
        unit="nats per token",
        logs=True,
        about="of the text itself",
    ),
    Curve(title="Gradient norm", data="steps", column="grad_norm", unit="before clipping", logs=True),
    Curve(title="Learning rate", data="steps", column="lr", unit=""),
)
LIVE = (
    Curve(
        title="Reverse KL over its own answers",
        data="evals",
        column="rollout_reverse_kl",
        unit="nats per token",
        logs=True,
        about="KL(student || teacher) over answers that the student writes to held-out prompts",
    ),
    Curve(
        title="Staleness of answers",
        data="steps",
        column="staleness/mean",
        unit="optimizer steps",
        about="steps between the weights that wrote an answer and those that learn from it, mean of a step",
    ),
    Curve(title="Answers left out", data="steps", column="staleness/dropped", unit="of a step, too old"),
    Curve(title="Waiting for the teacher", data="steps", column="wait/teacher/seconds", unit="seconds a step"),
    Curve(title="Answer length", data="steps", column="response_length/mean", unit="tokens, mean of a step"),
    Curve(
        title="Answers cut off",
        data="steps",
        column="response_length/clip_ratio",
        unit="share of a step's",
        about="those that reached live.max_new_tokens without an end",
    ),
    Curve(title="Writing speed", data="steps", column="rollout/tokens_per_second", unit="tokens/s"),
    Curve(title="Entropy of the student", data="steps", column="rollout/entropy/mean", unit="nats per written token"),
    Curve(title="Importance weights", data="steps", column="importance/mean", unit="mean of a step"),
)


def curves_of(stories: Sequence[Story]) -> tuple[Data, int]:
    """The data of the curves of some runs, thinned: "steps" and "evals" with a run's name in each; points left out."""
    most = max(MOST_POINTS // max(len(stories), 1), FEWEST_POINTS)
    wanted = {curve.column for curve in (*CURVES, *LIVE)} | set(AXES)
    data: Data = {"steps": [], "evals": []}
    left_out = 0
    for story in stories:
        for name, points, by in (("steps", story.steps, LOSS), ("evals", story.evals, "heldout_kl")):
            kept = thinned(points, most, by)
            left_out += len(points) - len(kept)
            data[name] += [_columns(point, wanted) | {"run": story.name} for point in kept]
    return data, left_out


def _columns(point: Point, wanted: set[str]) -> dict[str, object]:
    return {key: value for key, value in point.items() if key in wanted}


def drawn(curves: Sequence[Curve], data: Data, group: str) -> list[Figure]:
    """Figures of those curves that have a point."""
    runs = list(dict.fromkeys(str(row["run"]) for rows in data.values() for row in rows))
    return [
        Figure(
            name=f"{group}-{number}",
            title=curve.title,
            group=group,
            spec=_lines(curve, runs, few=curve.data == "evals"),
            about=curve.about,
            logs=curve.logs,
        )
        for number, curve in enumerate(curves)
        if any(curve.column in row for row in data[curve.data])
    ]


def _lines(curve: Curve, runs: Sequence[str], *, few: bool) -> Spec:
    """few: its points are worth marks of their own"""
    field = curve.column
    colour = {"domain": list(runs), "range": [COLOURS[at % len(COLOURS)] for at in range(len(runs))]}
    shared = {
        "x": {
            "field": "step",
            "type": "quantitative",
            "title": X_TITLES["step"],
            "axis": {"tickCount": 6},
            "scale": {"nice": False},
        },
        "y": {
            "field": field,
            "type": "quantitative",
            "title": curve.unit or None,
            "scale": {"zero": False},
            "axis": {"tickCount": 5},
        },
        "color": {"field": "run", "type": "nominal", "scale": colour, "legend": None, "sort": None},
    }
    tip = [
        {"field": "run", "title": "run"},
        {"field": "step", "title": "step", "format": ","},
        {"field": "tokens", "title": "tokens", "format": ","},
        {"field": "hours", "title": "hours", "format": ".3~f"},
        {"field": field, "title": curve.title.lower(), "format": ".6~g"},
    ]
    line = {"mark": {"type": "line", "strokeWidth": 1.5, "clip": True}}
    point = {
        "params": [
            {"name": "at", "select": {"type": "point", "nearest": True, "on": "pointerover", "clear": "pointerout"}}
        ],
        "mark": {"type": "point", "filled": True, "size": 34},
        "encoding": {
            "opacity": {"condition": {"param": "at", "value": 1, "empty": False}, "value": 0.9 if few else 0},
            "tooltip": tip,
        },
    }
    present = {"filter": f"isValid(datum[{field!r}])"}
    return {"data": {"name": curve.data}, "transform": [present], "encoding": shared, "layer": [line, point]}


def scatters(table: Table) -> tuple[list[Figure], list[dict[str, object]]]:
    """What varied against what came of it: a panel a key, and the data "runs"; none where nothing varied.

    The page lets its reader choose the figure, and the key that colours.
    """
    if table.result is None:
        return [], []
    rows = [row for row in table.rows if row.get(table.result.key) is not None]
    data = [_run_data(row, table) for row in rows]
    keys = [(number, column) for number, column in enumerate(table.varied) if _num_values(rows, column) > 1]
    colour = _colour(rows, keys)
    return [
        Figure(
            name=f"sweep-{number}",
            title=f"{table.result.title} by {column.title}",
            group="sweep",
            spec=_panel(number, column, rows, table, colour if colour is None or colour[0] != number else None),
        )
        for number, column in keys[:MOST_PANELS]
    ], data


def _run_data(row: Row, table: Table) -> dict[str, object]:
    """A row as data: the varied keys as v0, v1 ..., whose names may be anything."""
    shown = {f"v{number}": _shown(row.get(column.key)) for number, column in enumerate(table.varied)}
    return {"run": row["run"]} | shown | {column.key: row.get(column.key) for column in table.measured}


def _shown(value: object) -> object:
    """Numbers as they are, everything else as text."""
    return value if isinstance(value, int | float) and not isinstance(value, bool) else in_words(value)


def _num_values(rows: Sequence[Row], column: Column) -> int:
    return len({str(row.get(column.key)) for row in rows})


def _is_numeric(rows: Sequence[Row], column: Column) -> bool:
    return all(isinstance(_shown(row.get(column.key)), int | float) for row in rows)


def _colour(rows: Sequence[Row], keys: Sequence[tuple[int, Column]]) -> tuple[int, Column] | None:
    """The key that colours: of several the one with the fewest values, words before numbers."""
    fit = [(number, column) for number, column in keys if _num_values(rows, column) <= MOST_COLOURS]
    if len(keys) < 2 or not fit:
        return None
    return min(fit, key=lambda each: (_is_numeric(rows, each[1]), _num_values(rows, each[1])))


def _panel(number: int, column: Column, rows: Sequence[Row], table: Table, colour: tuple[int, Column] | None) -> Spec:
    assert table.result is not None, "there is one where there are panels"
    field = f"v{number}"
    x: Spec = {"field": field, "title": column.title}
    if _is_numeric(rows, column):
        values = sorted({float(str(row[column.key])) for row in rows})
        is_wide = values[0] > 0.0 and values[-1] / values[0] >= WIDE
        scale = {"type": "log"} if is_wide else {"zero": False}
        marks = {"values": values} if len(values) <= MOST_MARKS else {"tickCount": 5}
        x |= {
            "type": "quantitative",
            "scale": scale | {"nice": False, "padding": 16},
            "axis": marks | {"format": ".6~g"},
        }
    else:
        x |= {"type": "nominal", "sort": None, "axis": {"labelAngle": 0, "labelLimit": 110}}
    tip = [{"field": "run", "title": "run"}]
    tip += [{"field": f"v{at}", "title": each.title} for at, each in enumerate(table.varied)]
    tip += [{"field": each.key, "title": each.title, "format": ".6~g"} for each in table.measured]
    encoding: Spec = {
        "x": x,
        "y": {"field": table.result.key, "type": "quantitative", "title": titled(table.result)},
        "tooltip": tip,
    }
    encoding["y"]["scale"] = {"zero": False}
    if colour is not None:
        encoding["color"] = colour_of(*colour)
    else:
        encoding["color"] = {"value": COLOURS[0]}
    return {
        "data": {"name": "runs"},
        "mark": {"type": "point", "filled": True, "size": 70, "opacity": 0.8},
        "encoding": encoding,
    }


def colour_of(number: int, column: Column) -> Spec:
    """A colour for each value of a varied key."""
    return {
        "field": f"v{number}",
        "type": "nominal",
        "title": column.title,
        "scale": {"range": list(COLOURS)},
        "legend": {"orient": "bottom", "columns": 4, "labelLimit": 140},
    }


THEME: Spec = {
    "font": "system-ui, -apple-system, 'Segoe UI', 'DejaVu Sans', sans-serif",
    "background": None,
    "view": {"stroke": None},
    "axis": {
        "labelColor": "#4b5563",
        "titleColor": "#374151",
        "titleFontWeight": "normal",
        "labelFontSize": 11,
        "titleFontSize": 11,
        "gridColor": "#e8eaee",
        "domainColor": "#9ca3af",
        "tickColor": "#9ca3af",
        "labelOverlap": True,
    },
    "legend": {"labelFontSize": 11, "titleFontSize": 11, "titleFontWeight": "normal", "labelColor": "#374151"},
}


def picture(figures: Sequence[Figure], data: Data, *, title: str) -> Spec:
    """All figures on one sheet, two beside each other, for a picture: the first of the curves has the legend."""
    first = next((figure for figure in figures if "layer" in figure.spec), None)
    return {
        "title": {"text": title, "anchor": "start", "fontSize": 18, "offset": 16},
        "datasets": data,
        "concat": [_still(figure, legend=figure is first) for figure in figures],
        "columns": 2,
        "spacing": 28,
        "resolve": {"scale": {"color": "independent"}},
        "config": THEME | {"background": "white", "padding": 20},
    }


def _still(figure: Figure, *, legend: bool) -> Spec:
    """A figure that answers no pointer."""
    panel: Spec = {"title": figure.title, "width": 400, "height": 220} | figure.spec
    if "layer" in panel:
        line, point = panel["layer"]
        opacity = {"opacity": {"value": point["encoding"]["opacity"]["value"]}}
        panel["layer"] = [line, {"mark": point["mark"], "encoding": opacity}]
    if legend:
        names = {"title": None, "orient": "bottom", "columns": 2, "labelLimit": 190}
        colour = panel["encoding"]["color"] | {"legend": names}
        panel["encoding"] = panel["encoding"] | {"color": colour}
    return panel
