"""Plots: the places in the page where page.js draws the figures, and the controls that change them."""

from collections.abc import Sequence
from html import escape

from kdpipe.pipeline.report.figures import COLOURS, MOST_COLOURS, X_TITLES, Figure
from kdpipe.pipeline.report.gather import Report
from kdpipe.pipeline.report.markup import about, dot
from kdpipe.pipeline.report.tables import titled


def colours_of(report: Report) -> dict[str, str]:
    """The colours of the runs whose curves are drawn."""
    return {name: COLOURS[at % len(COLOURS)] for at, name in enumerate(report.curves)}


def sweep(report: Report) -> str:
    """What varied against what came of it, the figure and the colour for the reader to choose."""
    figures, table = _of_group(report, "sweep"), report.table
    if not figures:
        return ""
    measures = "".join(
        _option(column.key, column.title, chosen=column is table.result, title=titled(column))
        for column in table.measured
    )
    controls = f'<label>figure <select name="y">{measures}</select></label>{_colour_choice(report, figures)}'
    left = len(table.varied) - len(figures)
    more = f" Of {len(table.varied)} keys that vary {len(figures)} are drawn, all are in the table." if left else ""
    said = f"One point a run; a run that was not measured has none.{more}"
    return f'{about(said)}<div class="controls" data-group="sweep">{controls}</div>{_plots(figures)}'


def _colour_choice(report: Report, figures: Sequence[Figure]) -> str:
    """The key that colours the points, where there are several; figures.py has chosen the first."""
    varied, rows = report.table.varied, report.table.rows
    if len(varied) < 2:
        return ""
    used = {figure.spec["encoding"]["color"].get("field") for figure in figures}
    few = {
        f"v{number}": column.title
        for number, column in enumerate(varied)
        if len({str(row.get(column.key)) for row in rows}) <= MOST_COLOURS
    }
    options = "".join(_option(field, title, chosen=field in used) for field, title in few.items())
    return f'<label>coloured by <select name="color">{_option("", "nothing")}{options}</select></label>'


def curves(report: Report) -> str:
    figures = _of_group(report, "curves")
    if not figures:
        return about("No run has made a step yet.")
    said = ["Point at a curve for its numbers." + " Click a run to hide it." * (len(report.curves) > 1)]
    if len(report.curves) < report.num_with_curves:
        by = f" by {report.table.result.title}" if report.table.result is not None else ""
        said.append(f"Drawn are the {len(report.curves)} best{by} of {report.num_with_curves:,} runs.")
    if report.num_left_out:
        said.append(
            f"The curves are thinned by {report.num_left_out:,} points: each that is drawn is as it was recorded, the "
            "lowest and highest loss of every stretch among them. The raw events lie beside, see Repeat."
        )
    return about(" ".join(said)) + _axes("curves") + _chips(report) + _plots(figures)


def live(report: Report) -> str:
    figures = _of_group(report, "live")
    if not figures:
        return ""
    said = "Of runs beside a teacher at work, and of answers that the student writes itself."
    return about(said) + _axes("live") + _chips(report) + _plots(figures)


def _of_group(report: Report, group: str) -> list[Figure]:
    return [figure for figure in report.figures if figure.group == group]


def _axes(group: str) -> str:
    """Against what the curves are drawn."""
    radios = "".join(
        f'<label><input type="radio" name="x" value="{key}" data-title="{title}"{" checked" * (key == "step")}>'
        f"{'steps' if key == 'step' else key}</label>"
        for key, title in X_TITLES.items()
    )
    log = '<label><input type="checkbox" name="log">logarithmic</label>'
    return f'<form class="controls" data-group="{group}" autocomplete="off"><span>against</span>{radios}{log}</form>'


def _chips(report: Report) -> str:
    if len(report.curves) < 2:
        return ""
    chips = "".join(
        f'<button type="button" class="chip" aria-pressed="true" data-run="{escape(name)}">{dot(colour)}{escape(name)}'
        "</button>"
        for name, colour in colours_of(report).items()
    )
    return f'<div class="chips">{chips}</div>'


def _option(value: str, text: str, *, chosen: bool = False, title: str = "") -> str:
    data = f' data-title="{escape(title)}"' if title else ""
    return f'<option value="{escape(value)}"{data}{" selected" * chosen}>{escape(text)}</option>'


def _plots(figures: Sequence[Figure]) -> str:
    return f'<div class="figures">{"".join(map(_plot, figures))}</div>'


def _plot(figure: Figure) -> str:
    title = escape(figure.title)
    caption = f"<figcaption>{escape(figure.about)}</figcaption>" if figure.about else ""
    plot = f'<div class="plot" id="{figure.name}" role="img" aria-label="{title}"></div>'
    return f"<figure><h3>{title}</h3>{plot}{caption}</figure>"
