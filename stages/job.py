"""What a training run is asked to do, and the state of its output: checked before a rank starts or a file is written.

Invariant: what another run left in the output is neither finished, removed nor gone on from.
"""

import os
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from kdpipe.manifests.cache import Cache
from kdpipe.manifests.durable import disk_error, fsync_folder
from kdpipe.manifests.errors import ConfigError, CorruptError, SpaceError, StudentError
from kdpipe.manifests.failpoints import failpoint
from kdpipe.manifests.made_with import MadeWith
from kdpipe.manifests.overlap import shared_samples
from kdpipe.manifests.places import require_outside
from kdpipe.manifests.plan import Settings, read_plan
from kdpipe.manifests.progress import Progress
from kdpipe.manifests.provenance import digest_tokenizer, num_bytes
from kdpipe.manifests.run import CHECKPOINT_FILE, ELASTIC, RUN_FILE, RunInputs, RunRecord, read_run
from kdpipe.manifests.running import RUNNING_FILE, require_nobody_in
from kdpipe.manifests.specs import Io, RunSpec
from kdpipe.stages.checkpoint import (
    CHECKPOINTS,
    UNFINISHED,
    file_difference,
    newest_record,
    remove_checkpoints,
)
from kdpipe.stages.feed import Feed, Rows
from kdpipe.stages.loss import find_divergence
from kdpipe.stages.models.folder import ModelFolder
from kdpipe.stages.student import check_student, checkpoint_dtype, pick_device, require_context

EVENTS = "events.jsonl"
FILES = {EVENTS, RUNNING_FILE}
FOLDERS = {UNFINISHED, CHECKPOINTS}
"""What an interrupted run leaves in its output."""
STATE_BYTES = 12
"""Of a parameter in a checkpoint: fp32 weight and two moments."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainJob:
    """One student to train.

    student: folder that from_pretrained loads
    caches: caches of one teacher
    output: folder the trained student is written to
    device: "auto", "cpu" or "cuda"
    io: how the caches are read
    trust: digest of the student's own code that may run, or its start; None where it brings none
    resume: "auto" goes on from the newest good checkpoint in output, "never" starts again, a path goes on from there
    group: number of the Unix group that may read the output
    made_with: the command, as the finished student's record keeps it for people
    """

    student: Path
    caches: tuple[Path, ...]
    output: Path
    spec: RunSpec
    device: str = "auto"
    io: Io = "mmap"
    trust: str | None = None
    resume: str = "auto"
    group: int | None = None
    made_with: MadeWith | None = None


def check_job(job: TrainJob, nproc: int) -> None:
    """Raises every input error that can be found before a rank is started or a file written; nproc: ranks in all."""
    require_nobody_in(job.output)
    if job.resume not in ("auto", "never") and not (Path(job.resume) / CHECKPOINT_FILE).exists():
        raise ConfigError(
            f"no checkpoint here: {CHECKPOINT_FILE} is missing; checkpoints are folders as OUTPUT/{CHECKPOINTS}/000100",
            where=f"--resume {job.resume}",
        )
    rows = open_rows(job)
    for cache in rows.caches:
        check_student(job.student, cache, job.trust)
        _check_settings(job.spec, cache)
    require_context(job.student, rows, np.arange(len(rows.num_tokens)), job.trust)
    find_divergence(job.spec.loss.divergence).resolve(job.spec.loss.options)
    training, _ = rows.split(heldout_fraction(job.spec))
    if not len(training):
        raise ConfigError(
            "every sample is held out, none is left to train on; lower data.heldout_fraction", where="data"
        )
    Feed(rows, training, seed=job.spec.train.seed, batch_tokens=job.spec.train.batch_tokens, world_size=nproc)
    device = pick_device(job.device)
    # torchrun over several machines: of its WORLD_SIZE ranks only these are on the GPUs of this one.
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", nproc))
    if device.type == "cuda" and ranks_here > torch.cuda.device_count():
        raise ConfigError(f"{ranks_here} ranks for {torch.cuda.device_count()} GPUs", where="--nproc")
    settle(job, rows)
    if (record := finished(job, rows)) is None:
        _check_output(job)
    elif job.resume != "auto" and record.metrics is not None:
        raise ConfigError(
            f"it holds this run's student already, so --resume {job.resume} has nothing to do; to train it again "
            "remove the folder or choose another --output, to see its figures leave the option out",
            where=job.output,
        )


def open_rows(job: TrainJob, progress: Progress | None = None) -> Rows:
    """The caches of a job. One that grew since the run began, or ended, is what it was then."""
    began: Sequence[str | None] = [None] * len(job.caches)
    record = read_run(job.output) or read_run(job.output / UNFINISHED)
    checkpoint = None
    if record is None and job.resume != "never":
        checkpoint = newest_record(job.output if job.resume == "auto" else Path(job.resume))
    inputs = record.inputs if record else checkpoint.inputs if checkpoint else None
    if inputs is not None and len(inputs.caches) == len(job.caches):
        began = inputs.caches
    caches = [Cache.open(path, io=job.io, fingerprint=one) for path, one in zip(job.caches, began, strict=True)]
    for cache in caches:
        if progress is not None and read_plan(cache.path).num_samples > len(cache):
            progress.note(
                f"{cache.path} has grown since this run began; it is one of the {len(cache)} samples of then, "
                "another --output trains on all"
            )
    rows, shares = Rows(caches), {cache.plan.heldout_fraction for cache in caches}
    for note in shared_samples(caches):
        if progress is not None:
            progress.note(note)
    if len(shares) > 1 and heldout_fraction(job.spec) is None and progress is not None:
        progress.note(
            f"these caches hold out {' and '.join(map(str, sorted(shares)))} of their samples: {max(shares)} is held "
            "out of all, so that no text is held out of one and trained on from another; data.heldout_fraction sets it"
        )
    return rows


def _check_output(job: TrainJob) -> None:
    """The output must be free, or hold no more than a run that was interrupted leaves; and the student must fit."""
    output = job.output
    there = output.absolute()
    while not os.path.lexists(there):
        there = there.parent
    if not there.is_dir():
        raise ConfigError("this is not a folder; choose another --output", where=there)
    if there != output.absolute() or not any(output.iterdir()):
        require_outside(output, option="--output")
    for path in sorted(output.glob("*")):
        ours = path.is_file() if path.name in FILES else path.name in FOLDERS and path.is_dir()
        if not ours or path.is_symlink():
            raise ConfigError(f"it holds other things ({path.name}); choose another --output", where=output)
    student, free = num_bytes(job.student), shutil.disk_usage(there).free
    spec = job.spec.train
    width = {torch.float32: 4}.get(checkpoint_dtype(job.student, job.trust), 2)
    kept = (spec.keep + 1) * student // width * STATE_BYTES if spec.save_every else 0
    if student + kept > free:
        raise SpaceError(
            f"the trained student takes {student:,} bytes and its checkpoints {kept:,}, {free:,} are free; free some "
            "room, lower train.keep, or make no checkpoints with train.save_every=0",
            where=output,
        )


def finished(job: TrainJob, rows: Rows) -> RunRecord | None:
    """The record of this very job, if its student is there. Raises ConfigError where `output` is another run's."""
    record = read_run(job.output)
    if record is None:
        return None
    if difference := run_inputs(job, rows).difference(record.inputs, but=ELASTIC):
        raise ConfigError(
            f"it holds the student of another run: {difference}; choose another --output or remove the folder",
            where=job.output,
        )
    for name, told in record.files.items():
        if problem := file_difference(job.output / name, told):
            raise CorruptError(f"{problem}; remove this folder and run the same command again", where=job.output)
    return record


