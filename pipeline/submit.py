"""Submit: what is left to do of a run file, sent to Slurm as few jobs, each once.

    steps -> less what waits or runs already -> batches -> recorded, then sent, then its number recorded

Invariant: no job is sent twice. It is in jobs.json before it is sent; where the answer is lost, by a time-out or by our
own end, it is found at Slurm by its name and the digest in its comment, now or when submit is run again; while it is
not there it is not sent again before RESEND_S have passed. Should it come even later, the copy is ended. A job whose
step comes after one that is sent anew waits for what has failed, and is sent anew too.
Cost: one squeue, one sbatch for each kind of job, whatever the number of students.
"""

import hashlib
import re
import sys
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from kdpipe.manifests.durable import disk_error, make_folder
from kdpipe.manifests.errors import ConfigError, NoAnswerError, RefusedError
from kdpipe.manifests.parts import parts_left
from kdpipe.manifests.running import alone_in
from kdpipe.manifests.specs import RunFile, sweep_output
from kdpipe.manifests.submission import (
    LOGS,
    RESEND_S,
    RUN_COPY,
    Job,
    Submission,
    Task,
    read_submission,
    replace_file,
    submission_folder,
    write_submission,
)
from kdpipe.pipeline.cluster import Cluster, Queued
from kdpipe.pipeline.slurm import Batch, batches_of, render
from kdpipe.pipeline.steps import Disk, Step, steps_of

