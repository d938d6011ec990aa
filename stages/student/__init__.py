"""The student: a causal LM that answers with losses, examined before it is trained and exported after."""

from kdpipe.stages.student.exam import probe_text
from kdpipe.stages.student.student import (
    LOSS_SUMS,
    Student,
    TeacherHead,
    check_student,
    checkpoint_dtype,
    export,
    load_student,
    load_teacher_head,
    loss_arguments,
    pick_device,
    reduce_gradients,
    shard,
)

__all__ = [
    "LOSS_SUMS",
    "Student",
    "TeacherHead",
    "check_student",
    "checkpoint_dtype",
    "export",
    "load_student",
    "load_teacher_head",
    "loss_arguments",
    "pick_device",
    "probe_text",
    "reduce_gradients",
    "shard",
]
