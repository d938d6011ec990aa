"""Files: the data files that paths name, found and looked at before anything is read.

Invariant: each file is named once, is a regular file that can be opened, and is data: files of other splits are asked
about, what lies in a folder and is not read is noted by name. Folders are taken in order of name, not searched deeper.
"""

import json
import os
import re
import stat
from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatch
from pathlib import Path

from kdpipe.manifests.errors import DataError
from kdpipe.manifests.nearest import nearest
from kdpipe.manifests.places import kind_of

SUFFIXES = (".jsonl", ".json", ".parquet", ".arrow")
DATASET_FILES = ("dataset_info.json", "dataset_infos.json")  # what Hugging Face writes beside data files
SIDECAR = ".jsonl.json"
"""Ending of what `kdpipe generate` writes of a file of its answers beside it."""
CACHE_FILES = ("cache-*.arrow", "tmp*.arrow")  # what its datasets keeps of maps and shuffles
SPLITS = {
    "train": "train",
    "training": "train",
    "test": "test",
    "testing": "test",
    "valid": "validation",
    "validate": "validation",
    "validation": "validation",
    "val": "validation",
    "dev": "validation",
    "eval": "validation",
    "evaluation": "validation",
    "heldout": "validation",
    "holdout": "validation",
}
CASE_BORDER = re.compile(r"(?<=[a-z])(?=[A-Z])")
WORD = re.compile(r"(?:held|hold)[^a-z]?out|[a-z]+")
ENDING = re.compile(r"(set|data|split)?s?$")
"""What a word may end in and still name a split: testset, tests, traindata."""
SHOWN_NAMES = 12

Note = Callable[[str], None]


def unheard(text: str) -> None:
    """A note that nobody wants."""


def list_files(paths: Sequence[Path], note: Note = unheard) -> list[Path]:
    """The data files that the paths name, folders expanded in order of name; DataError for one that names none."""
    if not paths:
        raise DataError("no data file was named")
    files: dict[tuple[int, int], Path] = {}
    for path in paths:
        try:
            found = _expand(Path(path), note)
            for file in found:
                status = file.stat()
                key = (status.st_dev, status.st_ino)
                if key in files:
                    raise DataError(f"the same file as {files[key]}: its samples would count twice", where=file)
                files[key] = file
        except OSError as err:
            raise DataError(f"cannot be read: {err.strerror}", where=err.filename or path) from None
    return list(files.values())


def _expand(path: Path, note: Note) -> list[Path]:
    """The data files of one path: itself, the files of a saved dataset, or those in a folder."""
    if path.is_dir():
        return _expand_folder(path, note)
    if not path.exists():
        raise DataError("there is no such file or folder", where=path)
    return [_data_file(path)]


def _data_file(path: Path) -> Path:
    """The path, which must be a file of a known kind that holds something."""
    _check_regular(path)
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        near = nearest(suffix, SUFFIXES) if suffix else ""
        raise DataError(f"unknown kind of data file '{suffix}' (known: {', '.join(SUFFIXES)}){near}", where=path)
    if path.stat().st_size == 0:
        raise DataError("the file is empty", where=path)
    return path


def _check_regular(path: Path) -> None:
    """Raise DataError unless the path is a file that can be opened and read from its start, again and again."""
    if not path.exists():
        raise DataError("a link to a file that is missing", where=path)
    mode = path.stat().st_mode
    kinds = (
        (stat.S_ISFIFO, "a pipe"),
        (stat.S_ISSOCK, "a socket"),
        (stat.S_ISCHR, "a device"),
        (stat.S_ISBLK, "a disk"),
    )
    for is_kind, kind in kinds:
        if is_kind(mode):
            raise DataError(f"{kind}, and data is read more than once; write it to a file and name that", where=path)
    if not os.access(path, os.R_OK):
        raise DataError("cannot be read: permission denied", where=path)


