"""Sources: data files -> raw records, each with the file and line it came from.

Invariant: records come in the order of the lines; a file that cannot be read to its end is a DataError naming it, a
line that is not JSON, or a value that is no object, is a record with the error it stands for, so that those after it
can be read. A last line that is not JSON and has no newline is the end of a file that was cut.
Cost: one line, one stretch of a JSON array, or a few hundred rows of a columnar file are held at a time.
"""

import codecs
import json
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field, replace
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
    """One object of a data file, as it was found; a line of JSON is not parsed yet, which another process may do.

    source: the file
    line: its line there, or its 1-based row in a columnar file
    place: `file:line` for error messages, with the element's number in a JSON array
    unread: names of the columns beside `fields` that no form knows, where the file is columnar
    error: why there are no fields
    raw, offset: the line it is and the byte at which it begins, where it is still to be parsed
    """

    source: str
    line: int
    place: str
    fields: dict[str, Any] = field(default_factory=dict)
    unread: tuple[str, ...] = ()
    error: DataError | None = None
    raw: bytes | None = None
    offset: int = 0

    def num_chars(self) -> int:
        """About how much text it holds."""
        return len(self.raw) if self.raw is not None else _num_chars(self.fields)


def read_records(path: Path, on_empty: Note | None = None) -> Iterator[RawRecord]:
    """Every record of one data file, lazily and parsed. Raises DataError where the file is malformed."""
    return map(parsed, raw_records(path, on_empty))


def parsed(record: RawRecord) -> RawRecord:
    """The record with its fields, or the error it stands for. Raises DataError for a last line that was cut."""
    if record.raw is None:
        return record
    try:
        fields = _line_object(record.raw, record.line, record.offset, record.place)
    except DataError as err:
        if isinstance(err.__cause__, MALFORMED) and not record.raw.endswith(b"\n"):
            what = f"{err.args[0]}; the file ends in the middle of this line"
            raise DataError(what, where=record.place) from None
        return replace(record, raw=None, error=err)
    return replace(record, raw=None, fields=fields)


def raw_records(path: Path, on_empty: Note | None = None, more: Collection[str] = ()) -> Iterator[RawRecord]:
    """Every record of one data file, lazily. Raises DataError where the file is malformed.

    on_empty: is told of a file without any record, which is an error otherwise
    more: columns that no form knows and that are read of a columnar file too; of others all are
    """
    read = {".jsonl": _read_jsonl, ".json": _read_json, ".parquet": _read_parquet, ".arrow": _read_arrow}
    num_records = 0
    try:
        for record in read[path.suffix.lower()](path, more):
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


def _read_jsonl(path: Path, more: Collection[str]) -> Iterator[RawRecord]:
    """One object a line; blank lines are skipped but counted."""
    offset = 0
    with path.open("rb") as file:
        for line, raw in enumerate(file, start=1):
            if not _is_blank(raw, line):
                yield RawRecord(source=str(path), line=line, place=f"{path}:{line}", raw=raw, offset=offset)
            offset += len(raw)


def _is_blank(raw: bytes, line: int) -> bool:
    """Whether a line holds blanks alone, those of Unicode too."""
    rest = raw.removeprefix(codecs.BOM_UTF8).strip() if line == 1 else raw.strip()
    return not rest or (not 0x20 < rest[0] < 0x80 and not rest.decode(errors="replace").strip())


def _num_chars(value: object) -> int:
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict | list):
        return sum(map(_num_chars, value.values() if isinstance(value, dict) else value))
    return 0


def _line_object(raw: bytes, line: int, offset: int, place: str) -> dict[str, Any]:
    """The object on a line that begins at byte `offset`."""
    try:
        text = raw.decode("utf-8-sig" if line == 1 else "utf-8")
    except UnicodeDecodeError as err:
        # utf-8-sig counts from after the byte order mark; the bytes it saw end where the line ends.
        bad = offset + len(raw) - len(err.object) + err.start
        raise DataError(f"not UTF-8 at byte {bad}; convert the file to UTF-8", where=place) from err
    return parse_object(text, place)


def _read_json(path: Path, more: Collection[str]) -> Iterator[RawRecord]:
    for value in json_values(path):
        place = f"{path}:{value.line} (element {value.number})"
        try:
            fields = check_object(value.value, place)
        except DataError as err:
            yield RawRecord(source=str(path), line=value.line, place=place, error=err)
        else:
            yield RawRecord(source=str(path), line=value.line, place=place, fields=fields)


def _read_parquet(path: Path, more: Collection[str]) -> Iterator[RawRecord]:
    return _rows(path, parquet_rows(path, more))


def _read_arrow(path: Path, more: Collection[str]) -> Iterator[RawRecord]:
    return _rows(path, arrow_rows(path, more))


def _rows(path: Path, rows: Iterator[Row]) -> Iterator[RawRecord]:
    for number, (fields, unread) in enumerate(rows, start=1):
        yield RawRecord(source=str(path), line=number, place=f"{path}:{number}", fields=fields, unread=unread)
