"""Records of a run are read like every other small file: whole, regular, of a size that can be."""

import os
from pathlib import Path

import pytest

from kdpipe.manifests.durable import canonical
from kdpipe.manifests.errors import LayoutError
from kdpipe.manifests.run import RUN_FILE, RunInputs, RunRecord, read_run
from kdpipe.manifests.specs import RunSpec


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


def test_metrics_are_shown_in_one_order_however_the_file_has_them(tmp_path: Path) -> None:
    inputs = RunInputs(student="s", caches=("c",), heldout_fraction=0.1, spec=RunSpec())
    metrics: dict[str, int | float] = {"num_tokens": 3, "zeta": 1.0, "heldout_kl": 0.5, "alpha": 2.0, "heldout_ce": 1.5}
    record = RunRecord(inputs=inputs, num_steps=1, num_tokens=9, num_skipped=0, metrics=metrics, files={})
    (tmp_path / RUN_FILE).write_bytes(canonical(record.model_dump(mode="json")))
    read = read_run(tmp_path)
    assert read is not None
    assert list(record.metrics) == list(read.metrics) == ["heldout_kl", "heldout_ce", "num_tokens", "alpha", "zeta"]
