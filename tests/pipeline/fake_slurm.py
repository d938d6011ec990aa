"""A small Slurm that runs nothing: sbatch, squeue, scancel and scontrol as one script, which PATH has by four names.

Its folder ($FAKE_SLURM) has jobs.txt, a line a task as squeue prints it, and calls.txt, every command line. A file
`hang` there lets the next sbatch accept and then say nothing, `lose` accept and report a time-out, `deny` refuse;
`late` report a time-out, and accept when the test says so (`accept`).
"""

import os
import re
import sys
import time
from pathlib import Path

PARTITIONS = """\
PartitionName=main Default=YES MaxTime=UNLIMITED DefaultTime=NONE MaxNodes=UNLIMITED PreemptMode=REQUEUE State=UP
PartitionName=short Default=NO MaxTime=01:00:00 DefaultTime=00:10:00 MaxNodes=2 PreemptMode=REQUEUE State=UP
PartitionName=scavenge Default=NO MaxTime=UNLIMITED DefaultTime=NONE MaxNodes=UNLIMITED PreemptMode=CANCEL State=DOWN
"""
CONFIG = "Configuration data as of now\nMaxArraySize            = 11\nPreemptMode             = REQUEUE\n"


def install(folder: Path) -> Path:
    """Make a folder for PATH with its commands; that folder."""
    commands = folder / "bin"
    commands.mkdir(parents=True)
    for name in ("sbatch", "squeue", "scancel", "scontrol"):
        path = commands / name
        path.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S "{__file__}" {name} "$@"\n')
        path.chmod(0o755)
    (folder / "jobs.txt").touch()
    (folder / "calls.txt").touch()
    return commands


def jobs(folder: Path) -> list[list[str]]:
    """[id, index, state, reason, comment, name] of every task."""
    return [line.split("|") for line in (folder / "jobs.txt").read_text().splitlines()]


def set_state(folder: Path, state: str, *ids: str) -> None:
    """Of some tasks, or of all of a job's: "7_2", "7"; without any of all."""
    lines = []
    for number, index, before, *rest in jobs(folder):
        meant = not ids or number in ids or f"{number}_{index}" in ids
        lines.append("|".join((number, index, state if meant else before, *rest)) + "\n")
    (folder / "jobs.txt").write_text("".join(lines))


def accept(folder: Path) -> None:
    """The jobs that came late."""
    with open(folder / "jobs.txt", "a") as file:
        file.write((folder / "late.txt").read_text())


def calls(folder: Path, command: str) -> list[list[str]]:
    """The arguments of every call of a command."""
    lines = (line.split("\t") for line in (folder / "calls.txt").read_text().splitlines())
    return [line[1:] for line in lines if line[0] == command]


def _take(path: Path) -> bool:
    there = path.exists()
    path.unlink(missing_ok=True)
    return there


def _tasks(array: str) -> list[str]:
    tasks = []
    for run in array.partition("%")[0].split(","):
        first, _, last = run.partition("-")
        tasks += [str(number) for number in range(int(first), int(last or first) + 1)]
    return tasks


def _sbatch(folder: Path, words: list[str]) -> int:
    if words == ["--version"]:
        print("slurm-wlm 22.05.8")
        return 0
    if _take(folder / "deny"):
        print("sbatch: error: Batch job submission failed: Invalid account", file=sys.stderr)
        return 1
    options = dict(word.removeprefix("--").partition("=")[::2] for word in words[:-1])
    text = Path(words[-1]).read_text()
    name = re.findall(r"^#SBATCH --job-name=(.*)$", text, re.MULTILINE)[0]
    array = re.findall(r"^#SBATCH --array=(.*)$", text, re.MULTILINE)
    late = _take(folder / "late")
    number = max((int(job[0]) for job in jobs(folder)), default=6) + 1 + 90 * late
    with open(folder / ("late.txt" if late else "jobs.txt"), "a") as file:
        for index in _tasks(array[0]) if array else ["N/A"]:
            file.write(f"{number}|{index}|PENDING|None|{options.get('comment', '')}|{name}\n")
    if _take(folder / "hang"):
        time.sleep(60)
    if late or _take(folder / "lose"):
        print("sbatch: error: Batch job submission failed: Socket timed out on send/recv operation", file=sys.stderr)
        return 1
    print(number)
    return 0


def main(command: str, *words: str) -> int:
    folder = Path(os.environ["FAKE_SLURM"])
    with open(folder / "calls.txt", "a") as file:
        file.write("\t".join((command, *words)) + "\n")
    if command == "sbatch":
        return _sbatch(folder, list(words))
    if command == "squeue":
        print((folder / "jobs.txt").read_text(), end="")
    elif command == "scancel" and "--state=PENDING" not in words:
        set_state(folder, "CANCELLED", *words[1:])
    elif command == "scontrol":
        print(PARTITIONS if words[-1] == "partition" else CONFIG, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
