"""Gathered: the runs that a path means, of many only the best drawn, what is not there said."""

from pathlib import Path

import pytest
from tests.caches import make_cache
from tests.runs import write_run

from kdpipe.manifests.errors import ConfigError
from kdpipe.pipeline.report import gather as gathering
from kdpipe.pipeline.report.gather import gather


def test_a_folder_of_runs_is_all_of_them_and_nothing_else(tmp_path: Path) -> None:
    write_run(tmp_path / "b")
    write_run(tmp_path / "a")
    make_cache(tmp_path / "cache", num_samples=5)
    (tmp_path / "submit").mkdir()
    (tmp_path / "notes.txt").touch()
    assert [story.name for story in gather([tmp_path]).stories] == ["a", "b"]


def test_a_run_killed_in_its_export_is_one_run(tmp_path: Path) -> None:
    output = write_run(tmp_path / "a")
    (output / ".unfinished").mkdir()
    (output / "kdpipe.json").rename(output / ".unfinished" / "kdpipe.json")
    (story,) = gather([output]).stories
    assert (story.name, story.folder) == ("a", output)


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    paths = [write_run(tmp_path / "x" / "a"), write_run(tmp_path / "y" / "a")]
    assert [story.name for story in gather(paths).stories] == ["x/a", "y/a"]


def test_a_run_that_is_named_twice_is_one(tmp_path: Path) -> None:
    assert len(gather([write_run(tmp_path / "a"), tmp_path]).stories) == 1


def test_a_run_that_never_began_is_shown_beside_others(tmp_path: Path) -> None:
    report = gather([write_run(tmp_path / "a"), tmp_path / "b"])
    assert [(row["run"], row["status"]) for row in report.table.rows] == [("a", "finished"), ("b", "absent")]


@pytest.mark.parametrize("kind", ["missing", "file", "empty", "cache"])
def test_a_path_without_a_run_is_an_error_that_says_what_it_is(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "x"
    if kind == "file":
        path.touch()
    elif kind == "empty":
        path.mkdir()
    elif kind == "cache":
        make_cache(path, num_samples=5)
    says = {"missing": "no such folder", "file": "it is a file", "empty": "no run in it", "cache": "it is a cache"}
    with pytest.raises(ConfigError, match=says[kind]):
        gather([path])


def test_of_many_runs_the_best_are_drawn_and_all_are_in_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gathering, "MOST_CURVES", 3)
    for number in range(6):
        write_run(tmp_path / f"r{number}", heldout_kl=6.0 - number, spec={"train": {"seed": number}})
    report = gather([tmp_path])
    assert report.curves == ("r5", "r4", "r3")
    assert (len(report.table.rows), report.num_with_curves) == (6, 6)
    assert {row["run"] for row in report.data["steps"]} == {"r5", "r4", "r3"}
    assert len(report.data["runs"]) == 6


def test_a_cache_that_several_runs_name_is_read_once(tmp_path: Path) -> None:
    make_cache(tmp_path / "cache", num_samples=5)
    for name in ("a", "b"):
        write_run(tmp_path / "runs" / name, cache=tmp_path / "cache")
    (cache,) = gather([tmp_path / "runs"]).caches
    assert cache.info is not None
    assert cache.info.num_samples == 5
