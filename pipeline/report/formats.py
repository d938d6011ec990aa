"""Formats: a report as a table in a file, as a picture, or as JSON."""

import csv
import io
import json

from kdpipe.pipeline.output import jsonable
from kdpipe.pipeline.report.figures import picture
from kdpipe.pipeline.report.gather import Report

PICTURED = ("sweep", "curves")
SCALE = 2.0
"""Pixels of a picture for each of a figure's."""


def csv_of(report: Report) -> str:
    """A row a run: the keys in which they differ, all metrics, cost, how it ended; numbers as they were recorded."""
    columns = [column.key for column in report.table.columns]
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    for row in report.table.rows:
        writer.writerow([_plain(row.get(key)) for key in columns])
    return text.getvalue()


def _plain(value: object) -> object:
    """true, false and lists as JSON has them; what is missing is empty."""
    return json.dumps(jsonable(value)) if isinstance(value, bool | list | tuple | dict) else value


def png_of(report: Report) -> bytes:
    """The sweep and the curves on one sheet. Needs vl-convert, and no browser."""
    import vl_convert  # 30 MB: only where something is drawn

    figures = [figure for figure in report.figures if figure.group in PICTURED]
    data = {
        name: [{key: jsonable(value) for key, value in row.items()} for row in rows]
        for name, rows in report.data.items()
    }
    png = vl_convert.vegalite_to_png(picture(figures, data, title=report.title), scale=SCALE)
    return bytes(png)


def json_of(report: Report) -> dict[str, object]:
    """The rows of the CSV file, the caches and the cost as one object."""
    return {
        "title": report.title,
        "runs": [{column.key: row.get(column.key) for column in report.table.columns} for row in report.table.rows],
        "varied": [column.key for column in report.table.varied],
        "ranked_by": None if report.table.result is None else report.table.result.key,
        "caches": [
            {
                "path": str(cache.path),
                "complete": cache.info is not None and cache.info.is_complete,
                "num_bytes": None if cache.info is None else cache.info.num_bytes,
                "teacher_seconds": cache.teacher.seconds,
                "teacher_tokens": cache.teacher.num_tokens,
            }
            for cache in report.caches
        ],
    }
