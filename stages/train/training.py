"""A training: what it is asked to do, and what is found wrong with it before a rank starts or a file is written.

Training -> find (folders, caches or data, opened and read once) -> check_training -> the ranks, with what was found
"""

import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from kdpipe.manifests.cache import Cache
from kdpipe.manifests.errors import ConfigError, SpaceError, StudentError
from kdpipe.manifests.fitted import all_stored_as, require_kl
from kdpipe.manifests.made_with import MadeWith
from kdpipe.manifests.overlap import shared_samples
from kdpipe.manifests.plan import read_plan
from kdpipe.manifests.prepared import Prepared, SamplesSettings
from kdpipe.manifests.progress import Progress, Silent
from kdpipe.manifests.provenance import digest_tokenizer, num_bytes
from kdpipe.manifests.run import CHECKPOINT_FILE, RunInputs, read_run
from kdpipe.manifests.running import require_nobody_in
from kdpipe.manifests.specs import FsdpSpec, Io, LossSpec, RunSpec, Unmatched
from kdpipe.stages.align import Asked, Crossing, cross
from kdpipe.stages.evaluate import Measures
from kdpipe.stages.extract.reading import Reading, incident_notes
from kdpipe.stages.feed.batches import Batches, PlannedBatches, require_samples
from kdpipe.stages.feed.dataset import Dataset, by_teacher, of_caches
from kdpipe.stages.loss import find_divergence
from kdpipe.stages.loss.cross import check_loss
from kdpipe.stages.models.context import context_of
from kdpipe.stages.models.device import pick_device
from kdpipe.stages.models.folder import ModelFolder
from kdpipe.stages.ranks import Ranks
from kdpipe.stages.student import (
    Lora,
    Student,
    check_export,
    check_own_teacher,
    check_student,
    checkpoint_dtype,
    lora_of,
    num_trainable,
    own_vocab_size,
    require_compiler,
    require_context,
)
from kdpipe.stages.student.across import AUTO, NONE
from kdpipe.stages.train.checkpoint import CHECKPOINTS
from kdpipe.stages.train.output import INCIDENTS, Output
from kdpipe.stages.train.samples import open_samples, prepare_samples

SILENT = Silent()
STATE_BYTES = 12
"""Of a trained parameter in a checkpoint: fp32 weight and two moments."""
ADAPTER_BYTES = 4
"""Of a number of an adapter that is written."""
TEACHER_BYTES = 4
"""Of a parameter in a teacher that is made of the student."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Training:
    """One student to train.

    student: folder that from_pretrained loads
    caches: caches of one teacher, or of more where spec.loss says what they are; none where data are trained on alone
    weights: the share of each cache in the supervised tokens of an epoch; () takes every sample once
    unmatched: what becomes of samples that not all teachers of the same ones have
    data: data files and folders, where there is no cache, or those that the caches were made of, for a student with
        another tokenizer; spec.data says how they become samples
    align, align_floor: how such a student learns, and how much of the text must be aligned
    workers: processes that tokenise them; None: as many as it is worth, up to one a core
    output: folder the trained student is written to
    copies: of the caches on this node's own disk, where their files are read instead; () reads the caches themselves
    device: "auto", "cpu" or "cuda"
    io: how the caches are read
    max_codec_kl: what their codecs may lose, nats; None: whatever it is
    trust: digest of the student's own code that may run, or its start; None where it brings none
    resume: "auto" goes on from the newest good checkpoint in output, "never" starts again, a path goes on from there
    group: number of the Unix group that may read the output
    loggers: who else is given the run's figures
    made_with: the command, as the finished student's record keeps it for people
    inputs: what the launcher found that the result depends on; None: this process finds it itself
    """

    student: Path
    caches: tuple[Path, ...]
    output: Path
    spec: RunSpec
    weights: tuple[float, ...] = ()
    unmatched: Unmatched = "refuse"
    data: tuple[Path, ...] = ()
    align: str = "auto"
    align_floor: float = 0.0
    copies: tuple[Path, ...] = ()
    workers: int | None = None
    device: str = "auto"
    io: Io = "mmap"
    max_codec_kl: float | None = None
    trust: str | None = None
    resume: str = "auto"
    group: int | None = None
    loggers: tuple[str, ...] = ()
    made_with: MadeWith | None = None
    inputs: RunInputs | None = None


class OwnAnswering(Measures, Protocol):
    """Of a run whose student writes answers of its own: what its steps train on, and what more is measured."""

    def batches(
        self,
        planned: PlannedBatches,
        student: Student,
        vocab_size: int,
        ranks: Ranks,
        seed: int,
    ) -> Batches:
        """Instead of the planned ones."""

    def close(self) -> None:
        """End what was started for it. Running it twice is fine."""

    def before(self, step: int, student: Student, ranks: Ranks) -> dict[str, float]:
        """Whatever is due before a step; figures for its event, "update/seconds" where its teacher is another one.

        Collective.
        """

    def as_in_last(self, num_steps: int, ranks: Ranks) -> None:
        """The teacher is the one that the last of some steps had. Collective."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Found:
    """What a training names, opened: each is asked about once in a process.

    notes: what whoever watches should know of the caches or the data, a line each
    rows_are_kept: the teacher's rows are there when the run has ended, so that more can be measured on them
    crossing: how its samples are aligned with the caches', where the student has another tokenizer
    """

    model: ModelFolder
    dataset: Dataset
    inputs: RunInputs
    notes: tuple[str, ...] = ()
    rows_are_kept: bool = True
    own: OwnAnswering | None = None
    crossing: Crossing | None = None

    @property
    def samples(self) -> tuple[np.ndarray, np.ndarray]:
        """(training, held-out) sample indices."""
        return self.dataset.split(self.inputs.heldout_fraction, self.inputs.spec.data.subset)

    @property
    def measured(self) -> np.ndarray:
        """The held-out samples that have an answer to measure on."""
        _, heldout = self.samples
        return heldout[self.dataset.num_supervised[heldout] > 0]

    @property
    def is_measured(self) -> bool:
        return bool(len(self.measured)) or (self.own is not None and bool(len(self.samples[1])))


