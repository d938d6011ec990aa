"""Records of a run are read like every other small file: whole, regular, of a size that can be."""

import os
from pathlib import Path

import pytest

from kdpipe.manifests.errors import LayoutError
from kdpipe.manifests.run import RUN_FILE, read_run


def test_a_folder_without_a_record_is_no_student_of_ours(tmp_path: Path) -> None:
    assert read_run(tmp_path) is None


@pytest.mark.parametrize("kind", ["link", "dangling link", "pipe", "large", "empty", "other"])
def test_a_record_that_is_not_one_is_refused(kind: str, tmp_path: Path) -> None:
    path, elsewhere = tmp_path / RUN_FILE, tmp_path / "elsewhere"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "dangling link":
        path.symlink_to(elsewhere)
    elif kind == "link":
        elsewhere.write_text("{}")
        path.symlink_to(elsewhere)
    elif kind == "large":
        with open(path, "wb") as file:
            file.truncate(1 << 40)
    else:
        path.write_text({"empty": "", "other": "{}"}[kind])
    with pytest.raises(LayoutError, match=RUN_FILE):
        read_run(tmp_path)
