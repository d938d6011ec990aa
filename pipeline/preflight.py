"""Preflight: what would go wrong on the cluster and can be seen before a job is sent.

Raises at the first thing that cannot work, and warns of what may not. Nothing is written, no torch is loaded here; what
`kdpipe train` itself would refuse is asked of a process of its own (pipeline/precheck.py).
"""

import importlib.util
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from kdpipe.manifests.durable import file_system
from kdpipe.manifests.errors import ConfigError, InputError, SpaceError
from kdpipe.manifests.nearest import nearest
from kdpipe.manifests.plan import PLAN_FILE, read_plan
from kdpipe.manifests.shard import commit_path, expected_bytes
from kdpipe.manifests.specs import SlurmSpec
from kdpipe.pipeline.cluster import Cluster
from kdpipe.pipeline.costs import STATE_BYTES
from kdpipe.pipeline.forecast import count_trained, exported_bytes
from kdpipe.pipeline.output import human_bytes
from kdpipe.pipeline.precheck import require_trainable
from kdpipe.pipeline.slurm import Batch
from kdpipe.pipeline.steps import EXTRACT, REPORT, Step
from kdpipe.pipeline.submit import Wanted

OLDEST = (20, 11)
"""Version of Slurm: older ones were not tried."""
OWN_DISKS = {"ext2", "ext3", "ext4", "xfs", "btrfs", "tmpfs", "ramfs", "overlay", "zfs", "f2fs"}
"""File systems of one machine, unless that is a server; other nodes seldom see them."""


def preflight(wanted: Wanted, steps: Sequence[Step], cluster: Cluster) -> Iterator[str]:
    """Warnings, a line each. Raises InputError, ConfigError, SpaceError."""
    version = cluster.require()
    batches = wanted.batches(steps)
    _require_inputs(wanted, steps)
    for batch in batches:
        _require_one_node(batch)
    if tuple(map(int, re.findall(r"\d+", version)[:2])) < OLDEST:
        yield f"Slurm {version}: options that kdpipe uses are missing before {OLDEST[0]}.{OLDEST[1]}"
    yield from _of_partitions(batches, cluster)
    yield from _of_report(wanted, steps)
    yield from _of_places(wanted)
    yield from _of_room(wanted, steps)
    require_trainable(wanted.config, wanted.sets, wanted.folder)


def _require_inputs(wanted: Wanted, steps: Sequence[Step]) -> None:
    """The models and data that the steps name are there."""
    for step in steps:
        run = wanted.run if step.member is None else step.member.run
        teaches = step.name == EXTRACT or (step.member is not None and step.argv[0] != "train")
        models = {"teacher.path": run.teacher.path} if teaches else {}
        models |= {"student.path": run.student.path} if step.member is not None else {}
        reads_data = teaches or (step.member is not None and not run.cache.path)
        for key, path in (*models.items(), *(("data.paths", path) for path in run.data.paths if reads_data)):
            if path is None:
                continue
            if not (wanted.folder / path).exists():
                raise InputError(f"{key} of {step.name}: there is no such file or folder", where=path)
            if key in models and not (wanted.folder / path / "config.json").is_file():
                raise InputError(f"{key} of {step.name}: expected a model's folder, it has no config.json", where=path)


def _of_report(wanted: Wanted, steps: Sequence[Step]) -> Iterator[str]:
    """What draws the report is missing in the environment that the jobs share with us."""
    spec = wanted.run.slurm
    shared = not (spec.setup or spec.python or spec.container)
    if shared and any(step.name == REPORT for step in steps) and importlib.util.find_spec("vl_convert") is None:
        yield "the report cannot be drawn: pip install 'kdpipe[report]', or say sweep.report=false"


def _require_one_node(batch: Batch) -> None:
    if batch.spec.nodes > 1 and batch.steps[0].argv[0] != "train":
        raise ConfigError(
            f"kdpipe {batch.steps[0].argv[0]} runs on one node, {batch.spec.nodes} are asked for; leave it out",
            where="slurm.nodes",
        )


def _of_partitions(batches: Sequence[Batch], cluster: Cluster) -> Iterator[str]:
    partitions, settings = cluster.partitions(), cluster.settings()
    default = next((name for name, entry in partitions.items() if entry.get("Default") == "YES"), None)
    most = int(settings.get("MaxArraySize", "1001")) - 1
    said: set[str] = set()
    for batch in batches:
        if batch.indices and batch.indices[-1] > most:
            raise ConfigError(
                f"{batch.name}: task {batch.indices[-1]} of an array; this cluster has {most} at most (MaxArraySize)",
                where="slurm.extract_tasks",
            )
        if batch.spec.partition is None and default is None:
            raise ConfigError(
                f"this cluster has no default partition; name one of {', '.join(sorted(partitions))}",
                where="slurm.partition",
            )
        for name in (batch.spec.partition or default or "").split(","):
            if name not in partitions:
                raise ConfigError(
                    f"there is no partition '{name}'{nearest(name, partitions)} (there are: "
                    f"{', '.join(sorted(partitions))})",
                    where="slurm.partition",
                )
            for warning in _of_partition(name, partitions[name], settings, batch.spec):
                if warning not in said:
                    said.add(warning)
                    yield warning


