"""On-policy: a training whose student writes answers of its own beside a teacher that scores them.

find_onpolicy(training, run) -> Found, before there is a teacher; fed_by(ring, found, ...) -> with one at work
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from kdpipe.manifests.cache import Cache
from kdpipe.manifests.engine import EngineOptions
from kdpipe.manifests.errors import CacheError, ConfigError, TeacherError
from kdpipe.manifests.ring import RingReader
from kdpipe.manifests.row_source import CacheRows, RingRows
from kdpipe.manifests.run import ROLLOUTS
from kdpipe.manifests.sample import num_answers, prompt_of
from kdpipe.manifests.samples import Samples
from kdpipe.manifests.shard import DTYPES, TAGS
from kdpipe.manifests.specs import Device, LiveSpec, RunFile
from kdpipe.stages.align import Retelling
from kdpipe.stages.feed.batches import Batches, PlannedBatches
from kdpipe.stages.live.answers import LiveRows, OwnAnswers, ToldRows
from kdpipe.stages.live.beside import NoRows, find_beside
from kdpipe.stages.live.measuring import Measuring
from kdpipe.stages.live.rollout_log import RolloutLog
from kdpipe.stages.live.rollouts import RolloutBatches, sampling_of
from kdpipe.stages.live.updates import TeacherUpdates
from kdpipe.stages.live.writers import EngineWriter, RunWriter, StudentWriter
from kdpipe.stages.loss import Importance
from kdpipe.stages.models.context import context_of
from kdpipe.stages.models.folder import ModelFolder
from kdpipe.stages.ranks import Ranks
from kdpipe.stages.rollout.sglang_writer import SglangWriter
from kdpipe.stages.student import Student, TeacherHead
from kdpipe.stages.student.export import taught_stops
from kdpipe.stages.train.training import Found, Training

MIB = 1 << 20


class OnPolicy:
    """OwnAnswering of `kdpipe onpolicy`."""

    def __init__(
        self, run: RunFile, found: Found, dataset: OwnAnswers, output: Path, updates: TeacherUpdates | None = None
    ) -> None:
        self._run, self._dataset, self._model, self._output = run, dataset, found.model, output
        self._stop_ids = found.model.stop_ids | set(taught_stops(found.dataset, found.model.tokenizer))
        _, heldout = found.samples
        self._measuring = Measuring(dataset, heldout, sampling_of(run.live, self._stop_ids))
        self._writer: RunWriter | None = None
        self._updates = updates

    def batches(self, planned: PlannedBatches, student: Student, vocab_size: int, ranks: Ranks, seed: int) -> Batches:
        self._writer = self._made_writer(student, vocab_size, ranks)
        cap = self._run.live.importance_cap
        student.importance = None if cap is None else Importance(cap, self._run.live.temperature)
        return RolloutBatches(
            planned,
            self._dataset,
            self._writer,
            ranks,
            self._run.live,
            RolloutLog(self._output, ranks.rank, self._model.tokenizer.decode),
            seed=seed,
            stop_ids=self._stop_ids,
            importance=student.importance,
            padded=student.padded,
            pin=ranks.device.type == "cuda",
        )

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()

    def _made_writer(self, student: Student, vocab_size: int, ranks: Ranks) -> RunWriter:
        live, dtype = self._run.live, self._run.train.dtype
        if live.rollout_engine == "transformers":
            return StudentWriter(student, vocab_size)
        options = EngineOptions(
            tp=live.rollout_tp,
            mem_fraction=live.rollout_mem_fraction,
            timeout_s=self._run.engine.timeout,
            trust=self._run.student.trust_remote_code,
        )
        device: Device = "cuda" if ranks.device.type == "cuda" else "cpu"

        def make() -> SglangWriter:
            return SglangWriter(self._model, dtype=dtype, device=device, options=options, vocab_size=vocab_size)

        return EngineWriter(student, ranks, make, self._dataset.tokens(0).token_ids, dtype)

    def before(self, step: int, student: Student, ranks: Ranks) -> dict[str, float]:
        return {} if self._updates is None else self._updates.before(step, student, ranks)

    def as_in_last(self, num_steps: int, ranks: Ranks) -> None:
        if self._updates is not None:
            self._updates.end(num_steps, ranks)

    def measure(
        self, student: Student, heads: Sequence[TeacherHead], ranks: Ranks | None, batch_tokens: int
    ) -> dict[str, float]:
        return self._measuring.measure(student, heads, ranks, batch_tokens)


def find_onpolicy(training: Training, run: RunFile) -> Found:
    """What a training names, opened before there is a teacher; training.caches is the folder of the plan alone."""
    found = find_beside(training, prompts=True)
    if training.inputs is None:
        inputs = found.inputs.model_copy(update={"rollouts": run.live.rollouts()})
        found = replace(found, inputs=inputs)
    if found.crossing is not None:
        check_across(run.live, training.output)
        found = _of_one_prompt(found, _retelling(found, run))
    return _answering(found, NoRows(), training, run)


def check_across(live: LiveSpec, output: Path) -> None:
    """Raises ConfigError for what a student with another tokenizer than its teacher's cannot have."""
    for key, given, why in (
        (
            "live.tee",
            live.tee,
            "rows of the student's answers are of the teacher's tokens, which it cannot learn from without their text; "
            f"{output}/{ROLLOUTS} will have the answers as text, for kdpipe extract",
        ),
        ("live.teacher_update_every", live.teacher_update_every, "a teacher made of the student has its tokenizer"),
    ):
        if given:
            raise ConfigError(f"student and teacher have other tokenizers: {why}; leave it out", where=key)


