"""The student: a causal LM that answers with losses, checked and examined before it is trained, exported after."""

from kdpipe.stages.student.across import Across, method_of
from kdpipe.stages.student.check import (
    check_student,
    check_student_of,
    checkpoint_dtype,
    has_other_tokenizer,
    own_vocab_size,
    require_compiler,
    require_context,
)
from kdpipe.stages.student.exam import exam_text
from kdpipe.stages.student.folding import load_teacher_heads
from kdpipe.stages.student.lora import Lora, check_export, check_own_teacher, lora_of, num_trainable, trainable
from kdpipe.stages.student.sharding import compile_layers, load_sharded, reduce_gradients, shard, shard_beside
from kdpipe.stages.student.student import (
    LOSS_SUMS,
    Student,
    TeacherHead,
    load_teacher_head,
)

__all__ = [
    "LOSS_SUMS",
    "Across",
    "Lora",
    "Student",
    "TeacherHead",
    "check_export",
    "check_own_teacher",
    "check_student",
    "check_student_of",
    "checkpoint_dtype",
    "compile_layers",
    "exam_text",
    "has_other_tokenizer",
    "load_sharded",
    "load_teacher_head",
    "load_teacher_heads",
    "lora_of",
    "method_of",
    "num_trainable",
    "own_vocab_size",
    "reduce_gradients",
    "require_compiler",
    "require_context",
    "shard",
    "shard_beside",
    "trainable",
]
