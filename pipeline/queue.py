"""The queue: what Slurm says of jobs, asked once for all of them.

    squeue, once                 every job that the controller still knows, the finished ones of the last minutes too
    sacct, at most once          of those that it has forgotten, where the cluster keeps accounts

Both are asked for text in fields that we name: it reads the same from 18.08 on. squeue --json of 22.05 does not leave
out other people's jobs, is some 6 kB a job, and its keys changed with 23.02.
Invariant: a Slurm that is absent, silent or without accounts is a sentence, never an error.
"""

import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime

SQUEUE = {"JobArrayID": 40, "State": 20, "Reason": 160, "NodeList": 80, "RestartCnt": 12, "StartTime": 24}
"""Fields of squeue and how wide each may be; longer ones are cut."""
SACCT = ("JobID", "State", "Reason", "NodeList", "Start", "ExitCode")
MARK = "|"
ASKED_S = 60.0
"""Longest wait for an answer; a busy controller takes some seconds."""
FORGOTTEN = "Invalid job id specified"
NO_ACCOUNTS = "accounting storage is disabled"
ENDED_WELL = "COMPLETED"
WAITING = {"PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "RESV_DEL_HOLD"}
RUNNING = {"RUNNING", "COMPLETING", "CONFIGURING", "SUSPENDED", "STOPPED", "RESIZING", "SIGNALING", "STAGE_OUT"}
STOPPED = {"PREEMPTED", "TIMEOUT", "NODE_FAIL", "BOOT_FAIL", "DEADLINE"}
"""States of jobs that were ended from outside: what they ran is not to blame, and goes on when it is run again."""

Ask = Callable[[Sequence[str]], subprocess.CompletedProcess[str]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """A job, or a task of an array, as Slurm tells of it.

    job: "17", or "17_3" of an array
    state: in Slurm's words, "PENDING"
    reason: why it waits or how it ended, in Slurm's words; "" where it says nothing
    started: unix seconds
    restarts: how often it was requeued; None where accounts are all there is
    """

    job: str
    state: str
    reason: str = ""
    nodes: str = ""
    started: float | None = None
    restarts: int | None = None
    exit_code: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Queue:
    """What Slurm answered.

    jobs: by their numbers, "17" or "17_3"
    silence: why there is no answer, "" where there is one
    """

    jobs: dict[str, Job] = field(default_factory=dict)
    silence: str = ""


def ask_slurm(numbers: Iterable[str], ask: Ask | None = None) -> Queue:
    """What Slurm says of some jobs: those that neither squeue nor the accounts know are not in it.

    numbers: "17" of a job, "17_3" of a task of an array
    """
    ask = ask or _ask
    wanted = list(dict.fromkeys(numbers))
    if not wanted:
        return Queue()
    done = ask(squeue_command(wanted))
    if done.returncode and FORGOTTEN not in done.stderr:
        return Queue(silence=_silence(done))
    found = {job.job: job for job in read_squeue(done.stdout)}
    jobs = {number: found[number] for number in wanted if number in found}
    if forgotten := [number for number in wanted if number not in jobs]:
        accounts = {job.job: job for job in read_sacct(ask(sacct_command(forgotten)).stdout)}
        jobs |= {number: accounts[number] for number in forgotten if number in accounts}
    return Queue(jobs=jobs)


def squeue_command(numbers: Sequence[str]) -> list[str]:
    """Each task of an array on a line of its own, jobs in every state."""
    fields = ",".join(f"{name}:{width}{MARK}" for name, width in SQUEUE.items())
    jobs = ",".join(dict.fromkeys(number.partition("_")[0] for number in numbers))
    return ["squeue", "--noheader", "--array", "--states=all", f"--jobs={jobs}", f"--Format={fields}"]


def sacct_command(numbers: Sequence[str]) -> list[str]:
    """Jobs alone, not their steps; of a job that was requeued its newest record."""
    jobs = ",".join(dict.fromkeys(number.partition("_")[0] for number in numbers))
    return ["sacct", "--noheader", "--parsable2", "--allocations", f"--jobs={jobs}", f"--format={','.join(SACCT)}"]


def read_squeue(text: str) -> Iterator[Job]:
    """17_0            |RUNNING     |None     |n1     |1     |2026-11-30T11:20:00     |"""
    for line in text.splitlines():
        fields = [part.strip() for part in line.split(MARK)]
        if len(fields) == len(SQUEUE) + 1:
            number, state, reason, nodes, restarts, started, _ = fields
            yield Job(
                job=number,
                state=state,
                reason=_said(reason),
                nodes=_said(nodes),
                restarts=int(restarts) if restarts.isdecimal() else None,
                started=_seconds(started),
            )


def read_sacct(text: str) -> Iterator[Job]:
    """17_0|CANCELLED by 1000|None|n1|2026-11-30T11:20:00|0:15, and 17_[2-4,7%2] for tasks that have not begun."""
    for line in text.splitlines():
        fields = line.split(MARK)
        if len(fields) != len(SACCT):
            continue
        number, state, reason, nodes, started, exit_code = fields
        code = exit_code.partition(":")[0]
        job = Job(
            job=number,
            state=state.split(" ")[0],
            reason=_said(reason),
            nodes=_said(nodes),
            started=_seconds(started),
            exit_code=int(code) if code.isdecimal() else None,
        )
        for each in _tasks(number):
            yield Job(**{name: getattr(job, name) for name in job.__dataclass_fields__} | {"job": each})


def _tasks(number: str) -> list[str]:
    """ "17_[2-4,7%2]" -> 17_2, 17_3, 17_4, 17_7"""
    job, bracket, tasks = number.partition("_[")
    if not bracket:
        return [number]
    spans = [(int(a), int(b or a)) for a, b in re.findall(r"(\d+)(?:-(\d+))?", tasks.rstrip("]").partition("%")[0])]
    return [f"{job}_{task}" for first, last in spans for task in range(first, last + 1)]


def _said(text: str) -> str:
    return "" if text in ("None", "(null)", "N/A", "None assigned") else text


def _seconds(text: str) -> float | None:
    """A local time without its zone, as Slurm writes it; None for "N/A" and "Unknown"."""
    try:
        return datetime.fromisoformat(text).timestamp()
    except ValueError:
        return None


def _ask(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    if shutil.which(command[0]) is None:
        return subprocess.CompletedProcess(command, 127, "", f"{command[0]} is not installed here")
    environment = {key: text for key, text in os.environ.items() if not key.startswith(("SQUEUE_", "SACCT_"))}
    environment["SLURM_TIME_FORMAT"] = "standard"
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=ASKED_S, env=environment, check=False)
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 124, "", f"{command[0]} did not answer within {ASKED_S:.0f} s")
    except OSError as err:
        return subprocess.CompletedProcess(command, 126, "", f"{command[0]}: {err.strerror}")


def _silence(done: subprocess.CompletedProcess[str]) -> str:
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    return lines[-1] if lines else f"{done.args[0]} ended with exit code {done.returncode}"
