"""Columnar files: the rows of parquet and Arrow files, of which only columns that a form knows are converted.

Invariant: a column that no form knows is never looked into, whatever its type: only which rows have it is found out. In
the others a value that JSON has no like of (a date, bytes, a decimal) becomes `Unreadable`, so that only a form that
needs it complains.
Cost: plain columns are converted by pyarrow; those with other types in them one value at a time, some ten times slower.
"""

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from kdpipe.manifests.errors import DataError
from kdpipe.stages.prepare.columns import RECORD_COLUMNS
from kdpipe.stages.prepare.json_stream import Unreadable, object_of

BATCH_ROWS = 256
Row = tuple[dict[str, Any], tuple[str, ...]]
"""The columns of a row that a form may know, and the names of the others that hold something in it."""


def parquet_rows(path: Path, more: Collection[str] = ()) -> Iterator[Row]:
    """more: columns that are converted too."""
    with pq.ParquetFile(path) as file:
        known = _known(file.schema_arrow.names, path, more)
        others = [each.name for each in file.schema_arrow if each.name not in known and not pa.types.is_null(each.type)]
        of_columns = _held(file)
        held = {name: of_columns.get(name.partition(".")[0], False) for name in others}
        everywhere = tuple(name for name in others if held[name] is True)
        somewhere = [name for name in others if held[name] is None]
        for batch in file.iter_batches(batch_size=BATCH_ROWS, columns=known + somewhere):
            for fields, unread in zip(_fields(batch, known), _unread(batch, somewhere), strict=True):
                yield fields, everywhere + unread


def arrow_rows(path: Path, more: Collection[str] = ()) -> Iterator[Row]:
    """An IPC file or an IPC stream, told apart by the file's magic; both mapped, not loaded. more: as parquet_rows."""
    with pa.memory_map(str(path)) as mapped:
        is_file = mapped.read(6) == b"ARROW1"
        mapped.seek(0)
        reader = pa.ipc.open_file(mapped) if is_file else pa.ipc.open_stream(mapped)
        known = _known(reader.schema.names, path, more)
        batches = (reader.get_batch(i) for i in range(reader.num_record_batches)) if is_file else reader
        for batch in batches:
            others = [name for name in batch.schema.names if name not in known]
            for start in range(0, batch.num_rows, BATCH_ROWS):
                part = batch.slice(start, BATCH_ROWS)
                yield from zip(_fields(part, known), _unread(part, others), strict=True)


def _known(names: list[str], path: Path, more: Collection[str]) -> list[str]:
    """The columns to read. Raises DataError for one that stands there twice."""
    known = [name for name in names if name in RECORD_COLUMNS or name in more]
    if doubled := {name for name in known if known.count(name) > 1}:
        raise DataError(f"has two columns '{min(doubled)}'; keep one", where=path)
    return known


def _held(file: pq.ParquetFile) -> dict[str, bool | None]:
    """Whether a column holds something in every row or in none, by the file's statistics; None where rows may differ.

    Without statistics it counts as held.
    """
    found: dict[str, set[bool | None]] = {}
    for group in range(file.metadata.num_row_groups):
        for index in range(file.metadata.num_columns):
            chunk = file.metadata.row_group(group).column(index)
            told = chunk.statistics
            num_nulls = told.null_count if told is not None and told.has_null_count else 0
            some = None if 0 < num_nulls < chunk.num_values else num_nulls == 0
            found.setdefault(chunk.path_in_schema.partition(".")[0], set()).add(some)
    return {name: held.pop() if len(held) == 1 else None for name, held in found.items()}


def _unread(batch: pa.RecordBatch, others: list[str]) -> Iterator[tuple[str, ...]]:
    """For each row the names of the columns that hold something in it."""
    indices = [index for index, name in enumerate(batch.schema.names) if name in others]
    held = [batch.column(index).is_valid().to_pylist() for index in indices]
    for row in range(batch.num_rows):
        yield tuple(name for name, valid in zip(others, held, strict=True) if valid[row])


def _fields(batch: pa.RecordBatch, known: list[str]) -> Iterator[dict[str, Any]]:
    values = [_values(batch.column(name)) for name in known]
    for row in range(batch.num_rows):
        yield {name: column[row] for name, column in zip(known, values, strict=True)}


def _values(column: pa.Array) -> list[Any]:
    if _is_plain(column.type):
        try:
            return column.to_pylist()
        except UnicodeDecodeError:
            pass  # one value at a time says which
    return [_value(scalar) for scalar in column]


def _is_plain(kind: pa.DataType) -> bool:
    """Whether pyarrow turns each value of this type into what JSON would have given."""
    if pa.types.is_struct(kind):
        fields = [kind.field(index) for index in range(kind.num_fields)]
        return len({field.name for field in fields}) == len(fields) and all(_is_plain(field.type) for field in fields)
    if _is_list(kind) or pa.types.is_dictionary(kind):
        return _is_plain(kind.value_type)
    return _is_leaf(kind)


def _is_list(kind: pa.DataType) -> bool:
    checks = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list, pa.types.is_list_view)
    return any(check(kind) for check in (*checks, pa.types.is_large_list_view))


def _is_leaf(kind: pa.DataType) -> bool:
    text = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
    numbers = (pa.types.is_boolean, pa.types.is_integer, pa.types.is_floating, pa.types.is_null)
    return any(check(kind) for check in (*text, *numbers))


def _value(scalar: pa.Scalar) -> Any:
    """A value of any type as JSON would have given it, what has no like there as Unreadable."""
    kind = scalar.type
    if isinstance(scalar, pa.ExtensionScalar | pa.DictionaryScalar | pa.UnionScalar):
        return None if scalar.value is None else _value(scalar.value)
    if not scalar.is_valid:
        return None
    if pa.types.is_map(kind):
        return object_of([(str(_value(each["key"])), _value(each["value"])) for each in scalar.values])
    if pa.types.is_struct(kind):
        return object_of([(kind.field(index).name, _value(scalar[index])) for index in range(kind.num_fields)])
    if _is_list(kind):
        return [_value(each) for each in scalar.values]
    if not _is_leaf(kind):
        return Unreadable(str(kind))
    try:
        return scalar.as_py()
    except UnicodeDecodeError:
        return Unreadable("text that is not UTF-8")
