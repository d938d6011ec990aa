"""Only columns that a form knows are read from parquet and Arrow files, whatever strange types stand beside them."""

from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kdpipe.manifests.errors import DataError
from kdpipe.stages.prepare.forms import Chat, read_form
from kdpipe.stages.prepare.sources import RawRecord, read_records

TURNS = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
UNION = pa.UnionArray.from_dense(
    pa.array([0, 1], pa.int8()), pa.array([0, 0], pa.int32()), [pa.array([1]), pa.array(["a"])]
)
STRANGE: dict[str, pa.Array] = {
    "date": pa.array([2932897] * 2, pa.date32()),
    "year 0": pa.array([-719529] * 2, pa.date32()),
    "timestamp": pa.array([253402300800] * 2, pa.timestamp("s")),
    "time zone": pa.array([0, 0], pa.timestamp("us", tz="Mars/Phobos")),
    "nanoseconds": pa.array([1700000000123456789] * 2, pa.timestamp("ns")),
    "duration": pa.array([2**62] * 2, pa.duration("ms")),
    "time of day": pa.array([1, 1], pa.time64("ns")),
    "decimal": pa.array([Decimal("1.5")] * 2, pa.decimal128(5, 2)),
    "bytes": pa.array([b"\xff"] * 2, pa.binary()),
    "not utf-8": pa.array([b"\xff"] * 2, pa.binary()).view(pa.string()),
    "nested": pa.array([[{"a": {"b": 2932897}}]] * 2, pa.list_(pa.struct({"a": pa.struct({"b": pa.date32()})}))),
    "map": pa.array([[("k", 1)]] * 2, pa.map_(pa.string(), pa.int32())),
    "extension": pa.ExtensionArray.from_storage(pa.uuid(), pa.array([b"x" * 16] * 2, pa.binary(16))),
}
Write = Callable[[pa.Table, Path], Path]


def parquet(table: pa.Table, folder: Path) -> Path:
    pq.write_table(table, folder / "a.parquet")
    return folder / "a.parquet"


def arrow(table: pa.Table, folder: Path) -> Path:
    with pa.ipc.new_file(str(folder / "a.arrow"), table.schema) as writer:
        writer.write_table(table)
    return folder / "a.arrow"


@pytest.mark.parametrize("write", [parquet, arrow])
@pytest.mark.parametrize("case", STRANGE)
def test_a_column_that_no_form_knows_is_not_looked_into(case: str, write: Write, tmp_path: Path) -> None:
    path = write(pa.table({"messages": [TURNS, TURNS], "created": STRANGE[case]}), tmp_path)
    for record in read_records(path):
        unread: set[str] = set()
        assert read_form(record, unread).content() == {"messages": TURNS}
        assert unread == {"created"}


def test_a_union_in_an_arrow_file_is_not_looked_into(tmp_path: Path) -> None:
    path = arrow(pa.table({"text": ["x", "y"], "either": UNION}), tmp_path)
    assert [record.fields for record in read_records(path)] == [{"text": "x"}, {"text": "y"}]


@pytest.mark.parametrize("write", [parquet, arrow])
@pytest.mark.parametrize("case", STRANGE)
def test_strange_keys_of_a_message_are_no_reason_not_to_read_it(case: str, write: Write, tmp_path: Path) -> None:
    keys = {"role": pa.array(["user", "assistant"]), "content": pa.array(["hi", "hello"]), "at": STRANGE[case]}
    messages = pa.ListArray.from_arrays(
        pa.array([0, 2], pa.int32()), pa.StructArray.from_arrays(list(keys.values()), names=list(keys))
    )
    [record] = read_records(write(pa.table({"messages": messages}), tmp_path))
    unread: set[str] = set()
    assert read_form(record, unread).content() == {"messages": TURNS}
    assert unread == {"messages.at"}


@pytest.mark.parametrize("write", [parquet, arrow])
def test_a_strange_type_where_text_is_read_is_said_with_its_row(write: Write, tmp_path: Path) -> None:
    for case, kind in (("date", r"date32\[day\]"), ("bytes", "binary"), ("not utf-8", "text that is not UTF-8")):
        records = list(read_records(write(pa.table({"text": STRANGE[case]}), tmp_path)))
        with pytest.raises(DataError, match=rf":2: column 'text': expected text, found {kind}"):
            read_form(records[1])


@pytest.mark.parametrize("write", [parquet, arrow])
def test_columns_of_nulls_are_absent(write: Write, tmp_path: Path) -> None:
    table = pa.table({"text": ["x"], "id": pa.nulls(1), "day": pa.nulls(1, pa.date32()), "source": ["web"]})
    [record] = read_records(write(table, tmp_path))
    assert record.unread == ("source",)


@pytest.mark.parametrize("write", [parquet, arrow])
@pytest.mark.parametrize("case", STRANGE)
def test_rows_are_counted_by_what_they_hold(case: str, write: Write, tmp_path: Path) -> None:
    note = pa.chunked_array([STRANGE[case], pa.nulls(1, STRANGE[case].type)])
    table = pa.table({"text": ["x", "y", "z"], "note": note, "pair": [None, {"a": None}, {"a": 1}]})
    if write is arrow:
        table = table.combine_chunks()
    held = [record.unread for record in read_records(write(table, tmp_path))]
    assert held == [("note",), ("note", "pair"), ("pair",)]


def test_a_column_that_stands_twice_is_refused(tmp_path: Path) -> None:
    table = pa.Table.from_arrays([pa.array(["x"]), pa.array(["y"])], names=["text", "text"])
    with pytest.raises(DataError, match=r"a\.arrow: has two columns 'text'"):
        list(read_records(arrow(table, tmp_path)))


def test_text_of_dictionaries_and_large_lists_is_read(tmp_path: Path) -> None:
    columns: dict[str, Any] = {
        "text": pa.array(["x", "x"]).dictionary_encode(),
        "history": pa.array([[["q", "a"]]] * 2, pa.large_list(pa.list_(pa.large_string()))),
    }
    records: list[RawRecord] = list(read_records(arrow(pa.table(columns), tmp_path)))
    assert [record.fields for record in records] == [{"text": "x", "history": [["q", "a"]]}] * 2


def test_a_key_that_a_map_has_twice_is_refused(tmp_path: Path) -> None:
    tools = pa.array([[[("name", "add"), ("name", "sub")]]], pa.list_(pa.map_(pa.string(), pa.string())))
    [record] = read_records(arrow(pa.table({"messages": [TURNS], "tools": tools}), tmp_path))
    with pytest.raises(DataError, match="column 'tools': 'name' stands there twice"):
        read_form(record)


def test_tools_in_a_map_are_read_as_objects(tmp_path: Path) -> None:
    tools = pa.array([[[("name", "add"), ("text", "sums")]]], pa.list_(pa.map_(pa.string(), pa.string())))
    [record] = read_records(parquet(pa.table({"messages": [TURNS], "tools": tools}), tmp_path))
    chat = read_form(record)
    assert isinstance(chat, Chat)
    assert chat.tools == [{"name": "add", "text": "sums"}]