def _expand_folder(path: Path, note: Note) -> list[Path]:
    if kind := kind_of(path):
        way = "--cache trains on one" if kind == "cache" else "name the files or folders of your data"
        raise DataError(f"this is a {kind}, whose files are no data; {way}", where=path)
    if (path / "dataset_dict.json").exists():
        splits = sorted(str(child) for child in path.iterdir() if (child / "state.json").exists())
        raise DataError(f"a saved dataset with several splits; name one of them: {', '.join(splits)}", where=path)
    if (path / "state.json").exists():
        return [_whole(path / name) for name in _saved_files(path / "state.json")]
    children = sorted(child for child in path.iterdir() if not child.name.startswith("."))
    named = [c for c in children if c.suffix.lower() in SUFFIXES and c.name not in DATASET_FILES and not c.is_dir()]
    there = {child.name for child in named}
    sidecars = [c for c in named if c.name.endswith(SIDECAR) and c.name.removesuffix(".json") in there]
    files = [c for c in named if c not in sidecars and not any(fnmatch(c.name, pattern) for pattern in CACHE_FILES)]
    folders = [child.name for child in children if child.is_dir()]
    if not files:
        inside = f"; its folders ({_listed(folders)}) are not searched, name one of them" if folders else ""
        cached = "; files that datasets caches (cache-*.arrow) are none" if named else ""
        raise DataError(f"no data file ({', '.join(SUFFIXES)}) in this folder{cached}{inside}", where=path)
    for file in files:
        _check_regular(file)
    _check_one_split(path, files)
    full = [file for file in files if file.stat().st_size]
    if not full:
        raise DataError("the file is empty", where=files[0])
    for what, names in (
        ("files of no bytes", [file.name for file in files if file not in full]),
        ("folders, not searched", folders),
        (
            "files, not read",
            [c.name for c in children if c.is_file() and c not in (*files, *sidecars) and c.name not in DATASET_FILES],
        ),
    ):
        if names:
            note(f"{path}: holds {what}: {_listed(names)}")
    return full


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN_NAMES} more" if len(names) > SHOWN_NAMES else ""
    return ", ".join(names[:SHOWN_NAMES]) + more


def _check_one_split(folder: Path, files: Iterable[Path]) -> None:
    """Raise DataError for files of several splits: test data is not to be trained on because it lies there too."""
    splits: dict[str, list[str]] = {}
    for file in files:
        splits.setdefault(_split(file.stem), []).append(file.name)
    if len(splits) > 1 and splits.keys() != {"", "train"}:
        found = "; ".join(f"{split or 'no split'}: {_listed(names)}" for split, names in sorted(splits.items()))
        raise DataError(
            f"holds several splits ({found}); name the files of one, {folder}/train* for example", where=folder
        )


def _split(stem: str) -> str:
    """The split that a file's name tells, by the last word that is one; "" without any.

    train-00000-of-00002 -> train; gsm8k_test -> test; myTestset -> test; held_out -> validation; chats -> ""
    """
    words = [re.sub("[^a-z]", "", word) for word in WORD.findall(CASE_BORDER.sub("_", stem).lower())]
    splits = [SPLITS[name] for word in words if (name := ENDING.sub("", word)) in SPLITS]
    return splits[-1] if splits else ""


def _saved_files(state: Path) -> list[str]:
    """The Arrow files that `Dataset.save_to_disk` lists in its state.json, in their order."""
    try:
        names = [entry["filename"] for entry in json.loads(state.read_bytes())["_data_files"]]
    except (ValueError, KeyError, TypeError, RecursionError):
        names = [None]
    if not all(isinstance(name, str) for name in names):
        raise DataError("expected the state of a saved dataset, with a list '_data_files'", where=state)
    if not names:
        raise DataError("the saved dataset holds no record", where=state)
    return names


def _whole(path: Path) -> Path:
    if not path.exists():
        raise DataError("this file of a saved dataset is missing", where=path)
    return _data_file(path)
