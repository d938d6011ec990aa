"""Cluster: what Slurm is asked and told, by its own commands; every answer is waited for with a bound.

Invariant: a command that gives no answer in time is ended, with all it has started, and is an error that says so:
what it has done by then is not known. Cost: one call of squeue for all jobs, however many.
"""

import contextlib
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from kdpipe.manifests.errors import ConfigError, NoAnswerError, RefusedError

ENDED = frozenset(
    {
        "BOOT_FAIL",
        "CANCELLED",
        "COMPLETED",
        "DEADLINE",
        "FAILED",
        "NODE_FAIL",
        "OUT_OF_MEMORY",
        "PREEMPTED",
        "REVOKED",
        "TIMEOUT",
    }
)
"""States of Slurm from which a job does not come back; in all others it waits, runs, or is just ending."""
OF_OTHERS = re.compile(r"SLURM_(?!CONF$)\w+|SLURMD_\w+|(LOCAL_|GROUP_)?RANK|(LOCAL_)?WORLD_SIZE|MASTER_(ADDR|PORT)")
"""Variables of the job that we may be in ourselves: those of the jobs that are sent are their own."""
NO_ANSWER = ("timed out", "Unable to contact", "Connection refused", "Zero Bytes", "Communication")
"""In Slurm's words, where the request may have reached it all the same."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Queued:
    """A job, or a task of an array, that Slurm knows of.

    id, index: its number, and that of the task
    state: "PENDING", "RUNNING", "COMPLETING", "FAILED" ..; reason: why it waits, or why it ended
    """

    id: int
    index: int | None
    state: str
    reason: str
    comment: str
    name: str

    @property
    def task_id(self) -> str:
        """As scancel takes it."""
        return f"{self.id}" if self.index is None else f"{self.id}_{self.index}"

    @property
    def is_over(self) -> bool:
        return self.state in ENDED


@dataclass(frozen=True, kw_only=True, slots=True)
class Cluster:
    """Slurm on this machine. seconds: how long an answer is waited for."""

    seconds: float = 30.0

    def require(self) -> str:
        """Its version, "22.05.8". Raises ConfigError where there is no Slurm."""
        if shutil.which("sbatch") is None:
            raise ConfigError(
                "there is no sbatch on this machine: submit on a login node of the cluster (module load slurm?); "
                "--dry-run prints the scripts anywhere",
                where="slurm",
            )
        found = re.search(r"\d[\w.]*", self._ask("sbatch", "--version"))
        return found[0] if found else "unknown"

    def queue(self) -> tuple[Queued, ...]:
        """All jobs of this user that Slurm remembers, those that ended lately too, a task of an array each."""
        fields = ("%F", "%K", "%T", "%r", "%k", "%j")
        words = ("--noheader", "--array", "--states=all", f"--user={os.getuid()}", f"--format={'|'.join(fields)}")
        return tuple(_queued(self._ask("squeue", *words)))

    def sbatch(self, script: Path, *words: str) -> int:
        """The number of the job. Raises RefusedError with Slurm's reason, NoAnswerError where it is not known."""
        out = self._ask("sbatch", "--parsable", *words, str(script))
        number = out.strip().splitlines()[-1].partition(";")[0] if out.strip() else ""
        if not number.isdecimal():
            raise NoAnswerError(f"sbatch answered {out.strip()!r}, not a job's number", where=script)
        return int(number)

    def cancel(self, ids: Sequence[str], *, pending_alone: bool = False) -> None:
        """End jobs and tasks; one that is over already is no error."""
        for first in range(0, len(ids), 200):  # a command line has an end
            some = ids[first : first + 200]
            words = ("--state=PENDING", *some) if pending_alone else tuple(some)
            with contextlib.suppress(RefusedError):
                self._ask("scancel", "--quiet", *words)

    def partitions(self) -> dict[str, dict[str, str]]:
        """What Slurm says of each partition: {"main": {"State": "UP", "MaxTime": "UNLIMITED", ..}}."""
        out = self._ask("scontrol", "--oneliner", "show", "partition")
        found = [dict(re.findall(r"(\S+?)=(\S*)", line)) for line in out.splitlines()]
        return {entry["PartitionName"]: entry for entry in found if "PartitionName" in entry}

    def settings(self) -> dict[str, str]:
        """Slurm's configuration: {"MaxArraySize": "1001", "PreemptMode": "REQUEUE", ..}."""
        out = self._ask("scontrol", "show", "config")
        return dict(re.findall(r"^(\w+)\s*=\s*(.*?)\s*$", out, re.MULTILINE))

    def _ask(self, *words: str) -> str:
        """What a command prints. Raises RefusedError, NoAnswerError."""
        env = {key: value for key, value in os.environ.items() if not OF_OTHERS.fullmatch(key)} | {"LC_ALL": "C"}
        try:
            process = subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
                env=env,
                start_new_session=True,  # so that what it has started ends with it
            )
        except OSError as err:
            raise ConfigError(f"it cannot be run ({err.strerror})", where=words[0]) from None
        try:
            out, err_text = process.communicate(timeout=self.seconds)
        except subprocess.TimeoutExpired:
            raise NoAnswerError(
                f"no answer in {self.seconds:g} s (slurm.answer_seconds)",
                where=words[0],
                hint="run the same command again",
            ) from None
        finally:
            _end(process)
        if process.returncode == 0:
            return out
        said = _in_one_line(err_text) or f"exit code {process.returncode}"
        if any(word in said for word in NO_ANSWER):
            raise NoAnswerError(said, where=words[0], hint="run the same command again")
        raise RefusedError(said, where=words[0])


def _queued(out: str) -> Iterator[Queued]:
    for line in out.splitlines():
        number, index, state, reason, comment, name = (*line.split("|", 5), *[""] * 6)[:6]
        if number.isdecimal():
            yield Queued(
                id=int(number),
                index=int(index) if index.isdecimal() else None,
                state=state,
                reason=reason,
                comment=comment,
                name=name,
            )


def _end(process: subprocess.Popen[str]) -> None:
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    for stream in (process.stdout, process.stderr):
        if stream is not None:
            stream.close()


def _in_one_line(text: str) -> str:
    """sbatch: error: A; sbatch: error: B -> A; B"""
    lines = (re.sub(r"^\w+: (error: )?", "", line).strip() for line in text.splitlines())
    return "; ".join(dict.fromkeys(filter(None, lines)))
