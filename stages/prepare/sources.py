"""Sources: data files -> raw records, each with the file and line it came from.

Invariant: records come in the order of the paths and of the lines in them; a file that cannot be read to its end, or
that holds no record, is a DataError naming it. Folders are expanded and missing files found before anything is read.
Cost: one line, one stretch of a JSON array, or a few hundred rows of a columnar file are held at a time.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from kdpipe.manifests.errors import DataError
from kdpipe.manifests.nearest import nearest
from kdpipe.stages.prepare.json_stream import json_values, parse_object

SUFFIXES = (".jsonl", ".json", ".parquet", ".arrow")
DATASET_FILES = ("dataset_info.json", "dataset_infos.json")  # what Hugging Face writes beside data files
BATCH_ROWS = 256


@dataclass(frozen=True, kw_only=True, slots=True)
class RawRecord:
    """One object of a data file, as it was found.

    source: the file
    line: its line there, or its 1-based row in a columnar file
    place: `file:line` for error messages, with the element's number in a JSON array
    """

    source: str
    line: int
    place: str
    fields: dict[str, Any]


def list_files(paths: Sequence[Path]) -> list[Path]:
    """The data files that the paths name, folders expanded in order of name; DataError for one that names none."""
    if not paths:
        raise DataError("no data file was named")
    return [file for path in paths for file in _expand(Path(path))]


def read_records(path: Path) -> Iterator[RawRecord]:
    """Every record of one data file, lazily. Raises DataError when there is none or the file is malformed."""
    read = {".jsonl": _read_jsonl, ".json": _read_json, ".parquet": _read_parquet, ".arrow": _read_arrow}
    num_records = 0
    try:
        for record in read[path.suffix.lower()](path):
            num_records += 1
            yield record
    except (pa.ArrowException, OSError, UnicodeDecodeError) as err:
        if isinstance(err, OSError) and err.errno is not None:
            raise DataError(f"cannot be read: {err.strerror}", where=path) from None
        # pyarrow tells of a file cut short by an OSError without a number.
        kind = path.suffix.lower()[1:]
        raise DataError(f"not a whole {kind} file (after {num_records} records): {err}", where=path) from None
    if num_records == 0:
        raise DataError("holds no record", where=path)


def _expand(path: Path) -> list[Path]:
    """The data files of one path: itself, the files of a saved dataset, or those in a folder."""
    if path.is_dir():
        return _expand_folder(path)
    if not path.exists():
        raise DataError("there is no such file or folder", where=path)
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise DataError(
            f"unknown kind of data file '{suffix}' (known: {', '.join(SUFFIXES)}){_near(suffix)}", where=path
        )
    if path.stat().st_size == 0:
        raise DataError("the file is empty", where=path)
    return [path]


def _near(suffix: str) -> str:
    return nearest(suffix, SUFFIXES) if suffix else ""


def _expand_folder(path: Path) -> list[Path]:
    if (path / "dataset_dict.json").exists():
        splits = sorted(str(child) for child in path.iterdir() if (child / "state.json").exists())
        raise DataError(f"a saved dataset with several splits; name one of them: {', '.join(splits)}", where=path)
    if (path / "state.json").exists():
        return [_whole(path / name) for name in _saved_files(path / "state.json")]
    children = sorted(child for child in path.iterdir() if not child.name.startswith("."))
    files = [c for c in children if c.is_file() and c.suffix.lower() in SUFFIXES and c.name not in DATASET_FILES]
    if not files:
        folders = ", ".join(child.name for child in children if child.is_dir())
        inside = f"; its folders ({folders}) are not searched, name one of them" if folders else ""
        raise DataError(f"no data file ({', '.join(SUFFIXES)}) in this folder{inside}", where=path)
    return [_whole(file) for file in files]


def _saved_files(state: Path) -> list[str]:
    """The Arrow files that `Dataset.save_to_disk` lists in its state.json, in their order."""
    try:
        return [entry["filename"] for entry in json.loads(state.read_bytes())["_data_files"]]
    except (ValueError, KeyError, TypeError):
        raise DataError("expected the state of a saved dataset, with a list '_data_files'", where=state) from None


def _whole(path: Path) -> Path:
    if not path.exists():
        raise DataError("this file of a saved dataset is missing", where=path)
    if path.stat().st_size == 0:
        raise DataError("the file is empty", where=path)
    return path


def _read_jsonl(path: Path) -> Iterator[RawRecord]:
    """One object a line; blank lines are skipped but counted."""
    offset = 0
    with path.open("rb") as file:
        for line, raw in enumerate(file, start=1):
            place = f"{path}:{line}"
            try:
                text = raw.decode("utf-8-sig" if line == 1 else "utf-8")
            except UnicodeDecodeError as err:
                # utf-8-sig counts from after the byte order mark; the bytes it saw end where the line ends.
                bad = offset + len(raw) - len(err.object) + err.start
                raise DataError(f"not UTF-8 at byte {bad}; convert the file to UTF-8", where=place) from None
            offset += len(raw)
            if text.strip():
                yield RawRecord(source=str(path), line=line, place=place, fields=parse_object(text, place))


def _read_json(path: Path) -> Iterator[RawRecord]:
    for value in json_values(path):
        place = f"{path}:{value.line} (element {value.number})"
        yield RawRecord(source=str(path), line=value.line, place=place, fields=value.fields)


def _read_parquet(path: Path) -> Iterator[RawRecord]:
    with pq.ParquetFile(path) as file:
        yield from _rows(path, file.iter_batches(batch_size=BATCH_ROWS))


def _read_arrow(path: Path) -> Iterator[RawRecord]:
    """An IPC file or an IPC stream, told apart by the file's magic; both mapped, not loaded."""
    with pa.memory_map(str(path)) as mapped:
        is_file = mapped.read(6) == b"ARROW1"
        mapped.seek(0)
        if is_file:
            reader = pa.ipc.open_file(mapped)
            yield from _rows(path, (reader.get_batch(i) for i in range(reader.num_record_batches)))
        else:
            yield from _rows(path, pa.ipc.open_stream(mapped))


def _rows(path: Path, batches: Iterator[Any]) -> Iterator[RawRecord]:
    row = 0
    for batch in batches:
        for start in range(0, batch.num_rows, BATCH_ROWS):
            for fields in batch.slice(start, BATCH_ROWS).to_pylist():
                row += 1
                yield RawRecord(source=str(path), line=row, place=f"{path}:{row}", fields=fields)
