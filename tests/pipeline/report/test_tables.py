"""Tables: what varied is found, the best run is first, and nothing of a run is made up."""

from pathlib import Path

from tests.runs import BEGAN, inputs_of, session, write_events, write_run

from kdpipe.pipeline.report.story import Story, read_story
from kdpipe.pipeline.report.tables import tabulate, tails


def stories(*outputs: Path) -> list[Story]:
    return [read_story(output.name, output) for output in outputs]


def test_the_keys_that_differ_are_columns_and_no_others(tmp_path: Path) -> None:
    table = tabulate(
        stories(
            write_run(tmp_path / "a", spec={"train": {"lr": 1e-3}, "loss": {"divergence": "jsd"}}),
            write_run(tmp_path / "b", spec={"train": {"lr": 1e-4}, "loss": {"divergence": "jsd"}}),
        )
    )
    assert [column.key for column in table.varied] == ["train.lr"]
    assert {row["run"]: row["train.lr"] for row in table.rows} == {"a": 1e-3, "b": 1e-4}


def test_students_and_caches_are_named_by_their_paths_and_not_by_digests(tmp_path: Path) -> None:
    table = tabulate(
        stories(
            write_run(tmp_path / "a", student=Path("models/big"), cache=Path("/x/cache"), caches=("1" * 64,)),
            write_run(tmp_path / "b", student=Path("models/tiny"), cache=Path("/y/cache"), caches=("2" * 64,)),
        )
    )
    assert [column.key for column in table.varied] == ["cache"]
    assert {row["run"]: row["cache"] for row in table.rows} == {"a": "x/cache", "b": "y/cache"}


def test_keys_that_a_run_cannot_have_do_not_vary(tmp_path: Path) -> None:
    outputs = [
        write_run(tmp_path / "a"),
        write_run(tmp_path / "b", rollouts={"lmbda": 0.5, "top_p": 1.0}),
        write_run(tmp_path / "c", rollouts={"lmbda": 1.0, "top_p": 1.0}),
    ]
    table = tabulate(stories(*outputs))
    assert [column.key for column in table.varied] == ["live.lmbda"]
    assert {row["run"]: row["live.lmbda"] for row in table.rows} == {"a": None, "b": 0.5, "c": 1.0}


def test_the_best_run_is_first_and_one_without_a_result_last(tmp_path: Path) -> None:
    failed = write_events(tmp_path / "c", session(1, 1, began=BEGAN, inputs=inputs_of())[:3])
    table = tabulate(
        stories(write_run(tmp_path / "a", heldout_kl=0.5), failed, write_run(tmp_path / "b", heldout_kl=0.25))
    )
    assert [row["run"] for row in table.rows] == ["b", "a", "c"]
    assert "heldout_kl" not in table.rows[-1]
    assert table.rows[-1]["status"] == "killed"


def test_a_run_under_way_is_after_those_that_have_finished(tmp_path: Path) -> None:
    under_way = write_events(tmp_path / "c", session(1, 5, began=BEGAN, inputs=inputs_of()))
    table = tabulate(stories(under_way, write_run(tmp_path / "a", heldout_kl=5.0)))
    assert [(row["run"], row["metrics_step"]) for row in table.rows] == [("a", 8), ("c", 4)]


def test_the_untrained_student_of_a_run_that_made_no_step_is_no_result(tmp_path: Path) -> None:
    failed = write_events(tmp_path / "a", session(1, 1, began=BEGAN, inputs=inputs_of()))
    (untrained,) = stories(failed)
    assert ([point["step"] for point in untrained.evals], untrained.metrics) == ([0], {})
    under_way = write_events(tmp_path / "b", session(1, 3, began=BEGAN, inputs=inputs_of()))
    assert [row["run"] for row in tabulate(stories(failed, under_way)).rows] == ["b", "a"]
    assert tabulate([untrained]).result is None


def test_a_run_in_progress_has_its_keys_from_its_events(tmp_path: Path) -> None:
    events = session(1, 3, began=BEGAN, inputs=inputs_of({"train": {"lr": 0.5}}))
    table = tabulate(stories(write_events(tmp_path / "b", events), write_run(tmp_path / "a")))
    assert {row["run"]: row["train.lr"] for row in table.rows} == {"a": 1e-4, "b": 0.5}


def test_the_tokens_measured_are_not_taken_for_those_trained_on(tmp_path: Path) -> None:
    (row,) = tabulate(stories(write_run(tmp_path / "a"))).rows
    assert (row["heldout_tokens"], row["train_tokens"], row["tokens_per_second"]) == (50, 800, 50.0)


def test_paths_are_cut_to_what_tells_them_apart() -> None:
    assert list(tails([Path("/a/x"), Path("/a/y")]).values()) == ["x", "y"]
    assert list(tails([Path("/a/x"), Path("/b/x"), Path("/b/y")]).values()) == ["a/x", "b/x", "b/y"]
    assert tails([]) == {}
