"""The record of what `kdpipe submit` has sent: OUT/submit/jobs.json, and the folder it is in.

    OUT/submit/run.toml       the run file as it was submitted        OUT/submit/logs/       what the jobs print
    OUT/submit/NAME.sbatch    each job as it was sent                 OUT/submit/jobs.json   this record

Invariant: a job is recorded before it is sent, with the digest that its comment has at Slurm, so that one whose answer
was lost can be found there; its number is added as soon as it is known, and without one it is not sent again before
RESEND_S have passed. jobs.json is replaced as a whole, and is on the
disk before the next job is sent.
"""

import os
from pathlib import Path

from kdpipe.manifests.durable import canonical, disk_error, fsync_folder, scratch_name
from kdpipe.manifests.record import Record, read_record

SUBMIT = "submit"
"""Folder of a submission, in the output of its run."""
JOBS_FILE = "jobs.json"
RUN_COPY = "run.toml"
LOGS = "logs"
MARK = "kdpipe:"
"""What the comment of each of our jobs begins with; its digest follows."""
RESEND_S = 600.0
"""From when a job that Slurm neither answered for nor has is taken for lost: a busy controller may accept it late."""


class Task(Record):
    """One piece of work: a task of an array, or a job without one."""

    index: int | None
    """Of the array; None where the job is none."""
    step: str
    """Name of the step: "extract", "seal", "train/lr-0.0003", "report"."""
    part: int | None = None
    """Of a step that several tasks share, from 1."""
    parts: int | None = None
    """How many share it; this job may have but some of them."""
    output: str
    """Folder, or file, that it writes."""


class Job(Record):
    """One sbatch."""

    name: str
    """The job's name at Slurm."""
    digest: str
    """What its comment has after MARK: it differs from that of every other job of the submission."""
    script: str
    """Its file in the folder of the submission."""
    needs: tuple[str, ...]
    """Steps that it waits for."""
    tasks: tuple[Task, ...]
    sent: float
    """Unix seconds."""
    id: int | None = None
    """Slurm's number; None where its answer was not seen."""

    @property
    def comment(self) -> str:
        return MARK + self.digest

    def task_id(self, task: Task) -> str:
        """As Slurm names it: "12" or "12_3"."""
        return f"{self.id}" if task.index is None else f"{self.id}_{task.index}"

    def log(self, folder: Path, task: Task) -> Path:
        """What the task prints; folder: that of the submission"""
        return folder / LOGS / f"{Path(self.script).stem}-{self.task_id(task)}.txt"


class Submission(Record):
    """jobs.json"""

    format_version: int = 1
    folder: str
    """Where the jobs work: what relative paths of the run file begin at."""
    sets: tuple[str, ...] = ()
    """The --set that went with the run file."""
    jobs: tuple[Job, ...] = ()
    """Oldest first; a step that was submitted again is in several, and the last one counts."""

    def latest(self) -> dict[tuple[str, int | None], tuple[Job, Task]]:
        """The last job and task of every (step, part), of a step as many share it now."""
        tasks = [(job, task) for job in self.jobs for task in job.tasks]
        parts = {task.step: task.parts for _, task in tasks}
        return {(task.step, task.part): (job, task) for job, task in tasks if task.parts == parts[task.step]}


def submission_folder(output: Path) -> Path:
    """Of the run that writes to `output`."""
    return output / SUBMIT


def read_submission(output: Path) -> Submission | None:
    """What was submitted of the run that writes to `output`; None where nothing was. Raises LayoutError."""
    return read_record(submission_folder(output) / JOBS_FILE, Submission)


def write_submission(output: Path, record: Submission) -> None:
    """Replace the record durably. Raises SpaceError or InputError."""
    final = submission_folder(output) / JOBS_FILE
    replace_file(final, canonical(record.model_dump(mode="json")))


def replace_file(final: Path, data: bytes) -> None:
    """Put a small file in place of the one of before, if any, at once and durably. Raises SpaceError or InputError."""
    scratch = scratch_name(final.parent, f".{final.name}")
    try:
        with open(scratch, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(final)
        fsync_folder(final.parent)
    except OSError as err:
        scratch.unlink(missing_ok=True)
        raise disk_error(err, final) from err
