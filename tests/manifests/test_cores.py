"""The cores a process was given: by its affinity, by control groups as containers have them, by Slurm, by kdpipe."""

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from kdpipe.manifests import cores
from kdpipe.manifests.cores import Cores, asked_threads, given_cores, settle_threads

NOWHERE = Path("/nonexistent")
ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def eight(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that lets this process run on eight cores."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8, 16)))


def groups(folder: Path, mounts: list[tuple[str, str, str, str]], own: str, files: Mapping[str, str]) -> Path:
    """A /proc/self and the control groups that it names, in a folder.

    mounts: (what is mounted, where, type, controllers)
    """
    proc = folder / "proc"
    proc.mkdir()
    lines = [
        f"3{number} 25 0:31 {root} {folder / place} rw,nosuid shared:9 - {kind} {kind} rw,{controllers}"
        for number, (root, place, kind, controllers) in enumerate(mounts)
    ]
    (proc / "mountinfo").write_text("22 1 8:1 / / rw - ext4 /dev/sda1 rw\n" + "\n".join(lines) + "\n")
    (proc / "cgroup").write_text(own)
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text + "\n")
    return proc


V2 = [("/", "cg", "cgroup2", "nsdelegate")]
V1 = [("/", "cg/cpu", "cgroup", "cpu,cpuacct"), ("/", "cg/memory", "cgroup", "memory")]
LINES = "5:memory:/job\n4:cpu,cpuacct:/slurm/job_7\n1:name=systemd:/\n0::/\n"
QUOTAS = {
    "v2, none": (V2, "0::/a/b\n", {"cg/a/b/cpu.max": "max 100000"}, 8),
    "v2, its own": (V2, "0::/a/b\n", {"cg/a/b/cpu.max": "300000 100000"}, 3),
    "v2, of a group above": (V2, "0::/a/b\n", {"cg/a/b/cpu.max": "max 100000", "cg/a/cpu.max": "200000 100000"}, 2),
    "v2, the least of several": (
        V2,
        "0::/a/b\n",
        {"cg/a/b/cpu.max": "500000 100000", "cg/a/cpu.max": "400000 100000"},
        4,
    ),
    "v2, in a container of its own name space": (V2, "0::/\n", {"cg/cpu.max": "400000 100000"}, 4),
    "v2, a share of a core is rounded up": (V2, "0::/a\n", {"cg/a/cpu.max": "150000 100000"}, 2),
    "v2, less than a core is one": (V2, "0::/a\n", {"cg/a/cpu.max": "5000 100000"}, 1),
    "v2, more than there are cores": (V2, "0::/a\n", {"cg/a/cpu.max": "6400000 100000"}, 8),
    "v1, none": (V1, LINES, {"cg/cpu/slurm/job_7/cpu.cfs_quota_us": "-1"}, 8),
    "v1, its own": (
        V1,
        LINES,
        {"cg/cpu/slurm/job_7/cpu.cfs_quota_us": "250000", "cg/cpu/slurm/job_7/cpu.cfs_period_us": "50000"},
        5,
    ),
    "v1, of a group above": (
        V1,
        LINES,
        {"cg/cpu/slurm/cpu.cfs_quota_us": "100000", "cg/cpu/slurm/cpu.cfs_period_us": "100000"},
        1,
    ),
    "v1, in a container that sees the machine's names": (
        [("/docker/1f", "cg/cpu", "cgroup", "cpu")],
        "4:cpu:/docker/1f\n",
        {"cg/cpu/cpu.cfs_quota_us": "300000", "cg/cpu/cpu.cfs_period_us": "100000"},
        3,
    ),
    "v2, mounted from outside its name space": (
        V2,
        "0::/../../other\n",
        {"cg/cpu.max": "200000 100000"},
        2,
    ),
    "both, the quota is v1's": (
        [*V1, ("/", "cg/unified", "cgroup2", "nsdelegate")],
        LINES,
        {"cg/cpu/cpu.cfs_quota_us": "600000", "cg/cpu/cpu.cfs_period_us": "100000", "cg/unified/cgroup.procs": ""},
        6,
    ),
    "files that say nothing": (V2, "nonsense\n0::/a\n", {"cg/a/cpu.max": "?"}, 8),
}


@pytest.mark.parametrize("case", QUOTAS)
def test_a_quota_of_any_group_above_counts(case: str, tmp_path: Path) -> None:
    mounts, own, files, wanted = QUOTAS[case]
    found = given_cores({}, groups(tmp_path, mounts, own, files))
    assert found == Cores(count=wanted, numbers=tuple(range(8, 16)) if wanted == 8 else ())


