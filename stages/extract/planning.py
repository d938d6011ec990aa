"""Planning an extraction: everything that can be decided, checked or refused before the teacher runs.

An existing cache must have been made by the same teacher with the same settings.
"""

import os
import shlex
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from kdpipe.manifests.codec import RAW, num_bytes
from kdpipe.manifests.errors import (
    CacheError,
    ConfigError,
    SpaceError,
)
from kdpipe.manifests.fitted import Choice, file_bytes
from kdpipe.manifests.made_with import extract_again
from kdpipe.manifests.plan import (
    PLAN_FILE,
    EngineRecord,
    Fingerprint,
    Plan,
    Settings,
    plan_folder,
)
from kdpipe.manifests.progress import Progress
from kdpipe.manifests.provenance import digest_json
from kdpipe.manifests.shard import commit_path, expected_bytes
from kdpipe.manifests.specs import MAX_SHARD_TOKENS
from kdpipe.manifests.specs.teacher import CUDA_BATCH_TOKENS
from kdpipe.manifests.tensorfile import DTYPES, TAGS
from kdpipe.stages.codec.fit import require_fittable
from kdpipe.stages.extract.inputs import Inputs
from kdpipe.stages.extract.present import Present
from kdpipe.stages.extract.reading import INCIDENTS, incident_notes, write_samples
from kdpipe.stages.extract.spec import ExtractSpec
from kdpipe.stages.models.vocabulary import real_vocab_size, tokenizer_digest, vocabulary_digest
from kdpipe.stages.teacher import engine_class, pick_engine
from kdpipe.stages.teacher.describe import TeacherInfo
from kdpipe.stages.teacher.head import head_record

SAMPLES = "fewer or shorter samples"
SMALL_FILES = 16 << 20
"""Bytes kept free for tokenizer, plan and logs."""


def require_same(plan: Plan, existing: Plan, cache: Path) -> None:
    """The cache there must be of the same teacher and settings. Raises CacheError naming the field and both values."""
    if (sidecar := existing.head.sidecar) is not None:
        raise CacheError(f"it has {sidecar.has}, no teacher adds to that; choose another --cache", where=cache)
    wanted, there = (_identity(each) for each in (plan, existing))
    other = [name for name, value in wanted.items() if there[name] != value]
    for name in other:
        if other == ["settings.codec"]:
            way_out = _way_to_codec(plan, existing, cache)
        elif name.startswith(("fingerprint.", "head.", "vocabulary_digest")):
            way_out = "choose another --cache, or put back the teacher's files as they were"
        else:
            way_out = f"choose another --cache, or {extract_again(cache)}"
        raise CacheError(
            f"this cache was made with {name} = {there[name]!r}, this command asks for {wanted[name]!r}; {way_out}",
            where=cache,
        )


def _way_to_codec(plan: Plan, existing: Plan, cache: Path) -> str:
    """What to do where the cache differs in its codec alone."""
    wanted, there = (Choice.read(each.settings.codec) for each in (plan, existing))
    if there.name == "raw" and wanted.is_fitted:
        return (
            "choose another --cache, or code the rows that are there, without the teacher: kdpipe cache convert "
            f"{shlex.quote(str(cache))} OUT {wanted.flags}"
        )
    return f"choose another --cache, or give {there.flags}"


def _identity(plan: Plan) -> dict[str, object]:
    """Everything that is one for a whole cache, however often it grew."""
    groups = {group: getattr(plan, group).model_dump() for group in ("settings", "fingerprint", "head", "engine")}
    del groups["fingerprint"]["data"]
    flat = {f"{group}.{name}": value for group, fields in groups.items() for name, value in fields.items()}
    return flat | {"heldout_fraction": plan.heldout_fraction, "vocabulary_digest": plan.vocabulary_digest}


def require_room(plan: Plan, folder: Path, cache: Path, *, where: Path | None = None, or_else: str = SAMPLES) -> None:
    """Room in `folder` for the shards that `cache` lacks, for head, codec and tokenizer. Raises SpaceError.

    where, or_else: what an error names, and what takes less room, beside another disk
    """
    missing = [number for number in range(len(plan.shards)) if not commit_path(cache, number).exists()]
    needed = SMALL_FILES + sum(expected_bytes(cache, plan, number) for number in missing)
    if not (cache / PLAN_FILE).exists():
        needed += num_bytes(RAW, plan.head.head_rows, plan.head.hidden_size, plan.head.dtype)
        needed += file_bytes(Choice.read(plan.settings.codec), plan.head.hidden_size)
    place = os.statvfs(folder)
    free = place.f_bavail * place.f_frsize
    if needed > free:
        raise SpaceError(
            f"the forecast is {needed:,} bytes, {free:,} are free; choose another disk, or {or_else}",
            where=where or cache,
        )


