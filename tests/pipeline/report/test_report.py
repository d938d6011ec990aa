"""kdpipe report as a user types it: page, table, picture and JSON; without what draws, all that needs no drawing."""

import csv
import importlib.util
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
from tests.conftest import Main
from tests.runs import BEGAN, inputs_of, session, write_events, write_run

from kdpipe.manifests.run import read_run
from kdpipe.pipeline.report import sections
from kdpipe.pipeline.report.gather import gather


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    for name, lr in (("a", 0.01), ("b", 0.001)):
        write_run(tmp_path / "runs" / name, spec={"train": {"lr": lr}}, heldout_kl=lr)
    end = {"time": BEGAN + 60, "kind": "failed", "error": 'E-CHECK step 3: not finite, "nan"', "exit_code": 1}
    write_events(tmp_path / "runs" / "c", [*session(1, 3, began=BEGAN, inputs=inputs_of()), end])
    return tmp_path / "runs"


def test_all_of_it_at_once(runs: Path, main: Main, tmp_path: Path) -> None:
    files = [tmp_path / "new" / name for name in ("r.html", "r.csv", "r.png")]
    code, out, err = main("report", runs, "--out", files[0], "--csv", files[1], "--png", files[2], "--json")
    assert (code, err) == (0, "")
    said = json.loads(out)
    assert [said[key] for key in ("page", "csv", "png")] == list(map(str, files))
    assert said["varied"] == ["train.lr"]
    assert files[0].read_text().startswith("<!doctype html>")
    assert files[2].read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in files[0].parent.iterdir()) == ["r.csv", "r.html", "r.png"]


def test_the_table_in_a_file_has_the_records_numbers_in_full(runs: Path, main: Main, tmp_path: Path) -> None:
    assert main("report", runs, "--csv", tmp_path / "r.csv")[0] == 0
    rows = {row["run"]: row for row in csv.DictReader(io.StringIO((tmp_path / "r.csv").read_text()))}
    for name in ("a", "b"):
        record = read_run(runs / name)
        assert record is not None
        assert record.metrics is not None
        assert {key: float(rows[name][key]) for key in ("heldout_kl", "perplexity")} == {
            key: record.metrics[key] for key in ("heldout_kl", "perplexity")
        }
    assert rows["c"]["error"] == 'E-CHECK step 3: not finite, "nan"'
    assert (rows["c"]["status"], rows["c"]["exit_code"], rows["c"]["steps"]) == ("failed", "1", "2")
    assert [rows[name]["train.lr"] for name in "abc"] == ["0.01", "0.001", "0.0001"]


def test_the_mark_of_the_best_is_the_finished_runs_even_where_another_was_better_on_its_way(
    tmp_path: Path,
) -> None:
    write_run(tmp_path / "good", heldout_kl=0.75)  # the other's last evaluation is 0.41
    write_events(tmp_path / "killed", session(1, 5, began=BEGAN, inputs=inputs_of()))
    report = gather([tmp_path])
    assert "best: good" in sections.tiles(report)
    table = sections.runs(report)
    assert 'class="n best" data-value="0.75"' in table
    assert 'class="n underway" data-value="0.41"' in table
    assert "best underway" not in table


@pytest.mark.parametrize("options", [("--out", "--csv"), ("--csv", "--png"), ("--out", "--png")])
def test_two_of_the_files_cannot_be_one(
    options: tuple[str, str], runs: Path, main: Main, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, err = main("report", runs, options[0], "x", options[1], tmp_path / "runs" / ".." / "x")
    assert code == 4
    assert f"{options[0]} and {options[1]} name one file" in err
    assert not Path("x").exists()


def test_without_a_file_asked_for_it_is_a_page_here(
    runs: Path, main: Main, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main("report", "runs/a")[0] == 0
    assert (tmp_path / "report.html").exists()


def test_json_alone_writes_no_file(runs: Path, main: Main, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, _ = main("report", "runs", "--json")
    assert code == 0
    assert [run["run"] for run in json.loads(out)["runs"]] == ["b", "a", "c"]
    assert not (tmp_path / "report.html").exists()


def test_without_what_draws_the_error_says_what_to_install_and_the_table_is_made(
    runs: Path, main: Main, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "vl_convert" else found(name))
    code, _, err = main("report", runs, "--out", tmp_path / "r.html")
    assert code == 4
    assert err.startswith(f"E-CONFIG {tmp_path / 'r.html'}: ")
    assert err.count("\n") == 1
    assert "pip install 'kdpipe[report]'" in err
    assert main("report", runs, "--csv", tmp_path / "r.csv")[0] == 0
    assert not (tmp_path / "r.html").exists()


def test_a_run_without_events_and_a_failed_one_alone_are_reported(main: Main, tmp_path: Path) -> None:
    write_run(tmp_path / "a")
    (tmp_path / "a" / "events.jsonl").unlink()
    write_events(tmp_path / "b", [{"time": BEGAN, "kind": "launch_failed", "error": "E-SPACE: full", "exit_code": 4}])
    for name in ("a", "b"):
        assert main("report", tmp_path / name, "--out", tmp_path / f"{name}.html")[0] == 0
    assert "E-SPACE: full" in (tmp_path / "b.html").read_text()


def test_a_page_that_cannot_be_written_is_one_line_and_leaves_the_old_one(runs: Path, main: Main) -> None:
    code, _, err = main("report", runs, "--csv", runs / "a" / "events.jsonl" / "r.csv")
    assert (code, err.count("\n")) == (4, 1)


def test_no_torch_is_loaded(runs: Path, tmp_path: Path) -> None:
    script = (
        "import sys; from kdpipe.pipeline.report.gather import gather; from kdpipe.pipeline.report.page import page; "
        "from pathlib import Path; page(gather([Path(sys.argv[1])]), out=Path('x')); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script, runs], check=False, cwd=tmp_path).returncode == 0


def test_a_thousand_runs_make_a_page_of_bounded_size(main: Main, tmp_path: Path) -> None:
    for number in range(1000):
        spec = {"train": {"lr": 1e-4 * (number + 1), "seed": number % 7}}
        write_run(tmp_path / "runs" / f"r{number}", spec=spec, heldout_kl=1.0 + number, num_steps=4)
    assert main("report", tmp_path / "runs", "--out", tmp_path / "r.html")[0] == 0
    text = (tmp_path / "r.html").read_text()
    assert "of 1,000 runs" in text
    assert len(text) < 4_000_000