def settle(job: TrainJob, rows: Rows) -> None:
    """Finish what a kill interrupted after this very run's student was exported in full; another's is left alone."""
    output, inputs = job.output, run_inputs(job, rows)
    if (exported := read_run(output / UNFINISHED)) is not None and not inputs.difference(exported.inputs, but=ELASTIC):
        move_in(output / UNFINISHED, output)
    if (moved := read_run(output)) is not None and not inputs.difference(moved.inputs, but=ELASTIC):
        remove_checkpoints(output)


def move_in(scratch: Path, output: Path) -> None:
    """Move finished files to their place, the record last; the ranks of a launch may all do it at once."""
    try:
        for path in sorted(scratch.iterdir(), key=lambda path: path.name == RUN_FILE):
            with suppress(FileNotFoundError):  # another rank was first
                path.replace(output / path.name)
            failpoint("export:moved")
        with suppress(FileNotFoundError):
            scratch.rmdir()
        fsync_folder(output)
    except OSError as err:
        raise disk_error(err, output) from err


def heldout_fraction(spec: RunSpec) -> float | None:
    """The run file's own fraction, None (the cache's) where it has none."""
    return spec.data.heldout_fraction if "heldout_fraction" in spec.data.model_fields_set else None


def _check_settings(spec: RunSpec, cache: Cache) -> None:
    """A run file that says how data was to be prepared must say what the cache was made with."""
    for field in spec.data.model_fields_set & Settings.model_fields.keys():
        asked, made = getattr(spec.data, field), getattr(cache.plan.settings, field)
        if asked != made:
            raise ConfigError(
                f"data.{field} is {asked!r}, the cache was extracted with {made!r}; extract again or drop the key",
                where=cache.path,
            )


def run_inputs(job: TrainJob, rows: Rows) -> RunInputs:
    """What the job's result depends on, [data] as the caches were made (the first, where they differ), not as asked."""
    fraction, made = heldout_fraction(job.spec), rows.caches[0].plan.settings
    fraction = rows.heldout_fraction if fraction is None else fraction
    used = {"max_length": made.max_length, "overlong": made.overlong, "supervise": made.supervise}
    data = job.spec.data.model_copy(update={**used, "heldout_fraction": fraction})
    return RunInputs(
        student=ModelFolder(job.student, StudentError, job.trust).digest(),
        tokenizer=digest_tokenizer(job.student),
        caches=tuple(cache.plan.fingerprint.overall() for cache in rows.caches),
        heldout_fraction=fraction,
        spec=job.spec.model_copy(update={"data": data}),
    )