def find(training: Training, progress: Progress = SILENT) -> Found:
    """Open the student's folder and the caches, or prepare the data. Raises what reading them raises."""
    model = ModelFolder(training.student, StudentError, training.trust)
    if not training.caches:
        return _find_data(training, model, progress)
    caches = open_caches(training)
    for cache in caches:
        require_kl(cache.path, cache.plan, training.max_codec_kl)
    dataset = of_caches(caches, training.spec.loss, unmatched=training.unmatched)
    _check_weights(training, dataset)
    crossing = cross(model, dataset, caches, asked_across(training), progress)
    if crossing is not None:
        dataset = crossing.dataset
    inputs = training.inputs or run_inputs(training, model, dataset, crossing)
    notes = (*_notes(training, caches), *dataset.notes)
    if crossing is None and training.align not in (AUTO, NONE):
        notes += (f"student.align={training.align}: the student has the teacher's tokenizer, so nothing is aligned",)
    return Found(model=model, dataset=dataset, inputs=inputs, notes=notes, crossing=crossing)


def asked_across(training: Training) -> Asked:
    """What is asked of a student with another tokenizer than its teacher's."""
    return Asked(
        data=training.data,
        spec=training.spec.data,
        align=training.align,
        floor=training.align_floor,
        workers=training.workers,
        places=(training.caches[0], training.output),  # not a copy on this node's disk
    )


def _find_data(training: Training, model: ModelFolder, progress: Progress) -> Found:
    """Without a teacher; what can be refused before the data are read is."""
    if training.inputs is None:
        _check_start(training)
        check_student(model)
        if read_run(training.output) is None:
            Output(training.output).require_free()
        reading = Reading(
            data=training.data,
            spec=training.spec.data,
            model=model,
            who="student",
            context=context_of(model.config),
            workers=training.workers,
        )
        table = prepare_samples(reading, training.output, progress, vocab_size=own_vocab_size(model))
    else:
        table = open_samples(training.output, training.inputs.data)
    dataset = Dataset([table], vocab_size=own_vocab_size(model))
    listed = incident_notes(table.plan.counts, str(training.output / INCIDENTS))
    how = "no teacher: cross-entropy on {}, loss.kd_weight is 0"
    if training.spec.student.lora_teacher:
        how = "its own base is its teacher, on {}"
    notes = (how.format(f"{len(dataset):,} samples of the data"), *listed)
    inputs = training.inputs or run_inputs(training, model, dataset)
    return Found(model=model, dataset=dataset, inputs=inputs, notes=notes, rows_are_kept=False)


