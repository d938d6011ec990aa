"""Stories: the steps that count, whatever interrupted the run, and points that are thinned but not changed."""

import json
from pathlib import Path

import pytest
from tests.runs import BEGAN, STEP_S, STEP_TOKENS, inputs_of, kl_of, loss_of, session, write_events, write_run

from kdpipe.pipeline.report.story import Point, read_story, thinned

DAY_S = 86_400.0


def test_a_finished_run_is_told_as_its_records_have_it(tmp_path: Path) -> None:
    story = read_story("a", write_run(tmp_path / "a", spec={"train": {"lr": 0.02}}, heldout_kl=0.125))
    assert [(step["step"], step["loss/mean"], step["tokens"]) for step in story.steps] == [
        (step, loss_of(step), step * STEP_TOKENS) for step in range(1, 9)
    ]
    assert [(each["step"], each["heldout_kl"]) for each in story.evals] == [
        *((step, kl_of(step)) for step in (0, 2, 4, 6)),
        (8, 0.125),
    ]
    assert (story.metrics["heldout_kl"], story.measured_after, story.inputs["train.lr"]) == (0.125, 8, 0.02)
    assert (story.num_tokens, story.num_missing, story.step_seconds) == (8 * STEP_TOKENS, 0, 8 * STEP_S)


def test_steps_that_a_session_makes_again_replace_those_before(tmp_path: Path) -> None:
    inputs = inputs_of()
    again = session(4, 7, began=BEGAN + DAY_S, inputs=inputs)
    for event in again:
        event |= {"loss/mean": 9.0} if event["kind"] == "step" else {}
    story = read_story("a", write_events(tmp_path / "a", [*session(1, 7, began=BEGAN, inputs=inputs), *again]))
    assert [step["step"] for step in story.steps] == [1, 2, 3, 4, 5, 6]
    assert [step["loss/mean"] for step in story.steps] == [loss_of(1), loss_of(2), loss_of(3), 9.0, 9.0, 9.0]
    assert [each["step"] for each in story.evals] == [0, 2, 4, 6]
    assert story.num_tokens == 6 * STEP_TOKENS


def test_hours_are_those_at_work_lost_steps_too_and_not_those_between_sessions(tmp_path: Path) -> None:
    inputs = inputs_of()
    events = [
        *session(1, 4, began=BEGAN, inputs=inputs),
        *session(3, 5, began=BEGAN + DAY_S, inputs=inputs),
    ]
    story = read_story("a", write_events(tmp_path / "a", events))
    first, second = 1.0 + 3 * STEP_S, 1.0 + 2 * STEP_S
    assert story.seconds == pytest.approx(first + second)
    assert story.steps[-1]["hours"] * 3600 == pytest.approx(first + second)
    assert story.steps[1]["hours"] * 3600 == pytest.approx(1.0 + 2 * STEP_S)
    assert story.sessions == 2


def test_lines_that_are_torn_or_of_others_are_left_out(tmp_path: Path) -> None:
    output = write_events(tmp_path / "a", session(1, 3, began=BEGAN, inputs=inputs_of()))
    strange = [
        {"kind": "step"},
        {"time": "then", "kind": "step", "step": 7},
        {"time": BEGAN, "kind": "step", "step": "8"},
    ]
    write_events(output, [*strange, {"time": BEGAN, "kind": "eval"}, {"time": BEGAN, "kind": "run", "made_with": 3}])
    with open(output / "events.jsonl", "a") as file:
        file.write('[]\n{"time": 1700000009.0, "kind": "step", "st')
    assert [step["step"] for step in read_story("a", output).steps] == [1, 2]


def test_a_figure_that_was_not_finite_is_missing_and_the_step_is_not(tmp_path: Path) -> None:
    events = session(1, 4, began=BEGAN, inputs=inputs_of())
    last = next(event for event in reversed(events) if event["kind"] == "step")
    last |= {"loss/mean": None, "num_skipped": 1}
    story = read_story("a", write_events(tmp_path / "a", events))
    assert [("loss/mean" in step) for step in story.steps] == [True, True, False]
    assert story.num_skipped == 1


def test_steps_without_an_event_are_counted(tmp_path: Path) -> None:
    events = [event for event in session(1, 6, began=BEGAN, inputs=inputs_of()) if event.get("step") != 3]
    assert read_story("a", write_events(tmp_path / "a", events)).num_missing == 1


def test_a_run_that_was_refused_says_why_with_the_last_line_of_its_log(tmp_path: Path) -> None:
    (tmp_path / "log.txt").write_text("kdpipe train ...\nE-STUDENT models/x: it has another tokenizer\n\n")
    story = read_story("a", tmp_path)
    assert (story.state.status, story.error) == ("absent", "E-STUDENT models/x: it has another tokenizer")


def test_thinned_points_are_recorded_ones_with_both_ends_and_every_spike() -> None:
    points: list[Point] = [{"step": float(at), "loss": float(at % 7)} for at in range(10_000)]
    points[5_003]["loss"], points[7_001]["loss"] = 90.0, -90.0
    del points[42]["loss"]
    few = thinned(points, 200, "loss")
    assert len(few) <= 200
    assert all(point in points for point in few)
    assert [few[0], few[-1]] == [points[0], points[-1]]
    assert {90.0, -90.0} <= {point["loss"] for point in few}
    assert [point["step"] for point in few] == sorted(point["step"] for point in few)


@pytest.mark.parametrize("count", [0, 1, 2, 3, 199, 200])
def test_few_points_are_left_as_they_are(count: int) -> None:
    points: list[Point] = [{"step": float(at), "loss": 1.0} for at in range(count)]
    assert thinned(points, 200, "loss") == points


def test_inputs_are_named_as_the_run_file_names_them(tmp_path: Path) -> None:
    spec = {"loss": {"divergence": "jsd", "options": {"beta": 0.5}}, "train": {"fsdp": {"compile": True}}}
    inputs = read_story("a", write_run(tmp_path, spec=spec, rollouts={"lmbda": 0.5})).inputs
    assert {"loss.options.beta": 0.5, "train.fsdp.compile": True, "live.lmbda": 0.5}.items() <= inputs.items()
    assert json.dumps(inputs)
