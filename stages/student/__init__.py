"""The student: a causal LM that answers with losses, examined before it is trained and exported after."""

from kdpipe.stages.student.student import (
    LOSS_SUMS,
    Student,
    TeacherHead,
    backbone_hidden,
    check_student,
    checkpoint_dtype,
    export,
    keeps_samples_apart,
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
    "backbone_hidden",
    "check_student",
    "checkpoint_dtype",
    "export",
    "keeps_samples_apart",
    "load_student",
    "load_teacher_head",
    "loss_arguments",
    "pick_device",
    "reduce_gradients",
    "shard",
]
