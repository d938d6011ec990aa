"""[live]: a teacher at work beside its students."""

from pathlib import Path
from typing import Annotated

from kdpipe.manifests.specs.base import Count, Flag, Spec


class LiveSpec(Spec):
    """[live]: a teacher at work beside its students."""

    tee: Annotated[Path | None, Flag(takes="FOLDER")] = None
    """Keep the rows that pass by as the shards of a cache in this folder, for further epochs and students."""
    ring_mib: Count = 256
    """Shared memory between the teacher and each rank of the student, in MiB: rows that are ready before their step. It
    must hold the rows of the longest sample."""
    teacher_cores: Count | None = None
    """On a CPU: cores that are the teacher's alone, the others are the student's; half of them when not given."""