def plan_cache(
    spec: ExtractSpec,
    info: TeacherInfo,
    plan: Plan,
    folder: Path,
    progress: Progress,
    *,
    cache: Path,
) -> tuple[Plan, bool]:
    """The plan, and whether it is new: that of the cache itself where it holds every sample.

    plan: all of it that is decided before any data is read. The samples that are new are in `folder`. The teacher's
    files are known where there is a cache; otherwise none are. Raises CacheError where it has other samples.
    """
    present = Present(cache) if (cache / PLAN_FILE).exists() else None
    (folder / "runs").mkdir()
    written = write_samples(
        spec.reading(info),
        folder,
        progress,
        vocab_size=plan.head.vocab_size,
        shard_tokens=plan.settings.shard_tokens,
        batch_tokens=plan.engine.batch_tokens,
        every_row=spec.rows == "all",
        present=present,
    )
    is_new = present is None or len(written.shards) > len(present.plan.shards)
    for note in incident_notes(written.counts, f"{_log_name(present, is_new=is_new)} in the cache"):
        progress.note(note)
    plan = plan.changed(
        **written.fields(),
        fingerprint=plan.fingerprint.model_copy(update={"data": written.data_digest}),
        teacher_files={} if present is None else present.plan.teacher_files,
        grown_from=() if present is None else present.ancestors(),
    )
    if present is not None:
        if not spec.grow:
            present.require_all(cache)
        present.report(plan, progress)
        if plan.num_samples == present.plan.num_samples:
            if spec.keep_rows:
                require_room(present.plan, folder, cache)
            return present.plan, False
    if spec.keep_rows:
        if present is None and spec.codec_choice().is_fitted:
            require_fittable(plan.num_rows, plan.head.hidden_size, DTYPES[TAGS[plan.settings.dtype]])
        require_room(plan, folder, cache)
    return plan, True


def _log_name(present: Present | None, *, is_new: bool) -> str:
    """Where in the cache the incidents are listed. is_new: the data has samples that are not present"""
    generation = 0 if present is None else present.plan.generation
    if present is not None and is_new:
        return str(plan_folder(Path(), generation + 1) / INCIDENTS)
    return str(INCIDENTS) + (" and its like in grown/" if generation else "")


def plan_without_samples(
    spec: ExtractSpec,
    info: TeacherInfo,
    engine: EngineRecord,
    tokenizer: PreTrainedTokenizerBase,
    inputs: Inputs,
) -> Plan:
    """All of the plan that is decided before any data is read. Raises ConfigError for a codec or size that is none."""
    codec = spec.codec_choice()
    if not 1 <= spec.shard_tokens <= MAX_SHARD_TOKENS:
        raise ConfigError(
            f"a shard of {spec.shard_tokens:,} tokens, expected 1 to {MAX_SHARD_TOKENS:,}", where="--shard-tokens"
        )
    head = head_record(info, real_vocab_size(spec.teacher, tokenizer, info.head_rows))
    return Plan(
        fingerprint=Fingerprint(
            teacher=info.folder.digest(inputs.digest),
            tokenizer=tokenizer_digest(tokenizer),
            template=digest_json(tokenizer.chat_template),
            data="",
        ),
        settings=Settings(
            max_length=spec.data_spec.max_length,
            overlong=spec.data_spec.overlong,
            supervise=spec.data_spec.supervise,
            rows=spec.rows,
            codec=str(codec),
            dtype=head.dtype,
            seed=spec.seed,
            shard_tokens=spec.shard_tokens,
        ),
        engine=engine,
        head=head,
        num_samples=0,
        num_tokens=0,
        num_rows=0,
        heldout_fraction=spec.data_spec.heldout_fraction,
        counts={},
        samples_digest="",
        shards_digest="",
        num_shards=0,
        vocabulary_digest=vocabulary_digest(tokenizer),
        teacher_files={},
        grown_from=(),
    )


def engine_record(spec: ExtractSpec, info: TeacherInfo, progress: Progress) -> EngineRecord:
    """How the teacher will be run. Raises ConfigError for an engine or options that cannot be."""
    device = spec.resolved_device()
    choice = pick_engine(spec.engine, architecture=info.architecture, device=device)
    if spec.engine == "auto":
        progress.note(f"engine {choice.name}: {choice.reason}")
    kind = engine_class(choice.name)
    batch_tokens = spec.batch_tokens
    if kind.batches_itself:
        if batch_tokens:
            raise ConfigError(
                f"{choice.name} batches by itself; give its own limits with --engine-arg", where="--batch-tokens"
            )
        batch_tokens = 0
    elif batch_tokens is None:
        batch_tokens = CUDA_BATCH_TOKENS if device == "cuda" else 0
    return EngineRecord(
        name=choice.name,
        version=kind.version(),
        determinism=kind.determinism(device, spec.options),
        device=device,
        batch_tokens=batch_tokens,
        arguments=spec.options.identity(),
    )
