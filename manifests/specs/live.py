"""[live]: a teacher at work beside its students."""

from kdpipe.manifests.specs.base import Count, Spec


class LiveSpec(Spec):
    """[live]: a teacher at work beside its students."""

    ring_mib: Count = 256
    """Shared memory between the teacher and each rank of the student, in MiB: rows that are ready before their step. It
    must hold the rows of the longest sample."""
    teacher_cores: Count | None = None
    """On a CPU: cores that are the teacher's alone, the others are the student's; half of them when not given."""