def _of_partition(name: str, entry: dict[str, str], settings: dict[str, str], spec: SlurmSpec) -> Iterator[str]:
    if entry.get("State", "UP") != "UP":
        yield f"partition {name} is {entry['State'].lower()}: jobs wait there until it is up"
    mode = entry.get("PreemptMode", settings.get("PreemptMode", "OFF"))
    if "CANCEL" in mode:
        yield (
            f"partition {name} cancels the jobs that it preempts (PreemptMode=CANCEL) and does not queue them again: "
            "what they have saved stays; run kdpipe submit again then"
        )
    if spec.time is not None and minutes(spec.time) > minutes(most := entry.get("MaxTime", "UNLIMITED")):
        raise ConfigError(f"{spec.time} is longer than partition {name} allows, {most}", where="slurm.time")
    if (nodes := entry.get("MaxNodes", "UNLIMITED")).isdecimal() and spec.nodes > int(nodes):
        raise ConfigError(f"{spec.nodes}: partition {name} gives a job {nodes} at most", where="slurm.nodes")
    limit = minutes(spec.time or entry.get("DefaultTime", "NONE"))
    if spec.signal_seconds >= limit * 60:
        yield (
            f"partition {name}: jobs are asked to save {spec.signal_seconds} s before a limit of {limit * 60:.0f} s, "
            "which is as soon as they begin; raise slurm.time or lower slurm.signal_seconds"
        )


def minutes(time: str) -> float:
    """A time as Slurm writes it: "90", "1:30:00", "1-12", "1-12:30:00"; UNLIMITED and NONE are infinite."""
    if not time[:1].isdecimal():
        return float("inf")
    days, dash, rest = time.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if dash:
        hours, minute, second = (*parts, 0, 0)[:3]
    elif len(parts) == 3:
        hours, minute, second = parts
    else:
        (hours, minute, second) = (0, *parts, 0)[:3]
    return int(days or 0) * 1440 + hours * 60 + minute + second / 60


def _of_places(wanted: Wanted) -> Iterator[str]:
    """What lies on a disk of this machine, which nodes may not see, where the cluster is more than this machine."""
    run = wanted.run
    for path in (wanted.output, *run.cache.path, run.teacher.path, run.student.path, *run.data.paths):
        if path is not None and (kind := _file_system(wanted.folder / path)) in OWN_DISKS:
            yield f"{path} lies on a disk of this machine ({kind}): do the nodes see it?"
            return  # one is enough to make a reader look


def _nearest(path: Path) -> Path:
    """The nearest folder above that exists, or the path itself."""
    return next(there for there in (path, *path.parents) if there.exists())


def _file_system(path: Path) -> str:
    descriptor = os.open(_nearest(path), os.O_RDONLY)
    try:
        return file_system(descriptor)
    finally:
        os.close(descriptor)


def _of_room(wanted: Wanted, steps: Sequence[Step]) -> Iterator[str]:
    """A warning where the students' checkpoints would not fit if all trained at once.

    Raises SpaceError where what is left of a planned cache and the finished students cannot fit.
    """
    needed: Counter[tuple[int, Path]] = Counter()
    passing: Counter[tuple[int, Path]] = Counter()
    for step in steps:
        there = _nearest(wanted.folder / step.output)
        disk = next((known for known in needed if known[0] == there.stat().st_dev), (there.stat().st_dev, there))
        if step.name == EXTRACT:
            needed[disk] += cache_bytes_left(wanted.folder / step.output)
        elif step.member is not None and step.member.run.student.path is not None:
            run = step.member.run
            own = run.student.model_copy(update={"path": wanted.folder / step.member.run.student.path})
            needed[disk] += exported_bytes(run.model_copy(update={"student": own}))
            trained = count_trained(wanted.folder / step.member.run.student.path, own)
            passing[disk] += (run.train.keep + 1) * STATE_BYTES * trained if run.train.save_every else 0
    for disk, amount in needed.items():
        there = disk[1]
        free = shutil.disk_usage(there).free
        if amount > free:
            raise SpaceError(
                f"cache and students need {human_bytes(amount)} here, {human_bytes(free)} are free; free some room, or "
                "let them be written elsewhere",
                where=there,
            )
        most = amount + passing[disk]
        if most > free:
            yield (
                f"{there}: {human_bytes(free)} are free; if all students train at once they take up to "
                f"{human_bytes(most)} with their checkpoints (train.keep)"
            )


def cache_bytes_left(cache: Path) -> int:
    """Bytes of the shards that a planned cache lacks; 0 where nothing is planned: its first job measures and checks."""
    if not (cache / PLAN_FILE).exists():
        return 0
    plan = read_plan(cache)
    left = (number for number in range(len(plan.shards)) if not commit_path(cache, number).exists())
    return sum(expected_bytes(cache, plan, number) for number in left)
