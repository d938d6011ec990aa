"""Roles: the cores and GPUs of teacher and student where both are at work on one machine.

Two OpenMP runtimes that spin on the same cores are ten times slower than one (docs/notes.md), so each role has its own
cores, and no more threads than cores. GPUs are shared out where there are several: the teacher's first.
"""

import os
from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from kdpipe.manifests.cores import Cores
from kdpipe.manifests.errors import ConfigError
from kdpipe.manifests.specs import EngineSpec, LiveSpec

VISIBLE = "CUDA_VISIBLE_DEVICES"


@dataclass(frozen=True, kw_only=True, slots=True)
class Share:
    """What is one role's alone; None and () leave it everything."""

    cores: Cores | None = None
    gpus: tuple[str, ...] = ()

    def settle(self, environment: MutableMapping[str, str]) -> None:
        """The variables by which a process that is started keeps to its share."""
        if self.cores is not None:
            self.cores.settle(environment)
        if self.gpus:
            environment[VISIBLE] = ",".join(self.gpus)


def share_cores(live: LiveSpec, cores: Cores) -> tuple[Share, Share]:
    """The teacher's and the student's, of those that this process was given. Raises ConfigError for none left."""
    if cores.count < 2:
        return Share(), Share()
    count = live.teacher_cores or cores.count // 2
    if count >= cores.count:
        raise ConfigError(f"{count} of {cores.count} cores leave the student none", where="live.teacher_cores")
    teacher, student = cores.parts([count, cores.count - count])
    return Share(cores=teacher), Share(cores=student)


def share_gpus(live: LiveSpec, engine: EngineSpec, gpus: Sequence[str]) -> tuple[Share, Share]:
    """The teacher's and the student's, of those that this process sees; one GPU is both's.

    gpus: as CUDA_VISIBLE_DEVICES names them; the run file counts them from 0
    Raises ConfigError for a number that there is not.
    """
    for key, asked in (("teacher_gpus", live.teacher_gpus), ("student_gpus", live.student_gpus)):
        if beyond := [number for number in asked if number >= len(gpus)]:
            raise ConfigError(f"there is no GPU {beyond[0]}, {len(gpus)} are visible from 0 on", where=f"live.{key}")
    if len(gpus) < 2:
        return Share(), Share()
    teacher, student = list(live.teacher_gpus), list(live.student_gpus)
    if not teacher:
        wanted = engine.tp * engine.dp * engine.pp
        free = [number for number in range(len(gpus)) if number not in student]
        teacher = (free if student else free[: min(wanted, len(free) - 1)]) or student
    student = student or [number for number in range(len(gpus)) if number not in teacher] or teacher
    return Share(gpus=tuple(gpus[n] for n in teacher)), Share(gpus=tuple(gpus[n] for n in student))


def visible_gpus(count: int) -> list[str]:
    """Names of the GPUs that this process sees."""
    named = [name.strip() for name in os.environ.get(VISIBLE, "").split(",") if name.strip()]
    return named if len(named) == count else [str(number) for number in range(count)]


def all_gpus() -> list[str]:
    """As `visible_gpus`, by a process without torch."""
    named = os.environ.get(VISIBLE)
    if named is None:
        return [str(number) for number in range(len(list(Path("/dev").glob("nvidia[0-9]*"))))]
    names = [name.strip() for name in named.split(",") if name.strip()]
    return names[: names.index("-1")] if "-1" in names else names  # CUDA takes none from there on
