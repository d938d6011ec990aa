"""What a plan comes to, in seconds and bytes, against sums by hand."""

from fractions import Fraction

import pytest

from kdpipe.pipeline.costs import (
    Rate,
    StudentCost,
    Work,
    break_even_epochs,
    cached_seconds,
    live_over_cached,
    live_seconds,
    student_cost,
    teacher_seconds,
)
from kdpipe.pipeline.forecast import break_even_students

WORK = Work(num_tokens=10_000, num_rows=5_000, teacher_params=700, head_params=60)
RATE = Rate(tokens_per_second=100.0, came="given")


def cost(trained_tokens: int = 16_000, checkpoints: int = 2) -> StudentCost:
    settings = {"export_bytes": 60, "num_steps": 16, "checkpoints": checkpoints}
    return student_cost("a", 30, WORK, RATE, trained_tokens=trained_tokens, **settings)


def test_a_student_is_reckoned_at_the_teachers_operations_a_second() -> None:
    student = cost()
    assert (student.num_steps, student.trained_tokens, student.passes) == (16, 16_000, 1.6)
    operations = 6 * 30 * 16_000 + 2 * 60 * 8_000
    assert student.seconds == pytest.approx(operations / (2 * 700 * 100))
    assert student.output_bytes == 60 + 30 * 12 * 3, "the export, two checkpoints and one that is written"
    assert cost(checkpoints=0).output_bytes == 60


def test_a_live_teacher_reads_what_each_student_trains_on() -> None:
    students = [cost(), cost(8_000)]
    alone = sum(student.seconds for student in students)
    assert teacher_seconds(WORK, RATE) == 100.0
    assert cached_seconds(WORK, RATE, students) == pytest.approx(100.0 + alone)
    assert live_seconds(WORK, RATE, students) == pytest.approx((16_000 + 8_000) / 100 + alone)


@pytest.mark.parametrize("students", [1, 2, 3, 7])
def test_the_epochs_at_which_students_break_even_agree_with_the_students_at_which_epochs_do(students: int) -> None:
    epochs = break_even_epochs(students, 0.8)
    assert break_even_students(Fraction(epochs * 0.8 * 1.01)) <= students
    assert break_even_students(Fraction(epochs * 0.8 * 0.99)) > students


@pytest.mark.parametrize("tokens", [[2_500], [10_000], [3_000, 9_000], [30_000]])
def test_the_ratio_crosses_one_where_the_students_break_even(tokens: list[int]) -> None:
    students = [cost(each) for each in tokens]
    first = break_even_students(Fraction(sum(tokens), len(tokens) * WORK.num_tokens))
    assert live_over_cached(WORK, RATE, students, first) > 1
    assert live_over_cached(WORK, RATE, students, first - 1) <= 1
    together = live_seconds(WORK, RATE, students) / cached_seconds(WORK, RATE, students)
    assert live_over_cached(WORK, RATE, students, len(students)) == pytest.approx(together)


def test_many_students_approach_the_ratio_of_their_steps() -> None:
    student = cost()
    limit = (student.seconds + student.trained_tokens / RATE.tokens_per_second) / student.seconds
    ratios = [live_over_cached(WORK, RATE, [student], count) for count in (1, 2, 4, 10**7)]
    assert ratios == sorted(ratios)
    assert ratios[-1] < limit
    assert ratios[-1] == pytest.approx(limit, rel=1e-5)