SLURM = {
    "no job": ({}, 8),
    "a task": ({"SLURM_CPUS_PER_TASK": "3", "SLURM_CPUS_ON_NODE": "6"}, 3),
    "a job": ({"SLURM_CPUS_ON_NODE": "4"}, 4),
    "a batch script of several tasks has them all": ({"SLURM_CPUS_ON_NODE": "6", "SLURM_TASKS_PER_NODE": "3"}, 6),
    "a step of several tasks": ({"SLURM_CPUS_ON_NODE": "6", "SLURM_STEP_TASKS_PER_NODE": "3"}, 2),
    "a node of a step": (
        {"SLURM_CPUS_ON_NODE": "6", "SLURM_STEP_TASKS_PER_NODE": "3(x2),1,2", "SLURM_NODEID": "2"},
        6,
    ),
    "more tasks than cores": ({"SLURM_CPUS_ON_NODE": "2", "SLURM_STEP_TASKS_PER_NODE": "3"}, 1),
    "more than the machine lets it have": ({"SLURM_CPUS_PER_TASK": "64"}, 8),
    "no number": ({"SLURM_CPUS_PER_TASK": "all", "SLURM_CPUS_ON_NODE": ""}, 8),
    "a share of what kdpipe has": ({"SLURM_CPUS_PER_TASK": "4", "KDPIPE_CORES": "2"}, 2),
}


@pytest.mark.parametrize("case", SLURM)
def test_what_slurm_gave_counts_where_it_confines_nobody(case: str) -> None:
    environment, wanted = SLURM[case]
    assert given_cores(environment, NOWHERE).count == wanted


def test_the_least_counts(tmp_path: Path) -> None:
    proc = groups(tmp_path, V2, "0::/a\n", {"cg/a/cpu.max": "500000 100000"})
    assert given_cores({"SLURM_CPUS_PER_TASK": "6"}, proc).count == 5
    assert given_cores({"SLURM_CPUS_PER_TASK": "4"}, proc).count == 4


def test_cores_are_dealt_out_without_one_that_two_have() -> None:
    first, second = Cores(count=5, numbers=(3, 4, 6, 8, 9)).parts([2, 3])
    assert (first, second) == (Cores(count=2, numbers=(3, 4)), Cores(count=3, numbers=(6, 8, 9)))
    assert Cores(count=4).parts([1, 2]) == [Cores(count=1), Cores(count=2)]


def test_threads_are_said_where_openmp_would_see_too_many_cores() -> None:
    for given, wanted in (
        ({}, {}),  # the affinity is all there is, and OpenMP asks for it
        ({"SLURM_CPUS_PER_TASK": "3"}, {"OMP_NUM_THREADS": "3", "KDPIPE_CORES": "3"}),
        ({"SLURM_CPUS_PER_TASK": "3", "OMP_NUM_THREADS": "7"}, {"OMP_NUM_THREADS": "7"}),
    ):
        environment = dict(given)
        settle_threads(environment, NOWHERE)
        assert environment == given | wanted


def test_what_kdpipe_said_of_threads_is_not_what_a_person_asked() -> None:
    environment = {"SLURM_CPUS_PER_TASK": "4"}
    settle_threads(environment, NOWHERE)
    assert asked_threads(environment) is None
    half, _ = given_cores(environment, NOWHERE).parts([2, 2])
    half.settle(environment)
    settle_threads(environment, NOWHERE)
    assert (environment["OMP_NUM_THREADS"], given_cores(environment, NOWHERE).count) == ("2", 2)
    assert asked_threads({"OMP_NUM_THREADS": "4,2"}) == 4
    assert asked_threads({"OMP_NUM_THREADS": "2", "KDPIPE_CORES": "4"}) == 2


def python(code: str, *, cpus: set[int] | None = None, **environment: str) -> str:
    """What a process of its own prints that may run on some cores."""
    env = {key: value for key, value in os.environ.items() if key not in ("OMP_NUM_THREADS", cores.GIVEN)}
    env |= {"PYTHONPATH": str(ROOT / "tools" / "typing"), **environment}
    code = f"import os; os.sched_setaffinity(0, {cpus})\n{code}" if cpus else code
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_real_process_has_the_cores_of_its_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    one = max(os.sched_getaffinity(0))
    said = python("from kdpipe.manifests.cores import given_cores; print(given_cores())", cpus={one})
    assert said == f"Cores(count=1, numbers=({one},))"


def test_torch_in_a_slurm_step_starts_as_many_threads_as_the_step_has_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("one core is all there is")
    code = """
from kdpipe.pipeline import cli
try:
    cli.main(["--version"])
except SystemExit:
    pass
import torch
print(torch.get_num_threads())
"""
    assert python(code, SLURM_CPUS_PER_TASK="1").endswith("\n1")
