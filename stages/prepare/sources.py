"""Sources: data files -> raw records, each with the file and line it came from.

Invariant: records come in the order of the lines; a file that cannot be read to its end is a DataError naming it, a
line that is not JSON, or a value that is no object, is a record with the error it stands for, so that those after it
can be read. A last line that is not JSON and has no newline is the end of a file that was cut.
Cost: one line, one stretch of a JSON array, or a few hundred rows of a columnar file are held at a time.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kdpipe.manifests.errors import DataError
from kdpipe.stages.prepare.columnar import Row, arrow_rows, parquet_rows
from kdpipe.stages.prepare.files import Note
from kdpipe.stages.prepare.json_stream import check_object, json_values, parse_object

MALFORMED = (json.JSONDecodeError, UnicodeDecodeError)
"""What a line that is cut in its middle causes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RawRecord:
    """One object of a data file, as it was found.

    source: the file
    line: its line there, or its 1-based row in a columnar file
    place: `file:line` for error messages, with the element's number in a JSON array
    unread: names of the columns beside `fields` that no form knows, where the file is columnar
    error: why there are no fields
    """

    source: str
    line: int
    place: str
    fields: dict[str, Any] = field(default_factory=dict)
    unread: tuple[str, ...] = ()
    error: DataError | None = None


def read_records(path: Path, on_empty: Note | None = None) -> Iterator[RawRecord]:
    """Every record of one data file, lazily. Raises DataError where the file is malformed.

    on_empty: is told of a file without any record, which is an error otherwise
    """
    read = {".jsonl": _read_jsonl, ".json": _read_json, ".parquet": _read_parquet, ".arrow": _read_arrow}
    num_records = 0
    try:
        for record in read[path.suffix.lower()](path):
            num_records += 1
            yield record
    except Exception as err:
        if isinstance(err, DataError):
            raise
        if isinstance(err, OSError) and err.errno is not None:
            raise DataError(f"cannot be read: {err.strerror}", where=path) from None
        kind = path.suffix.lower()[1:]
        if kind not in ("parquet", "arrow"):
            raise
        # pyarrow says what is wrong with a file by errors of many types.
        raise DataError(f"not a whole {kind} file (after {num_records} records): {err}", where=path) from None
    if num_records == 0:
        if on_empty is None:
            raise DataError("holds no record", where=path)
        on_empty(f"{path}: holds no record")


def _read_jsonl(path: Path) -> Iterator[RawRecord]:
    """One object a line; blank lines are skipped but counted."""
    offset = 0
    with path.open("rb") as file:
        for line, raw in enumerate(file, start=1):
            place = f"{path}:{line}"
            try:
                fields = _line_object(raw, line, offset, place)
            except DataError as err:
                if isinstance(err.__cause__, MALFORMED) and not raw.endswith(b"\n"):
                    raise DataError(f"{err.args[0]}; the file ends in the middle of this line", where=place) from None
                yield RawRecord(source=str(path), line=line, place=place, error=err)
            else:
                if fields is not None:
                    yield RawRecord(source=str(path), line=line, place=place, fields=fields)
            offset += len(raw)


def _line_object(raw: bytes, line: int, offset: int, place: str) -> dict[str, Any] | None:
    """The object on a line that begins at byte `offset`; None where the line is blank."""
    try:
        text = raw.decode("utf-8-sig" if line == 1 else "utf-8")
    except UnicodeDecodeError as err:
        # utf-8-sig counts from after the byte order mark; the bytes it saw end where the line ends.
        bad = offset + len(raw) - len(err.object) + err.start
        raise DataError(f"not UTF-8 at byte {bad}; convert the file to UTF-8", where=place) from err
    return parse_object(text, place) if text.strip() else None


def _read_json(path: Path) -> Iterator[RawRecord]:
    for value in json_values(path):
        place = f"{path}:{value.line} (element {value.number})"
        try:
            fields = check_object(value.value, place)
        except DataError as err:
            yield RawRecord(source=str(path), line=value.line, place=place, error=err)
        else:
            yield RawRecord(source=str(path), line=value.line, place=place, fields=fields)


def _read_parquet(path: Path) -> Iterator[RawRecord]:
    return _rows(path, parquet_rows(path))


def _read_arrow(path: Path) -> Iterator[RawRecord]:
    return _rows(path, arrow_rows(path))


def _rows(path: Path, rows: Iterator[Row]) -> Iterator[RawRecord]:
    for number, (fields, unread) in enumerate(rows, start=1):
        yield RawRecord(source=str(path), line=number, place=f"{path}:{number}", fields=fields, unread=unread)