def _retelling(found: Found, run: RunFile) -> Retelling | None:
    """What tells the teacher of the answers; None where both have one tokenizer."""
    if (crossing := found.crossing) is None:
        return None
    assert run.teacher.path is not None, "the command has asked for it"
    context = context_of(ModelFolder(run.teacher.path, TeacherError, run.teacher.trust_remote_code).config)
    head = crossing.cache.plan.head
    row_bytes = head.hidden_size * DTYPES[TAGS[head.dtype]].itemsize
    return Retelling(
        found.model.tokenizer,
        crossing.tokenizer,
        crossing.aligned.vocabulary,
        crossing.aligned.record.ends,
        most_tokens=None if context is None else context.tokens,
        most_rows=run.live.ring_mib * MIB // row_bytes,
    )


def _of_one_prompt(found: Found, retelling: Retelling | None) -> Found:
    """Without the samples whose last answer follows another turn for the teacher, as it was cut elsewhere.

    Nor those of which the teacher reads the prompt alone.
    """
    assert retelling is not None, "the tokenizers differ"
    dataset = found.dataset
    (teacher,) = dataset.teachers
    assert teacher.beside is not None, "the tokenizers differ"
    pairs = ((dataset.tokens(sample), teacher.beside.text(sample)) for sample in range(len(dataset)))
    usable = [
        num_answers(own) == num_answers(theirs) and retelling.has_room(prompt_of(theirs, dataset.names))
        for own, theirs in pairs
    ]
    if all(usable):
        return found
    note = f"{usable.count(False):,} samples are cut at another turn for the teacher than for the student: left out"
    return replace(found, dataset=dataset.only(np.array(usable), note), notes=(*found.notes, note))


def check_cache(run: RunFile, found: Found) -> None:
    """The caches have rows of these samples, by this teacher. Raises as opening one, and CacheError."""
    places_in([Cache.open(path, io=run.cache.io) for path in run.cache.path], _planned(found))


def _planned(found: Found) -> Samples:
    """The samples of the plan, in the teacher's tokens."""
    return found.dataset.tables[0] if found.crossing is None else found.crossing.cache.samples


def check_prompts(found: Found, live: LiveSpec) -> None:
    """Every sample must have a prompt, and room for the longest answer. Raises DataError, ConfigError."""
    texts = (found.dataset.tokens(sample) for sample in range(len(found.dataset)))
    lengths = np.array([len(prompt_of(text, found.dataset.names)) for text in texts])
    context = context_of(found.model.config)
    if context is not None and lengths.max() + live.max_new_tokens > context.tokens:
        raise ConfigError(
            f"the longest prompt has {lengths.max():,} tokens and an answer up to {live.max_new_tokens:,}, the student "
            f"reads {context.tokens:,} ({context.field}); lower it, or data.max_length",
            where="live.max_new_tokens",
        )


def fed_by(ring: RingReader, found: Found, training: Training, run: RunFile) -> Found:
    """The same with a teacher at work on what the student writes."""
    (teacher,) = found.dataset.teachers
    rows = RingRows(ring, width=teacher.record.hidden_size, dtype=DTYPES[TAGS[teacher.record.dtype]])
    cached = [Cache.open(path, io=run.cache.io) for path in run.cache.path]
    source = LiveRows(ring, rows, CacheRows(cached), places_in(cached, _planned(found)))
    if run.live.teacher_update_every is None:
        return _answering(found, source, training, run)
    assert run.teacher.path is not None, "the command has asked for it"
    updates = TeacherUpdates(
        run.live,
        ModelFolder(run.teacher.path, TeacherError, run.teacher.trust_remote_code),
        training.output,
        source.update,
        head=teacher.read_head,
        dtype=teacher.record.dtype,
        fsdp=run.train.fsdp,
    )
    renewed = found.dataset.with_teachers([replace(teacher, read_head=updates.read_head)])
    return _answering(replace(found, dataset=renewed), source, training, run, updates)


def _answering(
    found: Found, rows: ToldRows, training: Training, run: RunFile, updates: TeacherUpdates | None = None
) -> Found:
    dataset = OwnAnswers(found.dataset, rows, _retelling(found, run))
    return replace(found, dataset=dataset, own=OnPolicy(run, found, dataset, training.output, updates))


def places_in(caches: Sequence[Cache], table: Samples) -> np.ndarray:
    """int64 [N]: where each sample of a plan is in some caches, one after the other; -1 for nowhere.

    Raises CacheError for a cache of another teacher, and for one that has none of the samples.
    """
    places, first, plan = np.full(table.plan.num_samples, -1, dtype=np.int64), 0, table.plan
    wanted = {identity: number for number, identity in enumerate(table.identities())}
    for cache in caches:
        for part in ("teacher", "tokenizer", "template"):
            if getattr(plan.fingerprint, part) != getattr(cache.plan.fingerprint, part):
                raise CacheError(f"its {part} is not that of --teacher; leave the cache out", where=cache.path)
        cache.require_complete()
        there = [
            (wanted[identity], first + number)
            for number, identity in enumerate(cache.samples.identities())
            if identity in wanted
        ]
        if not there:
            raise CacheError("it has none of these samples; leave it out, or extract them", where=cache.path)
        for number, place in there:
            places[number] = place
        first += len(cache)
    return places
