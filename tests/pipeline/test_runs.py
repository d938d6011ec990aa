"""Runs: how one stands is read from what it has left, whoever ended it and however long its events are."""

import os
import time
from pathlib import Path

import pytest
from tests.finished import write_events, write_record

from kdpipe.manifests.run import RUN_FILE
from kdpipe.manifests.running import alone_in
from kdpipe.manifests.specs import RunFile, TrainTable, members_of
from kdpipe.pipeline.runs import TAIL_BYTES, events_of, state_of


@pytest.mark.parametrize(
    ("kinds", "status"),
    [
        ((), "absent"),
        (("run", "start", "step", "step"), "killed"),
        (("run", "start", "step", "step", "failed"), "failed"),
        (("run", "start", "step", "step", "crashed"), "failed"),
        (("run", "start", "step", "step", "launch_failed"), "failed"),
        (("run", "start", "step", "step", "interrupted"), "interrupted"),
        (("run", "start", "step", "step", "terminated"), "interrupted"),
        (("run", "failed", "run", "start", "step", "step"), "killed"),
    ],
)
def test_the_last_event_says_how_a_run_ended(tmp_path: Path, kinds: tuple[str, ...], status: str) -> None:
    if kinds:
        write_events(tmp_path, *kinds, num_steps=9, error="E-X: no", exit_code=4)
    state = state_of(tmp_path)
    assert state.status == status
    assert (state.step, state.num_steps) == ((kinds.index("step") + 2, 9) if kinds else (None, None))
    said = status in ("failed", "interrupted")
    assert (state.error, state.exit_code) == (("E-X: no", 4) if said else (None, None))


def test_a_run_at_work_is_told_from_one_that_was_killed(tmp_path: Path) -> None:
    write_events(tmp_path, "run", "start", "step")
    with alone_in(tmp_path):
        assert state_of(tmp_path).status == "running"
    assert state_of(tmp_path).status == "killed"


def test_a_finished_student_has_its_figures_and_one_that_is_not_measured_is_not_finished(tmp_path: Path) -> None:
    (member,) = members_of(RunFile(train=TrainTable(output=tmp_path)))
    record = write_record(member, metrics={"heldout_kl": 0.25})
    write_events(tmp_path, "run", "failed", error="an earlier try")
    state = state_of(tmp_path)
    assert (state.status, state.metrics, state.record, state.error) == ("finished", {"heldout_kl": 0.25}, record, None)
    assert (state.step, state.num_steps) == (3, 3)
    write_record(member, metrics=None)
    assert state_of(tmp_path).status == "failed"


def test_a_record_that_is_none_is_a_failure_that_says_so(tmp_path: Path) -> None:
    (tmp_path / RUN_FILE).write_text("{}")
    state = state_of(tmp_path)
    assert state.status == "failed"
    assert str(state.error).startswith(f"E-LAYOUT {tmp_path / RUN_FILE}: ")


def test_the_last_evaluation_stands_for_the_figures_on_the_way(tmp_path: Path) -> None:
    write_events(tmp_path, "eval", heldout_kl=0.5)
    write_events(tmp_path, "step", "eval", "step", heldout_kl=0.25, top1_agreement=0.5)
    assert state_of(tmp_path).metrics == {"heldout_kl": 0.25, "top1_agreement": 0.5}


def test_long_events_are_read_at_their_ends_alone(tmp_path: Path) -> None:
    write_events(tmp_path, "run", "start", num_steps=7)
    write_events(tmp_path, *["step"] * 3000)
    write_events(tmp_path, "failed", error="E", exit_code=1)
    assert os.path.getsize(tmp_path / "events.jsonl") > 2 * TAIL_BYTES
    state = state_of(tmp_path)
    assert (state.step, state.num_steps, state.status) == (3000, 7, "failed")


def test_a_torn_line_is_no_event_and_no_error(tmp_path: Path) -> None:
    write_events(tmp_path, "run", "step")
    with open(tmp_path / "events.jsonl", "ab") as file:
        file.write(b'{"time": 3, "kind": "st\n\xff\xfe\n7\n[]\n{"time": 4, "kind": "step", "step": 5}\n{"kind"')
    assert [event["kind"] for event in events_of(tmp_path)] == ["run", "step", "step"]
    assert (state_of(tmp_path).step, state_of(tmp_path).last_event) == (5, 4.0)


def test_a_link_or_a_folder_in_place_of_the_events_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "events.jsonl").symlink_to("/dev/zero")
    (tmp_path / "b" / "events.jsonl").mkdir(parents=True)
    for name in "ab":
        assert (state_of(tmp_path / name).status, events_of(tmp_path / name)) == ("absent", [])


def test_a_thousand_runs_are_read_in_well_under_a_second(tmp_path: Path) -> None:
    for number in range(1000):
        write_events(tmp_path / str(number), "run", "start", *["step"] * 30, "failed", error="E", num_steps=3)
    start = time.process_time()
    assert {state_of(tmp_path / str(number)).status for number in range(1000)} == {"failed"}
    assert time.process_time() - start < 1.0
