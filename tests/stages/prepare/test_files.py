"""Which files a path names: each once, of one split, and nothing that is passed over goes unsaid."""

import json
import os
import re
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from kdpipe.manifests.errors import DataError
from kdpipe.stages.prepare.files import list_files

LINE = '{"text": "x"}\n'


def folder_of(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(LINE)
    return folder


SPLITS = {
    "jsonl": ("train.jsonl", "test.jsonl"),
    "parts": ("train-00000-of-00001.parquet", "validation-00000-of-00001.parquet"),
    "a prefix": ("gsm8k_train.jsonl", "gsm8k_test.jsonl"),
    "dev": ("train.json", "dev.json"),
    "upper case": ("TRAIN.jsonl", "Eval.jsonl"),
    "no name": ("chats.jsonl", "test.jsonl"),
    "datasets": ("json-train.arrow", "json-test.arrow"),
    "sets": ("train.jsonl", "testset.jsonl"),
    "many": ("train.jsonl", "tests.jsonl"),
    "a verb": ("train.jsonl", "validate.jsonl"),
    "held out": ("train.jsonl", "held_out.jsonl"),
    "hold-out": ("train.jsonl", "hold-out-1.jsonl"),
    "holdout": ("train.jsonl", "holdout.jsonl"),
    "camel case": ("myTrain.jsonl", "myTest.jsonl"),
    "camel case with a set": ("trainData.json", "evalSet.json"),
    "two that are no training": ("validation.jsonl", "test.jsonl"),
    "the last word": ("train.jsonl", "training_for_the_test.jsonl"),
}


@pytest.mark.parametrize("case", SPLITS)
def test_a_folder_of_several_splits_asks_for_one(case: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds several splits \(.*\); name the files of one"):
        list_files([folder_of(tmp_path, *SPLITS[case])])


ONE_SPLIT = {
    "parts": ("train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl"),
    "train and more": ("more.jsonl", "train.jsonl"),
    "words within words": ("contest.jsonl", "latest.jsonl", "testaments.jsonl", "households-out.jsonl"),
    "sets of one": ("trainset.jsonl", "train.jsonl"),
    "test alone": ("test-1.jsonl", "test-2.jsonl"),
    "the last word": ("train.jsonl", "test_of_train.jsonl"),
}


@pytest.mark.parametrize("case", ONE_SPLIT)
def test_a_folder_of_one_split_is_read(case: str, tmp_path: Path) -> None:
    found = list_files([folder_of(tmp_path, *ONE_SPLIT[case])])
    assert [file.name for file in found] == sorted(ONE_SPLIT[case])


def test_splits_named_one_by_one_are_read(tmp_path: Path) -> None:
    folder_of(tmp_path, "train.jsonl", "test.jsonl")
    assert len(list_files([tmp_path / "train.jsonl", tmp_path / "test.jsonl"])) == 2


def test_what_is_passed_over_in_a_folder_is_said(tmp_path: Path) -> None:
    folder_of(
        tmp_path, "train.jsonl", "cache-0123.arrow", "tmpx1.arrow", "more.csv", "dataset_info.json", "deep/a.jsonl"
    )
    (tmp_path / "train-2.jsonl").touch()
    notes: list[str] = []
    assert [file.name for file in list_files([tmp_path], notes.append)] == ["train.jsonl"]
    assert notes == [
        f"{tmp_path}: holds files of no bytes: train-2.jsonl",
        f"{tmp_path}: holds folders, not searched: deep",
        f"{tmp_path}: holds files, not read: cache-0123.arrow, more.csv, tmpx1.arrow",
    ]


def test_cache_files_alone_are_no_data(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no data file .*; files that datasets caches \(cache-\*\.arrow\) are none"):
        list_files([folder_of(tmp_path, "cache-0123.arrow")])


def pipe(path: Path) -> None:
    os.mkfifo(path)


STATES = {
    "no files": ({"_data_files": []}, r"state\.json: the saved dataset holds no record"),
    "another suffix": ({"_data_files": [{"filename": "x.bin"}]}, r"x\.bin: unknown kind of data file '\.bin'"),
    "a number": ({"_data_files": [{"filename": 5}]}, r"state\.json: expected the state of a saved dataset"),
    "a text": ({"_data_files": "x"}, r"state\.json: expected the state of a saved dataset"),
    "a list": ([], r"state\.json: expected the state of a saved dataset"),
}


@pytest.mark.parametrize("case", STATES)
def test_a_state_of_a_saved_dataset_that_names_no_data_is_refused(case: str, tmp_path: Path) -> None:
    state, message = STATES[case]
    (tmp_path / "x.bin").write_text(LINE)
    (tmp_path / "state.json").write_text(json.dumps(state))
    with pytest.raises(DataError, match=message):
        list_files([tmp_path])


def bound_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))


def broken_link(path: Path) -> None:
    path.symlink_to("gone")


SPECIAL: dict[str, tuple[Callable[[Path], None], str]] = {
    "pipe": (pipe, "a pipe, and data is read more than once"),
    "socket": (bound_socket, "a socket, and"),
    "link": (broken_link, "a link to a file that is missing"),
}


@pytest.mark.parametrize("case", SPECIAL)
def test_what_is_no_regular_file_is_said_and_not_waited_for(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # a socket's path is short
    folder = folder_of(Path("d"), "a.jsonl")
    make, message = SPECIAL[case]
    make(folder / "b.jsonl")
    with pytest.raises(DataError, match=rf"^E-DATA d/b\.jsonl: {re.escape(message)}"):
        list_files([folder])
    with pytest.raises(DataError, match=r"^E-DATA d/b\.jsonl: "):
        list_files([folder / "b.jsonl"])


def test_a_device_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="/dev/zero: a device"):
        list_files([Path("/dev/zero")])


@pytest.mark.parametrize("again", ["the folder", "a link", "a hard link", "another spelling"])
def test_a_file_that_is_named_twice_is_refused(again: str, tmp_path: Path) -> None:
    file = folder_of(tmp_path / "d", "a.jsonl") / "a.jsonl"
    second = {
        "the folder": tmp_path / "d",
        "a link": tmp_path / "link.jsonl",
        "a hard link": tmp_path / "hard.jsonl",
        "another spelling": tmp_path / "d" / ".." / "d" / "a.jsonl",
    }[again]
    if again == "a link":
        second.symlink_to(file)
    elif again == "a hard link":
        second.hardlink_to(file)
    with pytest.raises(DataError, match=r"the same file as \S+a\.jsonl: its samples would count twice"):
        list_files([file, second])


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (("PLAN.json", "samples.arrow"), "this is a cache, whose files are no data; --cache trains on one"),
        (
            ("config.json", "model.safetensors", "vocab.json"),
            "this is a model, whose files are no data; name the files",
        ),
    ],
)
def test_a_cache_or_a_model_is_not_read_as_data(names: tuple[str, ...], says: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=re.escape(says)):
        list_files([folder_of(tmp_path, *names)])
