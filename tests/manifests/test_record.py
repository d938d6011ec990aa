"""Records read back: nothing but a small regular file that holds what it should."""

import os
from pathlib import Path

import pytest

from kdpipe.manifests import record
from kdpipe.manifests.errors import LayoutError
from kdpipe.manifests.record import Record, read_record


class Note(Record):
    steps: int


def test_a_record_is_read_and_a_missing_one_is_none(tmp_path: Path) -> None:
    (tmp_path / "note.json").write_text('{"steps": 3}')
    assert read_record(tmp_path / "note.json", Note) == Note(steps=3)
    assert read_record(tmp_path / "other.json", Note) is None


def test_no_link_is_followed_and_no_pipe_waited_for(tmp_path: Path) -> None:
    (tmp_path / "note.json").write_text('{"steps": 3}')
    (tmp_path / "link.json").symlink_to("note.json")
    os.mkfifo(tmp_path / "pipe.json")
    for name in ("link.json", "pipe.json"):
        with pytest.raises(LayoutError, match="not a regular file"):
            read_record(tmp_path / name, Note)


def test_a_huge_file_is_refused_before_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "MAX_RECORD_BYTES", 10)
    (tmp_path / "note.json").write_text('{"steps": 3000000}')
    with pytest.raises(LayoutError, match="at most 10 are expected"):
        read_record(tmp_path / "note.json", Note)


def test_a_wrong_value_is_named_with_its_key(tmp_path: Path) -> None:
    (tmp_path / "note.json").write_text('{"steps": "many"}')
    with pytest.raises(LayoutError, match="'steps': expected a valid integer"):
        read_record(tmp_path / "note.json", Note)
