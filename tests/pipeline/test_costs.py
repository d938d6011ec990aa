"""What a plan comes to, in seconds and bytes, against sums by hand."""

import pytest

from kdpipe.pipeline.costs import (
    Rate,
    Work,
    break_even_epochs,
    cached_seconds,
    live_seconds,
    student_cost,
    teacher_seconds,
)
from kdpipe.pipeline.forecast import break_even_students

WORK = Work(num_tokens=10_000, num_rows=5_000, heldout_fraction=0.2, teacher_params=700, head_params=60)
RATE = Rate(tokens_per_second=100.0, came="given")


def cost(**changes: object) -> object:
    settings = {"export_bytes": 60, "epochs": 2.0, "batch_tokens": 1000, "checkpoints": 2} | changes
    return student_cost("a", 30, WORK, RATE, **settings)  # type: ignore[arg-type]


def test_a_student_is_reckoned_at_the_teachers_operations_a_second() -> None:
    student = cost()
    assert (student.num_steps, student.trained_tokens, student.passes) == (16, 16_000, 2.0)
    operations = 6 * 30 * 16_000 + 2 * 60 * 8_000
    assert student.seconds == pytest.approx(operations / (2 * 700 * 100))
    assert student.output_bytes == 60 + 30 * 12 * 3, "the export, two checkpoints and one that is written"


def test_max_steps_end_a_training_early_and_no_checkpoints_take_no_room() -> None:
    student = cost(max_steps=4, checkpoints=0)
    assert (student.num_steps, student.trained_tokens, student.passes) == (4, 4_000, 0.5)
    assert student.output_bytes == 60
    assert cost(max_steps=400).num_steps == 16


def test_a_student_of_a_share_of_the_samples_takes_that_share() -> None:
    assert (cost(subset=0.25).num_steps, cost(subset=0.25).trained_tokens) == (4, 4_000)
    assert cost(subset=0.25).seconds == pytest.approx(cost().seconds / 4)


def test_a_live_teacher_reads_what_each_student_trains_on() -> None:
    students = [cost(), cost(epochs=1.0)]
    alone = sum(student.seconds for student in students)
    assert teacher_seconds(WORK, RATE) == 100.0
    assert cached_seconds(WORK, RATE, students) == pytest.approx(100.0 + alone)
    assert live_seconds(WORK, RATE, students) == pytest.approx((16_000 + 8_000) / 100 + alone)


@pytest.mark.parametrize("students", [1, 2, 3, 7])
def test_the_epochs_at_which_students_break_even_agree_with_the_students_at_which_epochs_do(students: int) -> None:
    epochs = break_even_epochs(students)
    assert break_even_students(round(epochs * 1.01, 9)) <= students
    assert break_even_students(round(epochs * 0.99, 9)) > students
