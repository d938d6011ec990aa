"""Run: a training from its folders to an exported student, as one process a rank.

    Found -> Trainer -> Loop (steps) -> student exported, kdpipe.json -> measured on all held-out samples

Invariant: asked for again, a training returns its metrics, goes on from its checkpoint, or only measures: what is left.
"""

import gc
import shlex
import signal
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from kdpipe.manifests.durable import disk_error, make_folder
from kdpipe.manifests.errors import CheckFailed, KdpipeError, TemporaryError, stopped
from kdpipe.manifests.progress import Progress, Silent
from kdpipe.manifests.provenance import digest_json
from kdpipe.manifests.run import Metrics, RunRecord
from kdpipe.manifests.running import alone_in
from kdpipe.stages import evaluate
from kdpipe.stages.align import Crossing
from kdpipe.stages.extract.reading import INCIDENTS
from kdpipe.stages.feed.batches import Batches, PlannedBatches
from kdpipe.stages.feed.packing import Packer
from kdpipe.stages.loss.cross import extra_of
from kdpipe.stages.models.device import described, pick_device
from kdpipe.stages.ranks import Ranks, joined
from kdpipe.stages.rollout.probe import BOUNDS, gap
from kdpipe.stages.student import (
    Across,
    Lora,
    Student,
    TeacherHead,
    check_student,
    checkpoint_dtype,
    compile_layers,
    exam_text,
    load_sharded,
    load_teacher_heads,
    lora_of,
    shard_beside,
)
from kdpipe.stages.student.export import AdapterExport, companions, export
from kdpipe.stages.train.checkpoint import Checkpoints
from kdpipe.stages.train.loop import Loop
from kdpipe.stages.train.output import Output
from kdpipe.stages.train.signals import asked_to_stop
from kdpipe.stages.train.trainer import Trainer
from kdpipe.stages.train.training import Found, Training, find

FEW_STEPS = 8
"""An epoch of fewer is worth a word: the default batch takes small data in one step."""
CHECKED_TOKENS = 64
"""Of the text on which a merged student is compared with the one that was trained."""


def train(training: Training, progress: Progress, found: Found | None = None) -> dict[str, object]:
    """Train as one rank of those the environment names (RANK, WORLD_SIZE; alone where it names none); final metrics.

    found: what this process has opened already
    A finished one returns its metrics, an interrupted one goes on from its checkpoint, one whose student was exported
    is only measured. Raises what check_training raises, CheckFailed for a loss or gradient that is not finite,
    BusyError where another run is at work in the output, TemporaryError or StoppedError where a signal asked it to
    stop: the state is saved then.
    """
    device = pick_device(training.device)
    found = found or find(training)
    for note in found.notes:
        progress.note(note)
    output = Output(training.output)
    with joined(device, cpu_tensors=training.spec.train.fsdp.optimizer_on_cpu) as ranks:
        record = ranks.from_first(lambda: output.finished(found.inputs))
        if record is None or record.metrics is None:
            record = _complete(training, found, record, ranks, progress)
        else:
            progress.note(f"{training.output} holds this run's student already")
    progress.note(f"the student is in {training.output}; {_next_command(training, found, record)}")
    return {**(record.metrics or {}), "num_steps": record.num_steps, "trained_tokens": record.num_tokens}


