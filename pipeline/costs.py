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
    heldout_fraction: float
    teacher_params: int
    head_params: int

    @property
    def train_tokens(self) -> float:
        return self.num_tokens * (1 - self.heldout_fraction)


@dataclass(frozen=True, kw_only=True, slots=True)
class StudentCost:
    """One student's training. passes: teacher passes over the training samples that a live teacher would make"""

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
    export_bytes: int,
    epochs: float,
    batch_tokens: int,
    subset: float = 1.0,
    max_steps: int | None = None,
    checkpoints: int = 0,
    trained: int | None = None,
) -> StudentCost:
    """Of a student that trains for some epochs, or steps where these are fewer.

    subset: share of the training samples that it sees
    export_bytes: of the student that is written
    checkpoints: kept at a time; there is one more while it is written
    trained: parameters that are; all when not given
    """
    tokens = work.train_tokens * subset
    steps = max(round(epochs * -(-tokens // batch_tokens)), 1)
    done = min(steps, max_steps or steps)
    tokens_seen = epochs * tokens * done / steps
    state = STATE_BYTES * (params if trained is None else trained)
    rows = tokens_seen * work.num_rows / max(work.num_tokens, 1)
    operations = step_flops(params, 1, trained) * tokens_seen + forward_flops(work.head_params, 1) * rows
    return StudentCost(
        name=name,
        params=params,
        trained_tokens=round(tokens_seen),
        num_steps=done,
        seconds=operations / (forward_flops(work.teacher_params, 1) * rate.tokens_per_second),
        passes=tokens_seen / max(work.train_tokens, 1),
        output_bytes=export_bytes + (state * (checkpoints + 1) if checkpoints else 0),
    )


def live_seconds(work: Work, rate: Rate, students: Sequence[StudentCost]) -> float:
    """Of all the students, one after the other, each beside a live teacher that reads every batch again."""
    return sum(each.seconds + each.trained_tokens / rate.tokens_per_second for each in students)


def cached_seconds(work: Work, rate: Rate, students: Sequence[StudentCost]) -> float:
    """Of one teacher pass and all the students, one after the other."""
    return teacher_seconds(work, rate) + sum(each.seconds for each in students)


def break_even_epochs(students: int) -> float:
    """Epochs beyond which so many students together run a live teacher more than once: 1 for one student, 1/4 for four.

    The same wherever the time goes: both ways train the students alike.
    """
    return 1 / students