LOOKS = 5
"""How often a job whose answer was lost is looked for, before that is left to the next submit."""
Piece = tuple[str, int | None]
"""A step, and which part of one that is shared."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Wanted:
    """A run file as it is to be submitted.

    config: where it lies; folder: where relative paths begin
    """

    config: Path
    run: RunFile
    sets: tuple[str, ...]
    folder: Path

    @property
    def output(self) -> Path:
        return self.folder / sweep_output(self.run)

    @property
    def submission(self) -> Path:
        return submission_folder(self.output)

    @property
    def name(self) -> str:
        """What the names of its jobs begin with."""
        return re.sub(r"[^\w.+-]", "-", self.output.name) or "kdpipe"

    def steps(self, disk: Disk) -> tuple[Step, ...]:
        return steps_of(self.submission / RUN_COPY, self.run, disk, self.sets, parts=self.run.slurm.extract_tasks)

    def batches(self, steps: Sequence[Step], parts: Collection[int] | None = None) -> tuple[Batch, ...]:
        return batches_of(steps, self.run.slurm, parts)

    def script(self, batch: Batch) -> str:
        spec = self.run.slurm
        own = None if spec.setup or spec.container else Path(sys.executable)
        return render(batch, folder=self.folder, submission=self.submission, name=self.name, python=spec.python or own)


@dataclass(frozen=True, kw_only=True, slots=True)
class Sent:
    """What a submission has come to.

    jobs: sent now; active_before: how many pieces of work wait or run since before
    copies: tasks that Slurm had twice, as it accepted a job long after it was sent; they are ended
    """

    jobs: tuple[Job, ...]
    active_before: int
    copies: tuple["Active", ...] = ()


def submit(wanted: Wanted, disk: Disk, cluster: Cluster) -> Sent:
    """Send what is left to do and neither waits nor runs; the jobs.

    Raises BusyError where another submit is at work, ConfigError where jobs of another version of the run file are
    active, RefusedError for what Slurm refuses (jobs that were sent before stay), NoAnswerError.
    """
    try:
        make_folder(wanted.submission / LOGS)
    except OSError as err:
        raise disk_error(err, wanted.submission) from err
    with alone_in(wanted.submission):
        sending = Sending(wanted, cluster)
        sending.require_same_run_file()
        cluster.cancel(task_ids(sending.copies))
        left = sending.left(wanted.steps(disk))
        if left.steps:
            sending.require_answers()
            sending.keep_run_file()
            sending.drop(left.in_vain)
        before = len(sending.active)
        for batch in wanted.batches(left.steps, left.parts):
            sending.send(batch)
        return Sent(jobs=tuple(sending.sent), active_before=before, copies=tuple(sending.copies))


def is_all_active(wanted: Wanted, disk: Disk, cluster: Cluster) -> bool:
    """Whether all that is left to do waits or runs since an earlier submit; False without one, and Slurm is not asked.

    A look before any check of what would be sent: nothing is written. Raises ConfigError as `submit` does.
    """
    if read_submission(wanted.output) is None:
        return False
    sending = Sending(wanted, cluster)
    sending.require_same_run_file()
    return not sending.copies and not sending.left(wanted.steps(disk)).steps


@dataclass(frozen=True, kw_only=True, slots=True)
class Left:
    """What is to be sent: steps, parts of the extraction. in_vain: active pieces whose need is sent anew."""

    steps: tuple[Step, ...]
    parts: tuple[int, ...]
    in_vain: tuple[Piece, ...]


class Sending:
    """A submission at work: its record, and what Slurm knows of it."""

    def __init__(self, wanted: Wanted, cluster: Cluster) -> None:
        self._wanted, self._cluster = wanted, cluster
        record = read_submission(wanted.output) or Submission(folder=str(wanted.folder))
        queue = cluster.queue()
        self._known = {queued.id for queued in queue}
        self._queue = queue
        self._record = found_again(record, queue)
        self.active = active_pieces(self._record, queue)
        self.copies = copies_of(self._record, queue)
        self.sent: list[Job] = []

    def left(self, steps: Sequence[Step]) -> Left:
        """Of the steps those that neither wait nor run; what waits for one of them waits for one that has failed."""
        anew: dict[str, Step] = {}
        parts: list[int] = []
        in_vain: list[Piece] = []
        for step in steps:
            pieces: list[Piece] = [(step.name, None)]
            if step.parts > 1:
                pieces = [(step.name, part) for part in parts_left(self._wanted.folder / step.output, step.parts)]
            if not anew.keys().isdisjoint(step.needs):
                in_vain += [piece for piece in pieces if piece in self.active]
            missing = [piece for piece in pieces if piece not in self.active or piece in in_vain]
            if missing:
                anew[step.name] = step
                parts += [part for _, part in missing if part is not None]
        return Left(steps=tuple(anew.values()), parts=tuple(parts), in_vain=tuple(in_vain))

    def drop(self, pieces: Sequence[Piece]) -> None:
        """Cancel active pieces of work."""
        if pieces:
            self._cluster.cancel([self.active.pop(piece).task_id for piece in pieces])

    def require_same_run_file(self) -> None:
        """Raises ConfigError where jobs of another version of the run file are active."""
        copy = self._wanted.submission / RUN_COPY
        same = copy.exists() and copy.read_bytes() == self._wanted.config.read_bytes()
        if self.active and not (same and self._record.sets == self._wanted.sets):
            raise ConfigError(
                f"{len(self.active)} jobs of another version of it, or with another --set, wait or run; wait for them, "
                "or end them first: kdpipe cancel",
                where=self._wanted.config,
            )

    def require_answers(self) -> None:
        """Raises NoAnswerError where a job was sent that Slurm may still accept."""
        for job in unanswered(self._record):
            raise NoAnswerError(still_open(job), where=job.name)

    def keep_run_file(self) -> None:
        """Copy the run file for the jobs to read."""
        text, copy = self._wanted.config.read_bytes(), self._wanted.submission / RUN_COPY
        if not copy.exists() or copy.read_bytes() != text:
            replace_file(copy, text)
        self._record = self._record.model_copy(update={"sets": self._wanted.sets, "folder": str(self._wanted.folder)})

    def send(self, batch: Batch) -> None:
        """Record a job, send it, record its number."""
        text = self._wanted.script(batch)
        script = self._wanted.submission / f"{batch.name}.sbatch"
        replace_file(script, text.encode())
        job = Job(
            name=f"{self._wanted.name}-{batch.name}",
            digest=self._digest(text),
            script=script.name,
            needs=batch.needs,
            tasks=batch.tasks(self._wanted.folder),
            sent=time.time(),
        )
        self._keep((*self._record.jobs, job))
        number = next((queued.id for queued in self._queue if is_of(queued, job) and not queued.is_over), None)
        if number is None:
            number = self._ask_for(job, script, batch)
        job = job.model_copy(update={"id": number})
        self._keep((*self._record.jobs[:-1], job))
        self.sent.append(job)
        self.active |= {(task.step, task.part): Active(job=job, task=task, state="PENDING") for task in job.tasks}

    def _ask_for(self, job: Job, script: Path, batch: Batch) -> int:
        """Its number from sbatch, or from the queue where the answer was lost."""
        try:
            return self._cluster.sbatch(script, f"--comment={job.comment}", *self._after(batch))
        except RefusedError:
            self._keep(self._record.jobs[:-1])
            raise
        except NoAnswerError as err:
            return self._look_for(job, err)

    def _look_for(self, job: Job, err: NoAnswerError) -> int:
        """The number of a job whose answer was lost. Raises NoAnswerError where Slurm has not got it."""
        for look in range(LOOKS):
            for queued in self._cluster.queue():
                if is_of(queued, job) and queued.id not in self._known:
                    return queued.id
            time.sleep(look)
        raise NoAnswerError(f"{err.fact}; {still_open(job)}", where=err.where) from err

    def _digest(self, text: str) -> str:
        """Of a script and of how many were sent before: no two jobs of a submission have the same.

        One that is taken for lost is forgotten, so that when it is sent again its digest is the same.
        """
        times = len(self._record.jobs)
        return hashlib.sha256(f"{self._wanted.submission}\n{times}\n{text}".encode()).hexdigest()[:16]

    def _after(self, batch: Batch) -> Iterator[str]:
        """The dependency: on the jobs that do the steps it needs, those of before that wait or run among them."""
        before = [each for (step, _), each in self.active.items() if step in batch.needs]
        ids = task_ids(before)
        if ids:
            yield f"--dependency={'afterany' if batch.whatever else 'afterok'}:{':'.join(ids)}"

    def _keep(self, jobs: tuple[Job, ...]) -> None:
        self._record = self._record.model_copy(update={"jobs": jobs})
        write_submission(self._wanted.output, self._record)


@dataclass(frozen=True, kw_only=True, slots=True)
class Active:
    """A piece of work that waits or runs at Slurm."""

    job: Job
    task: Task
    state: str

    @property
    def task_id(self) -> str:
        return self.job.task_id(self.task)


def found_again(record: Submission, queue: Sequence[Queued]) -> Submission:
    """The record with the numbers of jobs whose answer was lost, without those that Slurm has not got in RESEND_S."""
    jobs = []
    queue = sorted(queue, key=lambda queued: queued.is_over)
    for job in record.jobs:
        if job.id is None:
            number = next((queued.id for queued in queue if is_of(queued, job)), None)
            if number is None and time.time() - job.sent > RESEND_S:
                continue
            job = job.model_copy(update={"id": number})
        jobs.append(job)
    return record.model_copy(update={"jobs": tuple(jobs)})


def active_pieces(record: Submission, queue: Sequence[Queued]) -> dict[Piece, Active]:
    """What of a submission waits, runs or is about to end."""
    known = {(queued.id, queued.index): queued for queued in queue if not queued.is_over}
    found = {}
    for job in record.jobs:
        for task in job.tasks:
            queued = known.get((job.id or -1, task.index))
            if queued is not None and is_of(queued, job):
                found[task.step, task.part] = Active(job=job, task=task, state=queued.state)
    return found


def copies_of(record: Submission, queue: Sequence[Queued]) -> list[Active]:
    """What waits or runs of a job that Slurm has under another number too, the one that is recorded."""
    numbers = {job.id for job in record.jobs}
    sent = {(job.name, job.comment): job for job in record.jobs}
    found = []
    for queued in queue:
        job = sent.get((queued.name, queued.comment))
        if job is not None and not queued.is_over and queued.id not in numbers:
            copy = job.model_copy(update={"id": queued.id})
            found += [
                Active(job=copy, task=task, state=queued.state) for task in job.tasks if task.index == queued.index
            ]
    return found


def unanswered(record: Submission) -> list[Job]:
    """The jobs that Slurm may still accept."""
    return [job for job in record.jobs if job.id is None]


def still_open(job: Job) -> str:
    """What to do about a job that Slurm may still accept."""
    sent, then = (time.strftime("%H:%M:%S", time.localtime(at)) for at in (job.sent, job.sent + RESEND_S))
    return (
        f"{job.name}, sent at {sent}, is not at Slurm yet but may still come (to look: squeue --name={job.name}); "
        f"after {then} it is taken for lost: run the same command again"
    )


def is_of(queued: Queued, job: Job) -> bool:
    """Whether what Slurm knows is this job: a number alone may be another's by now."""
    return queued.name == job.name and queued.comment == job.comment


