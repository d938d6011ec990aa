"""What is said of a run's students before a job is sent, where their tokenizer is not the teacher's."""

from pathlib import Path

import pytest
from tests.conftest import Bench

from kdpipe.pipeline.precheck import check


@pytest.mark.parametrize(
    ("sets", "says"),
    [
        (("student.align=chunk", "loss.options.tau=50"), None),
        (("student.align=chunk", "loss.options.tauu=50"), "unknown option 'tauu'"),
        (("loss.options.tau=50",), "unknown option 'tau'"),
        (("sweep.command=onpolicy", "live.tee=kept"), "live.tee: student and teacher have other tokenizers"),
    ],
)
def test_options_are_those_of_the_method_that_aligns(
    sets: tuple[str, ...], says: str | None, far_bench: Bench, tmp_path: Path
) -> None:
    """Defect: a method's options were refused as the divergence has none of them."""
    given = {"teacher": far_bench.teacher, "student": far_bench.student}
    run = [f"{name}.path={path}" for name, path in given.items()]
    run += [
        f"data.paths=['{far_bench.data}']",
        f"cache.path=['{tmp_path / 'cache'}']",
        f"train.output={tmp_path / 'o'}",
    ]
    refused = check(None, (*run, *sets))
    assert (refused is None) == (says is None)
    assert says is None or (refused is not None and says in str(refused[1]))