def _next_command(training: Training, found: Found, record: RunRecord) -> str:
    """How the student is measured; what was held out of its training is the fair choice."""
    measure = ["kdpipe", "eval", "--student", str(training.output), "--cache"]
    if not found.dataset.teachers:
        return f"measure it against a teacher with its tokenizer, on a cache: {shlex.join([*measure, 'CACHE'])}"
    if any(teacher.record.sidecar is not None for teacher in found.dataset.teachers):
        words = [*measure, "CACHE", *(["--data", "DATA"] if found.crossing is not None else [])]
        return f"a side-car does not say how far it is; measure it on a whole cache of its teacher: {shlex.join(words)}"
    if not found.rows_are_kept:
        words = [*measure, "CACHE", *(["--data", "DATA"] if found.crossing is not None else [])]
        return f"no rows were kept; measure it on a cache of its teacher: {shlex.join(words)}"
    if found.crossing is not None:
        measure += [*map(str, training.caches), "--data", *map(str, training.data)]
        return f"measure it on any cache of its teacher, with the cache's data: {shlex.join(measure)}"
    if record.metrics:
        whose = "its teacher" if len(found.dataset.teachers) == 1 else "its teachers"
        return f"measure it on any cache of {whose}: {shlex.join([*measure, *map(str, training.caches)])}"
    return (
        "nothing was held out of its training, so measure it on a cache of other texts: "
        f"{shlex.join([*measure, 'OTHER', '--heldout-fraction', '1'])}"
    )


def _complete(
    training: Training, found: Found, record: RunRecord | None, ranks: Ranks, progress: Progress
) -> RunRecord:
    """Whatever is left to do of a training of which `record` is done: steps and export, then the last evaluation."""
    run = Run(training, found, ranks) if record is None else None
    try:
        make_folder(training.output, training.group)  # a student that is refused leaves none
    except OSError as err:
        raise disk_error(err, training.output) from err
    output = Output(training.output)
    with ExitStack() as stack:
        keep = stack.enter_context(alone_in(training.output)) if ranks.rank == 0 else (lambda: None)
        if (record := ranks.from_first(lambda: output.finished(found.inputs))) is not None:
            run = None  # the run that was here until now has ended well
        progress.event("accepted", inputs=found.inputs.model_dump(mode="json"))
        asked = stack.enter_context(asked_to_stop(say=ranks.rank == 0))
        if run is not None:
            if training.data and not training.caches and ranks.rank == 0:
                output.list_incidents(found.dataset.tables[0].folder / INCIDENTS)
            run.loop.resume(training.resume, progress)
            run.steps(progress, asked, keep)
            record = run.save(progress)
            del run  # the exported student takes the place of weights, gradients and moments
            gc.collect()
        assert record is not None
        if record.metrics is None:
            record = _measured(training, found, record, ranks, progress, asked)
        return record


def _measured(
    training: Training,
    found: Found,
    record: RunRecord,
    ranks: Ranks,
    progress: Progress,
    asked: Sequence[signal.Signals],
) -> RunRecord:
    """The exported student measured on all held-out samples as `kdpipe eval` does it; the record with its metrics."""
    metrics: Metrics = {}
    if found.own is not None:
        found.own.as_in_last(record.num_steps, ranks)

    def stop() -> None:
        (number,) = ranks.largest([float(asked[0]) if asked else 0.0])
        if number:
            kept = "the student is written, only its last evaluation is left"
            raise stopped(signal.Signals(int(number)).name, where=training.output, kept=kept)

    if found.is_measured:
        student = found.model.at(training.output)
        dtype = evaluate.run_dtype(student, "auto")
        metrics |= evaluate.score(
            student,
            found.dataset,
            found.measured,
            dtype=dtype,
            batch_tokens=max(
                training.spec.train.batch_tokens // (ranks.world_size * training.spec.train.grad_accum), 1
            ),
            device=ranks.device,
            progress=progress,
            ranks=ranks,
            stop=stop,
            own=found.own,
            aligned=None if found.crossing is None else found.crossing.aligned,
        )
        metrics |= {"dtype": dtype}
        progress.event("eval", step=record.num_steps, **metrics)
    record = record.model_copy(update={"metrics": metrics})
    if ranks.rank == 0:
        output = Output(training.output)
        output.update(record)
        output.remove_teachers()
    ranks.barrier()
    return record


