"""What a sweep shows: lines that read well in 80 columns, in a pipe and in a log; the best student first."""

import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.finished import write_events, write_record

from kdpipe.manifests.specs import load, members_of
from kdpipe.pipeline.local import Outcome
from kdpipe.pipeline.progress import ConsoleProgress, EventLog
from kdpipe.pipeline.runs import events_of
from kdpipe.pipeline.steps import Step
from kdpipe.pipeline.sweep_view import Show, print_students, said

RUN = '[student]\npath = "s"\n[train]\noutput = "out"\n[sweep.grid]\ntrain.lr = [1e-3, 3e-3]\n'


@pytest.fixture
def steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Step]:
    monkeypatch.chdir(tmp_path)
    Path("run.toml").write_text(RUN)
    return [
        Step(name=f"train/{member.name}", argv=("train",), needs=(), output=member.output, member=member)
        for member in members_of(load(Path("run.toml")))
    ]


@pytest.fixture
def shown(steps: list[Step]) -> tuple[Show, io.StringIO, Callable[[float], None]]:
    """A view of the steps, what it shows, and a clock to set."""
    stream, now = io.StringIO(), [0.0]
    Path("out").mkdir()
    progress = ConsoleProgress(EventLog(Path("out/events.jsonl")), stream=stream, clock=lambda: now[0])
    return Show(progress, steps, lambda: None), stream, lambda seconds: now.__setitem__(0, seconds)


def test_a_log_has_a_line_for_each_run_and_one_for_all_every_ten_seconds(
    shown: tuple[Show, io.StringIO, Callable[[float], None]], steps: list[Step]
) -> None:
    show, stream, clock = shown
    good, bad = steps
    show.started(Step(name="extract", argv=("extract", "--config", "a b.toml"), needs=(), output=Path("c")), None)
    for step in steps:
        show.started(step, step.output / "log.txt")
    for seconds, made in ((4.0, 1), (12.0, 3), (13.0, 1)):
        clock(seconds)
        write_events(good.output, *["step"] * made)
        show.look(steps)
    assert good.member is not None
    write_record(good.member, metrics={"heldout_kl": 0.53219, "top1_agreement": 0.25, "num_tokens": 9}, num_steps=7)
    show.ended(Outcome(step=good, exit_code=0, seconds=63.0))
    show.ended(Outcome(step=bad, exit_code=1, error="E-CHECK: not finite", seconds=5.0, log=bad.output / "log.txt"))
    clock(25.0)
    show.look([])
    page = Step(name="report", argv=("report",), needs=(), output=Path("out/report.html"), whatever=True)
    show.ended(Outcome(step=page, exit_code=0))
    assert stream.getvalue().splitlines() == [
        "kdpipe extract --config 'a b.toml'",
        "sweep: 0 steps",
        "lr-0.001: started; log out/lr-0.001/log.txt",
        "lr-0.003: started; log out/lr-0.003/log.txt",
        "sweep: 0/2 runs, 2 at work, 0.25 steps/s, 3 steps",
        "lr-0.001: finished in 1:03, heldout kl 0.5322, top1 agreement 0.25",
        "lr-0.003: failed: E-CHECK: not finite; log out/lr-0.003/log.txt",
        "sweep: 1/2 runs, 0 at work, 1 failed, 0.28 steps/s, 7 steps",
        "the students compared: out/report.html",
    ]
    kinds = [(event["kind"], event.get("name"), event.get("exit_code")) for event in events_of(Path("out"))]
    assert [each for each in kinds if each[0].startswith("run_")] == [
        ("run_started", "lr-0.001", None),
        ("run_started", "lr-0.003", None),
        ("run_ended", "lr-0.001", 0),
        ("run_ended", "lr-0.003", 1),
        ("run_ended", "report", 0),
    ]


def test_an_output_that_is_busy_is_named_once(
    shown: tuple[Show, io.StringIO, Callable[[float], None]], steps: list[Step]
) -> None:
    show, stream, _ = shown
    for _ in range(3):
        show.waits(steps[0])
    assert stream.getvalue() == "lr-0.001: another run is at work in out/lr-0.001; waiting for its end\n"


def test_a_run_that_a_signal_ended_has_not_failed(steps: list[Step]) -> None:
    stopped = Outcome(step=steps[0], exit_code=75, error="E-TEMPORARY: stopped by SIGTERM")
    assert said(stopped) == "lr-0.001: stopped: E-TEMPORARY: stopped by SIGTERM"


def test_the_best_student_comes_first_and_figures_on_the_way_are_none(
    steps: list[Step], capsys: pytest.CaptureFixture[str]
) -> None:
    text = RUN.replace("[1e-3, 3e-3]", "[1, 2, 3, 4]")
    Path("run.toml").write_text(text)
    members = members_of(load(Path("run.toml")))
    for member, kl in zip(members, (0.7, None, 0.3, None), strict=True):
        if kl is not None:
            write_record(member, metrics={"heldout_kl": kl, "top1_agreement": 0.5})
    write_events(members[1].output, "eval", "interrupted", heldout_kl=0.1)
    bad = Outcome(step=Step(name="x", argv=(), needs=(), output=Path(), member=members[3]), exit_code=4, error="E-X")
    print_students(members, [bad], Path("out/report.html"), as_json=False)
    assert capsys.readouterr().out.splitlines() == [
        "student  status       heldout kl  top1 agreement",
        "lr-3     finished            0.3             0.5",
        "lr-1     finished            0.7             0.5",
        "lr-2     interrupted",
        "lr-4     absent",
    ]
    print_students(members, [bad], Path("run.toml"), as_json=True)
    found = json.loads(capsys.readouterr().out)
    assert [(one["name"], one.get("heldout_kl"), one["error"]) for one in found["students"]] == [
        ("lr-3", 0.3, None),
        ("lr-1", 0.7, None),
        ("lr-2", None, None),
        ("lr-4", None, "E-X"),
    ]
    assert found["report"] == "run.toml"
