"""Cores: those that this process was given, not those that the machine has.

    affinity           taskset, cpusets, Slurm's task plugins: which cores
    quota              cgroup v1 and v2, of this process's group and every group above it: how many cores' time
    Slurm              SLURM_CPUS_PER_TASK, else SLURM_CPUS_ON_NODE: also where the cluster confines nobody
    KDPIPE_CORES       what the kdpipe process that started this one has left it

Invariant: the least of them counts, and it is at least one. Without torch; cost: a few small files of /proc and /sys.
"""

import math
import os
import re
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

THREADS, GIVEN = "OMP_NUM_THREADS", "KDPIPE_CORES"
PROC = Path("/proc/self")


@dataclass(frozen=True, kw_only=True, slots=True)
class Cores:
    """What a process may use of a machine's cores.

    numbers: which they are. () where a quota or Slurm's word allows fewer than there are in the affinity: the kernel
        chooses then, as two jobs that each took the first four would share these and leave the others idle
    """

    count: int
    numbers: tuple[int, ...] = ()

    def parts(self, counts: Sequence[int]) -> list["Cores"]:
        """Cores dealt out in order: counts [1, 2] of the cores 4, 5, 6 are 4 and 5, 6."""
        assert sum(counts) <= self.count, "no core is dealt out twice"
        starts = [sum(counts[:place]) for place in range(len(counts))]
        return [
            Cores(count=count, numbers=self.numbers[start : start + count])
            for start, count in zip(starts, counts, strict=True)
        ]

    def threads(self, environment: Mapping[str, str]) -> int:
        """As many as the user has asked for, but no more than there are cores."""
        asked = asked_threads(environment)
        return self.count if asked is None else min(asked, self.count)

    def settle(self, environment: MutableMapping[str, str]) -> None:
        """The variables by which a process that is started keeps to these cores."""
        environment[THREADS] = str(self.threads(environment))
        environment[GIVEN] = str(self.count)

    def keep(self) -> None:
        """This process, and all that it starts from now on, keeps to these cores."""
        if self.numbers:
            os.sched_setaffinity(0, self.numbers)


def given_cores(environment: Mapping[str, str] | None = None, proc: Path = PROC) -> Cores:
    """What this process was given.

    proc: its folder in /proc
    """
    environment = os.environ if environment is None else environment
    numbers = tuple(sorted(os.sched_getaffinity(0)))
    limits = (_quota(proc), _of_slurm(environment), _whole(environment.get(GIVEN)))
    count = min([len(numbers), *(max(limit, 1) for limit in limits if limit is not None)])
    return Cores(count=count, numbers=numbers if count == len(numbers) else ())


def num_cores() -> int:
    """How many cores this process was given."""
    return given_cores().count


def asked_threads(environment: Mapping[str, str]) -> int | None:
    """OMP_NUM_THREADS as a person has set it; None where nobody has, or kdpipe itself."""
    if GIVEN in environment and environment.get(THREADS) == environment[GIVEN]:
        return None
    return _whole(environment.get(THREADS, "").partition(",")[0]) or None


def settle_threads(environment: MutableMapping[str, str], proc: Path = PROC) -> None:
    """Before OpenMP is loaded: where it would see more cores than were given, say how many threads it may have.

    It knows the affinity by itself, and then what of it are hyperthreads. What a person has set stays as it is.
    """
    cores = given_cores(environment, proc)
    if not cores.numbers and asked_threads(environment) is None:
        cores.settle(environment)


def _of_slurm(environment: Mapping[str, str]) -> int | None:
    """Of a task of a Slurm job; of a batch script all that the job has on its node."""
    if (of_task := _whole(environment.get("SLURM_CPUS_PER_TASK"))) is not None:
        return of_task
    on_node = _whole(environment.get("SLURM_CPUS_ON_NODE"))
    return None if on_node is None else on_node // _tasks_here(environment)


def _tasks_here(environment: Mapping[str, str]) -> int:
    """Tasks of this step on this node: "2(x3),1" on node 3 of 0 to 3 is 1; 1 outside steps, in a batch script."""
    counts: list[int] = []
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", environment.get("SLURM_STEP_TASKS_PER_NODE", "")):
        counts += [int(count)] * int(times or 1)
    node = _whole(environment.get("SLURM_NODEID")) or 0
    return max(counts[node], 1) if node < len(counts) else 1


def _whole(text: str | None) -> int | None:
    return int(text) if text is not None and text.strip().isdecimal() else None


def _quota(proc: Path) -> int | None:
    """The least quota of this process's groups, rounded up to whole cores; None without one."""
    found = [_cores_of(group) for group in _groups(proc)]
    return math.ceil(min(quotas)) if (quotas := [quota for quota in found if quota is not None]) else None


def _groups(proc: Path) -> Iterator[Path]:
    """Folders of the control groups that may limit this process's time: its own, then those above, as far as visible.

    A line of mountinfo:  36 25 0:31 /docker/1f2 /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu,cpuacct
                          the group that is mounted, and where;     -   its type, source, controllers
    A line of cgroup:     4:cpu,cpuacct:/docker/1f2 under v1, 0::/user.slice under v2
    """
    try:
        mounts = (proc / "mountinfo").read_text(errors="replace").splitlines()
        lines = (proc / "cgroup").read_text(errors="replace").splitlines()
    except OSError:
        return
    own = {names: path for _, names, path in (line.split(":", 2) for line in lines if line.count(":") >= 2)}
    for mount in mounts:
        fields, _, kind = mount.partition(" - ")
        place, (kind, *rest) = fields.split(), kind.split() or [""]
        controllers = set(rest[1].split(",")) if len(rest) > 1 else set()
        if len(place) < 5 or not (kind == "cgroup2" or (kind == "cgroup" and "cpu" in controllers)):
            continue
        path = next(
            (own[names] for names in own if (not names if kind == "cgroup2" else "cpu" in names.split(","))), ""
        )
        yield from _with_parents(Path(path), root=Path(place[3]), mounted=Path(place[4]))


def _with_parents(group: Path, *, root: Path, mounted: Path) -> Iterator[Path]:
    """A group's folder and those above; in a container the mount may begin in the middle of the tree."""
    within = group.relative_to(root) if group.is_relative_to(root) and ".." not in group.parts else Path()
    folder = mounted / within
    while folder != mounted:
        yield folder
        folder = folder.parent
    yield mounted


def _cores_of(group: Path) -> float | None:
    """A group's quota in cores: v2 has "150000 100000" or "max 100000" in one file, v1 has two files, -1 for none."""
    with suppress(OSError, ValueError):
        quota, period = (group / "cpu.max").read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    with suppress(OSError, ValueError):
        micros = int((group / "cpu.cfs_quota_us").read_text())
        return micros / int((group / "cpu.cfs_period_us").read_text()) if micros > 0 else None
    return None