def _in_words(metrics: Mapping[str, float]) -> str:
    """The figures that say most, of the data's own answers where it has any."""
    if "heldout_kl" in metrics:
        exact = metrics.get("exact_tokens")  # across tokenizers both figures are over these alone
        over = f"{metrics['num_tokens']:,} tokens" if exact is None else f"{exact:,} exact tokens"
        return f"held-out KL {metrics['heldout_kl']:.4f}, top-1 agreement {metrics['top1_agreement']:.3f}, over {over}"
    if "heldout_ce" in metrics:
        return f"held-out cross-entropy {metrics['heldout_ce']:.4f}, over {metrics['num_tokens']:,} tokens"
    return (
        f"KL(student || teacher) {metrics['rollout_reverse_kl']:.4f} over {metrics['rollout_tokens']:,} tokens of its "
        "own answers to held-out prompts"
    )


class Run:
    """One rank of a run that has steps to take: the trainer made of a training's folders, and its way to an export."""

    def __init__(self, training: Training, found: Found, ranks: Ranks) -> None:
        spec, dataset = training.spec.train, found.dataset
        torch.manual_seed(spec.seed)
        self.training, self.ranks, self.dataset, self.inputs = training, ranks, dataset, found.inputs
        self._found = found
        if not ranks.agree(digest_json(self.inputs.model_dump(mode="json"))):
            raise TemporaryError("ranks found other inputs than others: did a cache grow just now? run it again")
        check_student(found.model, *dataset.teachers)
        lora = lora_of(found.model, training.spec.student)
        # As they are now: what is exported is what was trained, whatever becomes of the folder meanwhile.
        self.beside = companions(found.model, dataset, own := checkpoint_dtype(found.model))
        if lora is not None and spec.export != "merged":
            self.beside = replace(self.beside, adapter=self._adapter_export(lora))
        heads = self._load_heads()
        self.student = load_sharded(
            found.model,
            ranks,
            stored=torch.float32 if lora is None else own,
            computed=getattr(torch, spec.dtype),
            grad_checkpointing=spec.grad_checkpointing,
            fsdp=spec.fsdp,
            vocab_size=dataset.vocab_size,
            lora=lora,
            seed=spec.seed,
        ).train()
        if found.crossing is not None:
            self.student.across = self._across(found.crossing, heads[0])
        text = exam_text(dataset, np.arange(len(dataset)), self.student.model.config)
        self.student.examine(text, training.student)
        self._lora, self._text = lora, text[:CHECKED_TOKENS]
        self.student.own_teacher = training.spec.student.lora_teacher
        if spec.fsdp.compile:
            compile_layers(self.student)
        self.notes = (*found.model.notes, *self.beside.notes)
        self.train_samples, self.heldout, self.is_measured = found.samples[0], found.measured, found.is_measured
        self.planned = PlannedBatches(
            dataset if training.spec.loss.kd_weight > 0.0 else dataset.without_teachers(),
            self.train_samples,
            seed=spec.seed,
            batch_tokens=spec.batch_tokens,
            epochs=spec.epochs,
            max_steps=spec.max_steps,
            weights=training.weights,
            grad_accum=spec.grad_accum,
            rank=ranks.rank,
            world_size=ranks.world_size,
            padded=self.student.padded,
            pin=ranks.device.type == "cuda",
        )
        self.heads, self.own = heads, found.own
        self._sizes = evaluate.token_sizes(found.model)
        self.batches: Batches = self.planned
        if found.own is not None:
            self.batches = found.own.batches(
                self.planned, self.student, dataset.vocab_size or heads[0].vocab_size, ranks, spec.seed
            )
        self.trainer = Trainer(self.student, self.batches, heads, spec, training.spec.loss, ranks)
        self.checkpoints = Checkpoints(training.output, spec.keep, ranks.device)
        self.loop = Loop(self.trainer, self.checkpoints, self.inputs, training.output)

    def steps(
        self, progress: Progress, asked: Sequence[signal.Signals] = (), keep: Callable[[], None] = lambda: None
    ) -> None:
        """All steps that are left, with evaluations and checkpoints on the way; `keep` is called after each."""
        self._introduce(progress)
        for note in self.notes:
            progress.note(note)
        if self.own is None:
            self.planned.read_ahead(self.trainer.done)  # while it is measured, before its first step
        if self.trainer.done == 0 and self.is_measured:
            progress.note(f"before training: {_in_words(self.evaluate_now(progress))}")
        evaluation = (lambda: self.evaluate_now(progress)) if self.is_measured else None
        self.loop.run(progress, asked=asked, before=self._before, keep=keep, evaluate=evaluation)

    def _before(self, step: int) -> dict[str, float]:
        """What is due before a step; the head is that of the teacher whose rows the step has."""
        due = {} if self.own is None else self.own.before(step, self.student, self.ranks)
        if "update/seconds" in due:
            self.heads = self.trainer.heads = self._load_heads()
        return due

    def _across(self, crossing: Crossing, teacher: TeacherHead) -> Across:
        """What the student has beside it to learn from a teacher with another tokenizer. Collective."""
        spec, device = self.training.spec, self.ranks.device
        vocabulary, extra = crossing.aligned.vocabulary.to(device), None
        if spec.loss.kd_weight > 0.0:
            head = self.student.whole_head()
            tokenizer = crossing.tokenizer
            extra = extra_of(
                crossing.method,
                head.weight.shape[1],
                teacher.head.weight.shape[1],
                vocabulary,
                spec.loss.options,
                heads=(head, teacher.head),
                encode=lambda text: tokenizer.encode(text, add_special_tokens=False),
            )
        if extra is not None:
            extra = extra.to(device)
            shard_beside(extra, self.ranks.mesh(spec.train.fsdp.shard_size), getattr(torch, spec.train.dtype), device)
        return Across(vocabulary, crossing.method, extra)

    def _load_heads(self) -> list[TeacherHead]:
        as_rows = self._found.crossing is not None  # some of its methods project rows
        return load_teacher_heads(self.dataset.teachers, self.ranks.device, as_rows=as_rows, ranks=self.ranks)

    def _adapter_export(self, lora: Lora) -> AdapterExport:
        """Its base is the student's folder, or that of the adapter which is trained on."""
        model = self._found.model
        digest = self.ranks.from_first(model.base.digest) if model.is_adapter else self.inputs.student
        return AdapterExport(lora=lora, base=model.base.path.resolve(), digest=digest)

    def _introduce(self, progress: Progress) -> None:
        """What is about to be done, and what of it may not be what was meant."""
        spec, steps = self.training.spec.train, self.planned.steps_per_epoch
        # Steps from first_step on that stand before this event in the file were made by a run that was interrupted.
        progress.event(
            "start",
            num_steps=self.trainer.num_steps,
            steps_per_epoch=steps,
            ranks=self.ranks.world_size,
            first_step=self.trainer.done + 1,
            device=described(self.ranks.device),
            dtype=spec.dtype,
            teacher_rows=[head.rows_are for head in self.heads],
        )
        lengths = self.dataset.num_tokens[self.train_samples]
        if self.student.padded:
            progress.note("this model's layers cannot tell packed samples apart: batches are padded")
        if (share := self.inputs.spec.data.subset) < 1.0:
            progress.note(f"data.subset={share:g}: {len(lengths):,} of the training samples")
        if steps <= FEW_STEPS:
            progress.note(
                f"an epoch is {steps} step{'s' * (steps > 1)} of about {int(lengths.sum()) // steps:,} tokens; "
                "a smaller train.batch_tokens gives more and smaller ones"
            )
        if spec.batch_tokens < np.median(lengths):
            progress.note(
                f"train.batch_tokens={spec.batch_tokens} is less than most samples have: a step takes one sample, of "
                f"{int(lengths.mean()):,} tokens on average"
            )
        if not self.is_measured:
            progress.note("no sample is held out: nothing will be measured (data.heldout_fraction)")
        if self.trainer.done < self.trainer.num_steps:
            progress.note("the first step takes longer than the others: what it needs is made and read then")

    def evaluate_now(self, progress: Progress) -> dict[str, float]:
        """Held-out metrics of the student as it is, over the first samples up to train.eval_tokens. Collective."""
        spec, ranks = self.training.spec.train, self.ranks
        share = max(spec.batch_tokens // (ranks.world_size * spec.grad_accum), 1)
        metrics: dict[str, float] = {}
        if len(self.heldout):
            within = np.cumsum(self.dataset.num_tokens[self.heldout]) <= spec.eval_tokens
            samples = self.heldout[: max(int(within.sum()), 1)]
            packer = Packer(self.dataset, padded=self.student.padded, pin=ranks.device.type == "cuda")
            feed = evaluate.batches(self.dataset, packer, samples, share, rank=ranks.rank, world_size=ranks.world_size)
            num_bytes = evaluate.text_bytes(self.dataset, samples, self._sizes)
            metrics |= evaluate.measure(self.student, self.heads, feed, ranks.device, Silent(), num_bytes=num_bytes)
        if self.own is not None:
            metrics |= self.own.measure(self.student, self.heads, ranks, share)
        progress.event("eval", step=self.trainer.done, **metrics, dtype=spec.dtype)
        return metrics

    def save(self, progress: Progress) -> RunRecord:
        """Export the student with the record of its run, not measured yet. Collective; rank 0 writes."""
        output, problem = Output(self.training.output), None
        try:
            if self.ranks.rank == 0:
                output.make_scratch()
            export(self.student, self.beside, output.scratch, rank=self.ranks.rank)
            self._check_merged(output.scratch)
        except Exception as err:
            problem = err  # whatever it is, no step is to be lost by it
        self._require_exported(problem, progress)
        record = RunRecord(
            inputs=self.inputs,
            num_steps=self.trainer.num_steps,
            num_tokens=self.trainer.num_tokens,
            num_skipped=self.trainer.num_skipped,
            metrics=None,
            files={},
            added_stops=self.beside.added_stops,
            made_with=self.training.made_with,
        )
        record = self.ranks.from_first(lambda: output.seal(record))
        self.checkpoints.remove()
        return record

    def _check_merged(self, folder: Path) -> None:
        """A student that was written with its adapter merged in says what it says here. Collective; rank 0 looks.

        Raises CheckFailed.
        """
        if self._lora is None or self.beside.adapter is not None:
            return
        dtype = self.training.spec.train.dtype
        ours = self.student.logprobs(self._text)
        if self.ranks.rank == 0:
            written = Student(self._found.model.at(folder).load(getattr(torch, dtype), self.ranks.device))
            found = gap(written.logprobs(self._text), ours)
            stored = str(self.beside.dtype).removeprefix("torch.")
            if not found <= (allowed := max(BOUNDS[dtype], BOUNDS[stored])):  # type: ignore[index]
                raise CheckFailed(
                    f"the student with its adapter merged in is {found:.1e} nats from the one that was trained, "
                    f"allowed are {allowed:.1e}; train.export=adapter writes the adapter alone",
                    where=folder,
                )

    def _require_exported(self, problem: Exception | None, progress: Progress) -> None:
        """Where a rank could not export the student, keep the last step's state and raise why. Collective."""
        (failed,) = self.ranks.largest([float(problem is not None)])
        if not failed:
            return
        if self.training.spec.train.save_every:
            try:
                self.loop.save(progress)
            except KdpipeError as err:
                progress.note(f"nor could its state be saved: {err}")
        if problem is None:
            raise TemporaryError("another rank could not write the student; run it again", where=self.training.output)
        if isinstance(problem, OSError) and problem.errno is not None:
            raise disk_error(problem, self.training.output) from problem
        raise problem
