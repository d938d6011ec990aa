"""Costs: what a plan comes to, in seconds, bytes and students, from what was counted and one rate of the teacher.

Operations are counted as in forecast.py, of all parameters: 2*P a token of the teacher's pass, 6*P a token of a
student's step, and 2*V*E more for each row whose teacher logits it recomputes. A rate of the teacher, measured or
given, says how many operations a second there are, and a student's time is reckoned with the same: the order of
magnitude, before a student has run. Pure, without torch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from kdpipe.pipeline.forecast import forward_flops, step_flops

From = Literal["measured", "given", "estimated"]
STATE_BYTES = 12
"""Of a trained parameter in a checkpoint: fp32 weight and two moments."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rate:
    """How fast the teacher reads. estimated: it reaches a matrix product's speed, which no model does"""

    tokens_per_second: float
    came: From


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """What there is to read: a cache's tokens and rows, and what its teacher is."""

    num_tokens: int
    num_rows: int
    teacher_params: int
    head_params: int


@dataclass(frozen=True, kw_only=True, slots=True)
class StudentCost:
    """One student's training. passes: of the teacher over the cache's tokens, that a live teacher would make"""

    name: str
    params: int
    trained_tokens: int
    num_steps: int
    seconds: float
    passes: float
    output_bytes: int


def teacher_seconds(work: Work, rate: Rate) -> float:
    return work.num_tokens / rate.tokens_per_second


def student_cost(
    name: str,
    params: int,
    work: Work,
    rate: Rate,
    *,
    num_steps: int,
    trained_tokens: int,
    export_bytes: int,
    checkpoints: int = 0,
    trained: int | None = None,
) -> StudentCost:
    """Of a student that trains on so many tokens.

    export_bytes: of the student that is written
    checkpoints: kept at a time; there is one more while it is written
    trained: parameters that are; all when not given
    """
    state = STATE_BYTES * (params if trained is None else trained)
    rows = trained_tokens * work.num_rows / max(work.num_tokens, 1)
    operations = step_flops(params, 1, trained) * trained_tokens + forward_flops(work.head_params, 1) * rows
    return StudentCost(
        name=name,
        params=params,
        trained_tokens=trained_tokens,
        num_steps=num_steps,
        seconds=operations / (forward_flops(work.teacher_params, 1) * rate.tokens_per_second),
        passes=trained_tokens / max(work.num_tokens, 1),
        output_bytes=export_bytes + (state * (checkpoints + 1) if checkpoints else 0),
    )


def live_seconds(work: Work, rate: Rate, students: Sequence[StudentCost]) -> float:
    """Of all the students, one after the other, each beside a live teacher that reads every batch again."""
    return sum(each.seconds + each.trained_tokens / rate.tokens_per_second for each in students)


def cached_seconds(work: Work, rate: Rate, students: Sequence[StudentCost]) -> float:
    """Of one teacher pass and all the students, one after the other."""
    return teacher_seconds(work, rate) + sum(each.seconds for each in students)


def live_over_cached(work: Work, rate: Rate, students: Sequence[StudentCost], count: int) -> float:
    """live_seconds over cached_seconds of so many students that are as these on average: above 1 a cache is cheaper."""
    share = count / len(students)
    teacher, alone = teacher_seconds(work, rate), sum(each.seconds for each in students)
    return live_seconds(work, rate, students) * share / (teacher + alone * share)


def break_even_epochs(students: int, passes: float) -> float:
    """Epochs beyond which so many students together run a live teacher more than once.

    passes: of the teacher in an epoch. 1: 1 epoch for one student, 1/4 for four. The same wherever the time goes: both
    ways train the students alike.
    """
    return 1 / (students * passes)