def task_ids(pieces: Collection[Active]) -> list[str]:
    """What Slurm calls them: the number of a job all of whose tasks are meant, else those of the tasks."""
    by_job: dict[int, list[Active]] = {}
    for piece in pieces:
        by_job.setdefault(piece.job.id or -1, []).append(piece)
    ids = []
    for number, some in by_job.items():
        whole = len(some) == len(some[0].job.tasks)
        ids += [str(number)] if whole else [piece.task_id for piece in some]
    return ids


def cancel(output: Path, cluster: Cluster) -> list[Active]:
    """End what of a submission waits or runs, and nothing else; what that was. Raises ConfigError where there is none.

    Those that wait are ended first, so that none starts because the one before it has ended. Raises NoAnswerError, when
    they are ended, where one more was sent that Slurm may still accept.
    """
    record = read_submission(output)
    if record is None:
        raise ConfigError(f"nothing was submitted here: no {submission_folder(output).name}/jobs.json", where=output)
    with alone_in(submission_folder(output)):
        queue = cluster.queue()
        record = found_again(record, queue)
        write_submission(output, record)
        active = [*active_pieces(record, queue).values(), *copies_of(record, queue)]
        if active:
            ids = task_ids(active)
            cluster.cancel(ids, pending_alone=True)
            cluster.cancel(ids)
        for job in unanswered(record):
            raise NoAnswerError(f"{len(active)} tasks of it are ended, but {still_open(job)}", where=output)
        return active
