"""The page: a report as one HTML file that needs nothing beside it.

Invariant: its content policy allows no request whatever; a text of a run, a path or an error is never markup.
Cost: 0.9 MB for the library that draws, which vl-convert brings, and the points of the curves.
"""

import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from kdpipe.pipeline.output import jsonable
from kdpipe.pipeline.report import plots, sections
from kdpipe.pipeline.report.figures import COLOURS, THEME, colour_of
from kdpipe.pipeline.report.gather import Report

HERE = Path(__file__).parent
POLICY = "default-src 'none'; script-src 'unsafe-inline' 'unsafe-eval'; style-src 'unsafe-inline'; img-src data:"
"""What draws makes functions of its expressions ('unsafe-eval')."""
GIVES = "window.vegaEmbed = vegaEmbed;"


def page(report: Report, *, out: Path) -> str:
    """The whole file. out: where it will lie, for its links to the events beside it. Needs vl-convert."""
    import vl_convert  # 30 MB: only where something is drawn

    found = {
        "Runs": sections.runs(report),
        "What varied": plots.sweep(report),
        "Curves": plots.curves(report),
        "Live": plots.live(report),
        "Cost": sections.cost(report),
        "Cache": sections.caches(report),
        "Errors and notes": sections.notes(report),
        "Repeat": sections.repeat(report, out),
    }
    there = {title: html for title, html in found.items() if html}
    links = "".join(f'<a href="#{_anchor(title)}">{title}</a>' for title in there)
    body = "".join(f'<section id="{_anchor(title)}"><h2>{title}</h2>{html}</section>' for title, html in there.items())
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>{escape(report.title)} - kdpipe report</title>
<style>{(HERE / "page.css").read_text()}</style></head><body>
<header>{sections.header(report)}<nav>{links}</nav>{sections.tiles(report)}</header>
<main>{body}</main>
<script type="application/json" id="report">{_data(report)}</script>
<script>(() => {{{_unbroken(vl_convert.javascript_bundle(GIVES))}}})();</script>
<script>{(HERE / "page.js").read_text()}</script>
</body></html>
"""


def _anchor(title: str) -> str:
    return title.lower().replace(" ", "-")


def _data(report: Report) -> str:
    """For page.js: figures, their data, and what the controls put in their place."""
    figures = [
        {"name": each.name, "group": each.group, "spec": each.spec, "logs": each.logs} for each in report.figures
    ]
    tree = {
        "figures": figures,
        "data": {name: _packed(rows) for name, rows in report.data.items()},
        "by": {f"v{number}": colour_of(number, column) for number, column in enumerate(report.table.varied)},
        "colours": COLOURS,
        "theme": THEME,
    }
    # An element of script ends at the first "</": JSON may write the sign as its number.
    return json.dumps(jsonable(tree), ensure_ascii=False, allow_nan=False, separators=(",", ":")).replace(
        "<", "\\u003c"
    )


def _packed(rows: Sequence[Mapping[str, object]]) -> dict[str, object]:
    """Rows without their keys, which are said once."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    return {"columns": columns, "rows": [[row.get(column) for column in columns] for row in rows]}


def _unbroken(script: str) -> str:
    """A script that does not end the element it stands in, whatever texts it has."""
    return script.replace("</script", r"<\/script").replace("<!--", r"<\!--")
