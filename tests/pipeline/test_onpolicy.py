"""kdpipe onpolicy: what of its options contradicts, before anything is read."""

from pathlib import Path

import pytest
from tests.conftest import Bench, Main

from kdpipe.manifests.specs import RunFile
from kdpipe.pipeline.live_keys import of_own


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--overlap", 1], "live.overlap: answers written ahead"),
        (["--cache", "cache"], "cache.path: its rows are those of the teacher at the start"),
        (["--tee", "kept"], "live.tee: a cache has the rows of one teacher"),
    ],
)
def test_a_teacher_that_is_made_anew_does_not_go_with_rows_of_an_older_one(
    main: Main, bench: Bench, tmp_path: Path, words: list[object], says: str
) -> None:
    models = ["--teacher", "student", "--student", bench.student, "--prompts", bench.data, "--output", tmp_path / "out"]
    code, _, err = main("onpolicy", *models, "--teacher-update-every", 2, *words)
    assert code == 4
    assert says in err
    assert not (tmp_path / "out").exists()


def test_an_average_without_updates_and_a_teacher_of_other_sizes_are_refused(
    main: Main, bench: Bench, tmp_path: Path
) -> None:
    models = [
        "--teacher",
        bench.teacher,
        "--student",
        bench.student,
        "--prompts",
        bench.data,
        "--output",
        tmp_path / "o",
    ]
    code, _, err = main("onpolicy", *models, "--ema", 0.9)
    assert (code, "live.ema: nothing makes the teacher anew" in err) == (4, True), err
    code, _, err = main("onpolicy", *models, "--teacher-update-every", 2)
    assert (code, "live.teacher_update_every" in err, "architectures" in err) == (4, True, True), err


def test_the_word_student_is_the_students_folder_unless_a_folder_has_that_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = RunFile.model_validate({"teacher": {"path": "student"}, "student": {"path": "models/small"}})
    assert of_own(run).teacher.path == Path("models/small")
    (tmp_path / "student").mkdir()
    assert of_own(run).teacher.path == Path("student")