def check_training(training: Training, nproc: int, found: Found | None = None) -> Found:
    """Raises every input error that can be found before a rank is started or a file written.

    nproc: ranks in all
    found: what was opened already
    """
    _check_start(training)
    if not training.caches and training.spec.loss.kd_weight and not training.spec.student.lora_teacher:
        raise ConfigError("data without a teacher's rows are trained on with 0", where="loss.kd_weight")
    found = found or find(training)
    check_student(found.model, *found.dataset.teachers)
    lora = lora_of(found.model, training.spec.student)
    check_export(lora, found.model, training.spec.train.export)
    check_own_teacher(lora, training.spec.student, taught=bool(found.dataset.teachers))
    for path, plan in zip(training.caches, found.dataset.plans, strict=bool(training.caches)):
        _check_settings(training.spec, path, plan, own_lengths=found.crossing is not None)
    require_context(found.model, found.dataset, np.arange(len(found.dataset)))
    if found.crossing is not None:
        check_loss(found.crossing.method, training.spec.loss)
    else:
        find_divergence(training.spec.loss.divergence).resolve(training.spec.loss.options)
    _check_sidecars(training.spec.loss, found.dataset, across=found.crossing is not None)
    train_samples, _ = found.samples
    if not len(train_samples):
        raise ConfigError(
            "no sample is left to train on; lower data.heldout_fraction, or raise data.subset", where="data"
        )
    require_samples(train_samples, nproc)
    device = pick_device(training.device)
    # torchrun over several machines: of its WORLD_SIZE ranks only these are on the GPUs of this one.
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", nproc))
    if device.type == "cuda" and ranks_here > torch.cuda.device_count():
        raise ConfigError(f"{ranks_here} ranks for {torch.cuda.device_count()} GPUs", where="--nproc")
    _check_fsdp(training.spec.train.fsdp, device, nproc)
    output = Output(training.output)
    output.settle(found.inputs)
    if (record := output.finished(found.inputs)) is None:
        _require_room(training, found, lora, output.require_free())
    elif training.resume != "auto" and record.metrics is not None:
        raise ConfigError(
            f"it holds this run's student already, so --resume {training.resume} has nothing to do; to train it again "
            "remove the folder or choose another --output, to see its figures leave the option out",
            where=training.output,
        )
    return found


def _check_start(training: Training) -> None:
    """Raises BusyError where another run is at work in the output, ConfigError for a --resume that is no checkpoint."""
    require_nobody_in(training.output)
    if training.resume not in ("auto", "never") and not (Path(training.resume) / CHECKPOINT_FILE).exists():
        raise ConfigError(
            f"no checkpoint here: {CHECKPOINT_FILE} is missing; checkpoints are folders as OUTPUT/{CHECKPOINTS}/000100",
            where=f"--resume {training.resume}",
        )


def _check_fsdp(fsdp: FsdpSpec, device: torch.device, nproc: int) -> None:
    """Raises ConfigError for what these ranks cannot do."""
    if fsdp.shard_size and nproc % fsdp.shard_size:
        raise ConfigError(
            f"{nproc} ranks do not make groups of {fsdp.shard_size}; take a number that divides {nproc}, or leave it "
            "out: all ranks share one copy then",
            where="train.fsdp.shard_size",
        )
    if fsdp.compile:
        require_compiler(device)


def open_caches(training: Training) -> list[Cache]:
    """The caches of a training. One that grew since the run began, or ended, is what it was then."""
    then = training.inputs.caches if training.inputs else Output(training.output).began_with(training.resume) or ()
    began: Sequence[str | None] = then if len(then) == len(training.caches) else [None] * len(training.caches)
    places = training.copies or training.caches
    return [Cache.open(path, io=training.io, fingerprint=one) for path, one in zip(places, began, strict=True)]


def _notes(training: Training, caches: Sequence[Cache]) -> Iterator[str]:
    """What may not be as the user thinks. Raises CacheError for caches that hold the same texts."""
    for cache in caches:
        if read_plan(cache.path).num_samples > len(cache):
            yield (
                f"{cache.path} has grown since this run began; it is one of the {len(cache)} samples of then, "
                "another --output trains on all"
            )
    for cache in caches:
        if (sidecar := cache.plan.head.sidecar) is not None:
            yield (
                f"{cache.path} has {sidecar.has}: a loss on it is {sidecar.bias}; no divergence from its teacher is "
                "measured"
            )
    groups = list(by_teacher(caches).values())
    together = len(groups) > 1 and training.spec.loss.teacher_mix != "route"
    for group in groups if together else [caches]:
        yield from shared_samples(group)
    if len(groups) > 1:
        names = [f"{n} {', '.join(str(one.path) for one in group)}" for n, group in enumerate(groups, start=1)]
        yield f"teachers by number: {'; '.join(names)}"
    shares = {cache.plan.heldout_fraction for cache in caches}
    if len(shares) > 1 and heldout_fraction(training.spec) is None:
        yield (
            f"these caches hold out {' and '.join(map(str, sorted(shares)))} of their samples: {max(shares)} is held "
            "out of all, so that no text is held out of one and trained on from another; data.heldout_fraction sets it"
        )


