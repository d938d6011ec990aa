"""Every kind of file gives the same records; every way a file can be wrong has its own message."""

import json
import re
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kdpipe.manifests.errors import DataError
from kdpipe.stages.prepare import json_stream
from kdpipe.stages.prepare.files import list_files
from kdpipe.stages.prepare.json_stream import kind_of
from kdpipe.stages.prepare.sources import RawRecord, read_records

Write = Callable[..., Path]
RECORDS: list[dict[str, Any]] = [
    {"text": f'record {i} 🙂 [1, 2] "quoted" \\ 你好 {"x" * (i % 37)}', "history": {"a": [i, None]}} for i in range(301)
]


def in_every_format(folder: Path, records: list[dict[str, Any]]) -> list[Path]:
    table = pa.Table.from_pylist(records)
    paths = [
        folder / name for name in ("a.jsonl", "b.json", "c.json", "d.json", "e.parquet", "f.arrow", "g.arrow", "h")
    ]
    lines = [json.dumps(record, ensure_ascii=False) for record in records]
    paths[0].write_text("\n".join(lines), encoding="utf-8-sig")
    paths[1].write_text(json.dumps(records), encoding="utf-8-sig")
    paths[2].write_text(json.dumps(records, indent=2, ensure_ascii=False), encoding="utf-8")
    paths[3].write_text("\r\n".join(lines) + "\r\n", encoding="utf-8")
    pq.write_table(table, paths[4], row_group_size=100)
    with pa.ipc.new_file(str(paths[5]), table.schema) as writer:
        writer.write_table(table, max_chunksize=70)
    with pa.ipc.new_stream(str(paths[6]), table.schema) as writer:
        writer.write_table(table)
    paths[7].mkdir()
    names = ["data-00000-of-00002.arrow", "data-00001-of-00002.arrow"]
    for name, part in zip(names, (table.slice(0, 100), table.slice(100)), strict=True):
        with pa.ipc.new_stream(str(paths[7] / name), table.schema) as writer:
            writer.write_table(part)
    (paths[7] / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    (paths[7] / "dataset_info.json").write_text("{}")
    return paths


def fields_of(record: RawRecord) -> dict[str, Any]:
    if record.error is not None:
        raise record.error
    return record.fields


def read_all(path: Path) -> list[dict[str, Any]]:
    return [fields_of(record) for file in list_files([path]) for record in read_records(file)]


def test_every_format_gives_the_same_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = in_every_format(tmp_path, RECORDS)
    assert {path.name: read_all(path) == RECORDS for path in paths} == {path.name: True for path in paths}
    for chunk in (1, 7, 64):  # every place where a chunk of JSON can end
        monkeypatch.setattr(json_stream, "CHUNK_BYTES", chunk)
        assert read_all(paths[1]) == RECORDS
        assert read_all(paths[3]) == RECORDS


def test_lines_are_those_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\n{"n": 2}\r\n   \n{"n": 4}')
    assert [(record.line, record.fields["n"]) for record in read_records(path)] == [(2, 2), (4, 4)]
    path = tmp_path / "a.json"
    path.write_text('[\n {"n":\n  2}, {"n": 3},\n\n {"n": 6}\n]\n')
    assert [record.line for record in read_records(path)] == [2, 3, 5]
    assert [record.place for record in read_records(path)][1] == f"{path}:3 (element 2)"


def test_a_folder_is_read_in_order_of_name(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.json", "c.PARQUET", "README.md", ".hidden.jsonl", "dataset_info.json"):
        (tmp_path / name).write_text('{"text": "x"}')
    assert [path.name for path in list_files([tmp_path])] == ["a.json", "b.jsonl", "c.PARQUET"]


def test_a_large_array_is_not_held_in_memory(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    element = json.dumps({"text": "x" * 10_000})
    path.write_text("[" + ",".join([element] * 2000) + "]")  # 20 MB on one line
    tracemalloc.start()
    count = sum(1 for _ in read_records(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 2000
    assert peak < 4e6


def test_an_early_mistake_in_a_large_array_is_found_without_reading_on(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('[{"a": 1},\n{"a" 2},' + '{"text": "xxxxxxxxxxxx"},' * 1_000_000 + "]")
    tracemalloc.start()
    with pytest.raises(DataError, match=r"a\.json:2: not JSON: Expecting ':'"):
        list(read_records(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4e6


BAD_FILES = {
    "syntax": ("a.jsonl", b'{"a": 1}\n\n{"a": secret}\n', r"a\.jsonl:3: not JSON: Expecting value at column 7"),
    "cut": ("a.jsonl", b'{"a": 1}\n{"a": "se', r"a\.jsonl:2: not JSON: Unterminated string"),
    "list": ("a.jsonl", b'{"a": 1}\n[1]\n', r"a\.jsonl:2: expected an object, found a list"),
    "string": ("a.jsonl", b'"secret"\n', r"a\.jsonl:1: expected an object, found a string"),
    "latin1": ("a.jsonl", b'{"a": 1}\n{"a": "caf\xe9"}\n', r"a\.jsonl:2: not UTF-8 at byte 19"),
    "latin1 after a mark": ("a.jsonl", b'\xef\xbb\xbf{"a": "caf\xe9"}\n', r"a\.jsonl:1: not UTF-8 at byte 13"),
    "utf-16": ("a.jsonl", '{"a": 1}'.encode("utf-16"), r"a\.jsonl:1: not UTF-8 at byte 0"),
    "deep": ("a.jsonl", b'{"a": ' + b"[" * 200_000, r"a\.jsonl:1: not JSON that can be read"),
    "blank": ("a.jsonl", b"\n \n", r"a\.jsonl: holds no record"),
    "empty": ("a.jsonl", b"", r"a\.jsonl: the file is empty"),
    "array syntax": ("a.json", b'[{"a": 1},\n{"a" 1}]', r"a\.json:2: not JSON: Expecting ':'"),
    "array cut": ("a.json", b'[{"a": 1},\n{"a": 1}\n', r"a\.json:3: expected ']' and the file ends"),
    "array cut in a string": ("a.json", b'[{"a": 1},\n{"a": "se', r"a\.json:2: not JSON: Unterminated string"),
    "array without a comma": ("a.json", b'[{"a": 1}\n{"a": 1}]', r"a\.json:2: expected ',' and something else came"),
    "array with a last comma": ("a.json", b'[{"a": 1},\n]', r"a\.json:2: expected an object"),
    "array of strings": ("a.json", b'["secret"]', r"a\.json:1 \(element 1\): expected an object, found a str"),
    "array with two commas": ("a.json", b'[{"a": 1},,{"a": 1}]', r"a\.json:1: expected an object"),
    "array cut after a comma": ("a.json", b'[{"a": 1},', r"a\.json:1: expected an object, found the end"),
    "array cut in a word": ("a.json", b'[{"a": 1}, tru', r"a\.json:1: not JSON: Expecting value"),
    "array and more": ("a.json", b'[{"a": 1}]\n{', r"a\.json:2: expected the end of the file"),
    "array latin1": ("a.json", b'[{"a": 1},\n{"a": "caf\xe9"}]', r"a\.json:2: not UTF-8 at byte 21"),
    "empty array": ("a.json", b"[ ]", r"a\.json: holds no record"),
    "number": ("a.json", b"12", r"a\.json:1 \(element 1\): expected an object, found a number"),
    "parquet": ("a.parquet", b"PAR1 but no more", r"a\.parquet: not a whole parquet file"),
    "arrow": ("a.arrow", b"no arrow at all, this", r"a\.arrow: not a whole arrow file"),
    "arrow file": ("a.arrow", b"ARROW1\0\0 cut", r"a\.arrow: not a whole arrow file"),
    "suffix": ("a.csv", b"a,b", r"a\.csv: unknown kind of data file '\.csv' \(known: \.jsonl, \.json"),
    "near suffix": ("a.jsnl", b"{}", r"did you mean '\.jsonl'\?"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_malformed_file_is_refused_at_its_line(case: str, tmp_path: Path) -> None:
    name, content, message = BAD_FILES[case]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        read_all(tmp_path / name)
    assert re.search(message, str(caught.value)), str(caught.value)
    assert "secret" not in str(caught.value)


def test_the_records_before_a_malformed_line_come_first(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"n": 1}\n{"n": 2}\n{')
    records = read_records(tmp_path / "a.jsonl")
    assert [next(records).line, next(records).line] == [1, 2]
    with pytest.raises(DataError, match=":3: not JSON"):
        fields_of(next(records))


@pytest.mark.parametrize("end", [b'{"n": ', b'{"n": "caf\xc3', b'{"n": 3'])
def test_a_last_line_that_is_cut_ends_the_file(end: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"n": 1}\n' + end)
    with pytest.raises(DataError, match=r"a\.jsonl:2: not .*; the file ends in the middle of this line"):
        list(read_records(tmp_path / "a.jsonl"))
    (tmp_path / "a.jsonl").write_bytes(b'{"n": 1}\n5')
    assert [record.error is None for record in read_records(tmp_path / "a.jsonl")] == [True, False]


def test_the_records_after_a_malformed_line_can_be_read(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"n": 1}\n{"n": \n{"n": "caf\xe9"}\n{"n": 4}\n')
    records = list(read_records(tmp_path / "a.jsonl"))
    assert [(record.line, record.error is None) for record in records] == [(1, True), (2, False), (3, False), (4, True)]


def test_the_elements_after_one_that_is_no_object_can_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    others = ["5", "-1.5e+3", "1e5", '"a"', "[1, [2]]", "true", "null"]
    (tmp_path / "a.json").write_text('[{"n": 1}, ' + ",\n".join(others) + ', {"n": 2}]')
    for chunk in (1, 2, 3, 1 << 18):
        monkeypatch.setattr(json_stream, "CHUNK_BYTES", chunk)
        records = list(read_records(tmp_path / "a.json"))
        assert [record.error is None for record in records] == [True, *[False] * len(others), True]
        assert [record.line for record in records] == [1, *range(1, 8), 7]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_a_number_too_long_for_python_is_no_reason_not_to_read_what_stands_beside_it(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b'{"text": "x", "a": ' + b"1" * 5000 + b"}")
    [record] = read_records(tmp_path / name)
    assert record.fields["text"] == "x"
    assert kind_of(record.fields["a"]) == "a number of 5,000 digits"


def test_a_cut_columnar_file_is_refused(tmp_path: Path) -> None:
    paths = in_every_format(tmp_path, RECORDS)
    for path in paths[4:7]:
        path.write_bytes(path.read_bytes()[:-500])
        with pytest.raises(DataError, match=f"{path.name}: not a whole"):
            read_all(path)


def test_a_columnar_file_without_rows_is_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet: holds no record"):
        read_all(tmp_path / "a.parquet")


def test_missing_files_and_folders_without_data_are_refused_before_anything_is_read(
    tmp_path: Path, write: Write
) -> None:
    good = write([{"text": "x"}], "good.jsonl")
    with pytest.raises(DataError, match=r"gone\.jsonl: there is no such file or folder"):
        list_files([good, tmp_path / "gone.jsonl"])
    with pytest.raises(DataError, match="no data file was named"):
        list_files([])
    (tmp_path / "repo" / "data").mkdir(parents=True)
    with pytest.raises(DataError, match=r"repo: no data file .*its folders \(data\) are not searched"):
        list_files([tmp_path / "repo"])
    (tmp_path / "repo" / "a.jsonl").write_text("")
    with pytest.raises(DataError, match=r"a\.jsonl: the file is empty"):
        list_files([tmp_path / "repo"])


def test_a_dataset_of_several_splits_asks_for_one(tmp_path: Path) -> None:
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
        (tmp_path / split / "state.json").write_text("{}")
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(DataError, match=r"several splits; name one of them: \S+/test, \S+/train$"):
        list_files([tmp_path])
    with pytest.raises(DataError, match=r"train/state\.json: expected the state of a saved dataset"):
        list_files([tmp_path / "train"])
    (tmp_path / "test" / "state.json").write_text('{"_data_files": [{"filename": "gone.arrow"}]}')
    with pytest.raises(DataError, match=r"gone\.arrow: this file of a saved dataset is missing"):
        list_files([tmp_path / "test"])
