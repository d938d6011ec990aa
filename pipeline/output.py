"""Output: what a command prints on stdout at its end, for a person or for a program.

Invariant: with `--json` stdout holds exactly one JSON object; libraries that print land on stderr (`results_only`).
"""

import contextlib
import json
import math
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from kdpipe.manifests.provenance import SHORTEST_DIGEST

MOST_LINES = 50
"""Of a list in a listing."""
DIGEST = re.compile(r"[0-9a-f]{32,64}")
UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")


def human_bytes(num_bytes: float) -> str:
    """1536 -> "1.5 KiB"."""
    value = float(num_bytes)
    for unit in UNITS[:-1]:
        if abs(value) < 1024:
            return f"{value:.0f} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} {UNITS[-1]}"


def jsonable(value: object) -> object:
    """`value` as JSON can hold it: numbers that are not finite become null, paths text, numpy scalars numbers."""
    if isinstance(value, Mapping):
        return {str(key): jsonable(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(entry) for entry in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, str | int):
        return value
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "item"):
        return jsonable(value.item())
    raise TypeError(f"{type(value).__name__} has no place in JSON")


def to_json(record: Mapping[str, object]) -> str:
    """One object on one line."""
    return json.dumps(jsonable(record), ensure_ascii=False, allow_nan=False)


def show(record: Mapping[str, object], *, as_json: bool) -> None:
    """Print a command's result: one JSON object, or two aligned columns."""
    sys.stdout.write((to_json(record) if as_json else listing(record)) + "\n")
    sys.stdout.flush()


def listing(record: Mapping[str, object]) -> str:
    """Two aligned columns, one entry a line; nested records are spelled out: "settings rows    all".

    A list has a line for each entry, and a digest is cut short: JSON has all of it.
    """
    rows = list(_flat(record, ""))
    width = max((len(name) for name, _ in rows), default=0)
    return "\n".join(f"{name:<{width}}  {text}" for name, text in rows)


def table(rows: Sequence[Mapping[str, object]]) -> str:
    """Aligned columns under their names, those that some row has; texts to the left, numbers to the right."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = [[name.replace("_", " ") for name in names]]
    cells += [["" if row.get(name) is None else _text(name, row[name]) for name in names] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    texts = [any(isinstance(row.get(name), str) for row in rows) for name in names]
    lines = (
        "  ".join(
            cell.ljust(width) if text else cell.rjust(width)
            for cell, width, text in zip(line, widths, texts, strict=True)
        )
        for line in cells
    )
    return "\n".join(line.rstrip() for line in lines)


def _flat(record: Mapping[str, object], prefix: str) -> Iterator[tuple[str, str]]:
    for key, value in record.items():
        name = f"{prefix} {key}".strip().replace("_", " ")
        if isinstance(value, Mapping):
            yield from _flat(value, name)
        elif isinstance(value, list | tuple):
            yield from ((name if not at else "", _text(name, entry)) for at, entry in enumerate(value[:MOST_LINES]))
            if len(value) > MOST_LINES:
                yield "", f"... and {len(value) - MOST_LINES:,} more, all with --json"
        else:
            yield name, _text(name, value)


def _text(name: str, value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float) and "bytes" in name.split():
        return human_bytes(value)
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, str) and DIGEST.fullmatch(value):
        return value[:SHORTEST_DIGEST]
    return f"{value:.6g}" if isinstance(value, float) else str(value)


@contextlib.contextmanager
def results_only() -> Iterator[None]:
    """While it lasts, what this process, its libraries and its children print to stdout goes to stderr."""
    sys.stdout.flush()
    kept = os.dup(1)
    try:
        os.dup2(2, 1)
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