def _require_room(training: Training, found: Found, lora: Lora | None, there: Path) -> None:
    """The trained student and what is kept on the way to it must fit the disk of a folder. Raises SpaceError."""
    student, free = num_bytes(training.student), shutil.disk_usage(there).free
    spec = training.spec.train
    params = student // {torch.float32: 4}.get(checkpoint_dtype(found.model), 2)
    trained = params if lora is None else num_trainable(found.model, lora)
    if lora is not None and spec.export != "merged":
        student = ADAPTER_BYTES * trained
    kept = (spec.keep + 1) * trained * STATE_BYTES if spec.save_every else 0
    if found.inputs.rollouts.get("teacher_update_every"):
        kept += (2 + (spec.keep if spec.save_every else 0)) * params * TEACHER_BYTES
    if student + kept > free:
        raise SpaceError(
            f"the trained student takes {student:,} bytes and its checkpoints {kept:,}, {free:,} are free; free some "
            "room, lower train.keep, or make no checkpoints with train.save_every=0",
            where=training.output,
        )


def heldout_fraction(spec: RunSpec) -> float | None:
    """The run file's own fraction, None (the cache's) where it has none."""
    return spec.data.heldout_fraction if "heldout_fraction" in spec.data.model_fields_set else None


def _check_weights(training: Training, dataset: Dataset) -> None:
    """Raises ConfigError for shares of caches whose samples are the same."""
    if training.weights and len(dataset.tables) < len(training.caches):
        raise ConfigError(
            "teachers of the same samples have no shares of an epoch; loss.teacher_weights says how much each counts",
            where="cache.weights",
        )


def _check_sidecars(loss: LossSpec, dataset: Dataset, *, across: bool) -> None:
    """Raises ConfigError for a loss that needs more of a teacher than the rows of a side-car have."""
    for teacher in dataset.teachers:
        if (sidecar := teacher.record.sidecar) is None or not loss.kd_weight:
            continue
        has, several = f"{teacher.where} has {sidecar.has}", len(dataset.teachers) > 1
        if across:
            raise ConfigError(f"{has}: a student with a tokenizer of its own needs all", where="student.align")
        if loss.temperature != 1.0:
            raise ConfigError(f"{has}, at temperature 1 alone", where="loss.temperature")
        if several and loss.teacher_mix == "distributions":
            raise ConfigError(f"{has}: its losses can be averaged, its distribution not", where="loss.teacher_mix")
        if several and loss.teacher_mix == "losses" and sidecar.kind == "sampled":
            raise ConfigError(f"{has}: it teaches alone, or its own samples (route)", where="loss.teacher_mix")
        if not find_divergence(loss.divergence).is_of(sidecar, loss.options):
            raise ConfigError(f"{has}: {loss.divergence} needs more; take {sidecar.serves}", where="loss.divergence")


def _check_settings(spec: RunSpec, cache: Path, plan: Prepared, *, own_lengths: bool) -> None:
    """A run file that says how data was to be prepared must say what the cache was made with.

    own_lengths: max_length is in tokens of the student's own
    """
    for field in spec.data.model_fields_set & SamplesSettings.model_fields.keys() - {*["max_length"] * own_lengths}:
        asked, made = getattr(spec.data, field), getattr(plan.settings, field)
        if asked != made:
            raise ConfigError(
                f"data.{field} is {asked!r}, the cache was extracted with {made!r}; extract again or drop the key",
                where=cache,
            )


def run_inputs(training: Training, model: ModelFolder, dataset: Dataset, crossing: Crossing | None = None) -> RunInputs:
    """What its result depends on, [data] as the caches were made (the first, where they differ), not as asked."""
    taught = bool(dataset.teachers)
    fraction, made = heldout_fraction(training.spec), dataset.plans[0].settings
    fraction = dataset.heldout_fraction if fraction is None else fraction
    own = None if taught and crossing is None else dataset.tables[0].plan
    used = {
        "max_length": (own or dataset.plans[0]).settings.max_length,
        "overlong": made.overlong,
        "supervise": made.supervise,
    }
    data = training.spec.data.model_copy(update={**used, "heldout_fraction": fraction})
    return RunInputs(
        student=model.digest(),
        tokenizer=digest_tokenizer(training.student),
        caches=tuple(plan.fingerprint.overall() for plan in dataset.plans) if taught else (),
        codecs=all_stored_as(dataset.plans) if taught else (),
        cache_weights=training.weights,
        data="" if own is None else own.fingerprint.data,
        align="" if crossing is None else crossing.method,
        heldout_fraction=fraction,
        spec=training.spec.model_copy(update={"data": data}),
    )
