"""Planning an extraction: everything that can be decided, checked or refused before the teacher runs.

An existing cache must have been made by the same teacher with the same settings.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from kdpipe.manifests.codec import CODECS, find_codec, num_bytes
from kdpipe.manifests.errors import (
    CacheError,
    ConfigError,
    DataError,
    SpaceError,
    TeacherError,
)
from kdpipe.manifests.made_with import extract_again
from kdpipe.manifests.plan import (
    PLAN_FILE,
    SAMPLES_FILE,
    EngineRecord,
    Fingerprint,
    Plan,
    Settings,
    plan_folder,
)
from kdpipe.manifests.progress import Progress
from kdpipe.manifests.provenance import digest_json
from kdpipe.manifests.sample import KEPT, Incident, Sample, is_heldout, num_rows
from kdpipe.manifests.samples import SamplesWriter
from kdpipe.manifests.shard import NO_DIGEST, commit_path, shard_layout
from kdpipe.manifests.shard_table import SHARDS_FILE, ShardTable, write_shards
from kdpipe.manifests.specs import (
    MAX_SHARD_TOKENS,
    SHARD_TOKENS,
    DataSpec,
    Device,
    DeviceChoice,
    DtypeChoice,
    RowsChoice,
    RunFile,
)
from kdpipe.stages.extract.inputs import Inputs
from kdpipe.stages.extract.present import Present
from kdpipe.stages.models.device import pick_device
from kdpipe.stages.models.folder import ModelFolder
from kdpipe.stages.models.vocabulary import real_vocab_size, vocabulary_digest
from kdpipe.stages.prepare import prepare
from kdpipe.stages.teacher import engine_class, pick_engine
from kdpipe.stages.teacher.describe import TeacherInfo, describe_teacher
from kdpipe.stages.teacher.engine import EngineOptions
from kdpipe.stages.teacher.head import head_record

CUDA_BATCH_TOKENS = 16384
SMALL_FILES = 16 << 20
"""Bytes kept free for tokenizer, plan and logs."""
NAMES, NAME_CHARS = 50, 60
"""Of columns that are not read, as many are named, at such a length."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ExtractSpec:
    """What to extract.

    teacher: folder that from_pretrained loads
    data: data files and folders
    engine: "auto", or a name in kdpipe.stages.teacher.ENGINES
    dtype: of the teacher's pass and the rows; "auto" takes the checkpoint's
    rows: "supervised" keeps rows whose next token is a target, "all" keeps every row that has a next token
    seed: fixes which rows the gate probes
    shard_tokens: tokens a shard holds at most
    batch_tokens: tokens of a padded teacher batch; 0 runs every sample alone; None: 0 on a CPU, 16384 on a GPU;
        for engines that do not batch by themselves
    options: how the engine is run
    group: number of the Unix group that may read the cache
    grow: add the data to what the cache holds; otherwise the data must have all of that too
    check_inputs: read every file, also those that have not changed since the plan was made from them
    keep_rows: rows go into shards, which must fit the disk; otherwise the plan is for a teacher beside its students
    prepare_workers: processes that tokenise the data; None: as many as it is worth, up to one a core
    """

    teacher: Path
    data: tuple[Path, ...]
    data_spec: DataSpec = field(default_factory=DataSpec)
    engine: str = "auto"
    dtype: DtypeChoice = "auto"
    rows: RowsChoice = "supervised"
    codec: str = "raw"
    seed: int = 0
    shard_tokens: int = SHARD_TOKENS
    device: DeviceChoice = "auto"
    batch_tokens: int | None = None
    options: EngineOptions = field(default_factory=EngineOptions)
    group: int | None = None
    grow: bool = False
    check_inputs: bool = False
    prepare_workers: int | None = None
    keep_rows: bool = True

    @classmethod
    def of(
        cls, run: RunFile, *, group: int | None = None, grow: bool = False, check_inputs: bool = False
    ) -> "ExtractSpec":
        """As a run file says it, which must name a teacher."""
        assert run.teacher.path is not None, "the command has asked for it"
        return cls(
            teacher=run.teacher.path,
            data=run.data.paths,
            data_spec=run.samples(),
            engine=run.engine.name,
            dtype=run.teacher.dtype,
            rows=run.cache.rows,
            codec=run.cache.codec,
            seed=run.cache.seed,
            shard_tokens=run.cache.shard_tokens,
            device=run.engine.device,
            batch_tokens=run.engine.batch_tokens,
            options=EngineOptions.of(run),
            group=group,
            grow=grow,
            check_inputs=check_inputs,
            prepare_workers=run.data.workers,
        )

    def choices(self) -> dict[str, object]:
        """All that may decide which samples a cache must hold and is in no file, as JSON values."""
        of_places = {"teacher", "data", "group", "options", "check_inputs", "prepare_workers"}
        chosen = {entry.name: getattr(self, entry.name) for entry in fields(self) if entry.name not in of_places}
        return chosen | {"data_spec": self.data_spec.model_dump(mode="json")}

    def resolved_device(self) -> Device:
        """cpu or cuda. Raises ConfigError where cuda is asked for and there is none."""
        return "cuda" if pick_device(self.device).type == "cuda" else "cpu"


@dataclass(frozen=True, kw_only=True, slots=True)
class Forecast:
    """What an extraction will make, known from data, tokenizer and config alone."""

    num_samples: int
    num_tokens: int
    num_rows: int
    num_heldout: int
    num_shards: int
    hidden_size: int
    vocab_size: int
    dtype: str
    counts: dict[str, int]
    bytes_per_codec: dict[str, int]
    head_bytes: int
    teacher_params: int


def forecast(spec: ExtractSpec, progress: Progress) -> Forecast:
    """Read the data as extract would and say what comes of it. Writes nothing, loads no weights."""
    find_codec(spec.codec, where="--codec")
    folder = ModelFolder(spec.teacher, TeacherError, spec.options.trust)
    info = describe_teacher(folder, spec.dtype)
    tokenizer = teacher_tokenizer(folder, progress)
    incidents: Counter[str] = Counter()
    unread: Counter[str] = Counter()
    num_samples = num_tokens = total_rows = num_heldout = 0
    read = _samples(spec, info, tokenizer, lambda incident: incidents.update([incident.kind]), unread, progress)
    with closing(read):
        for sample in read:
            num_samples += 1
            num_tokens += len(sample.token_ids)
            total_rows += num_rows(sample.supervised, every=spec.rows == "all")
            content_id = np.frombuffer(sample.content_id, np.uint8)[None]
            num_heldout += int(is_heldout(content_id, spec.data_spec.heldout_fraction)[0])
    # Ids and mask lie in samples.arrow and in the shard, 5 bytes a token each.
    overhead = num_tokens * 10
    stored = {
        name: num_bytes(codec, total_rows, info.hidden_size, info.dtype) + overhead for name, codec in CODECS.items()
    }
    return Forecast(
        num_samples=num_samples,
        num_tokens=num_tokens,
        num_rows=total_rows,
        num_heldout=num_heldout,
        num_shards=-(-num_tokens // spec.shard_tokens),
        hidden_size=info.hidden_size,
        vocab_size=real_vocab_size(spec.teacher, tokenizer, info.head_rows),
        dtype=info.dtype,
        counts=_counts(num_samples, incidents, unread),
        bytes_per_codec=stored,
        head_bytes=num_bytes(CODECS["raw"], info.head_rows, info.hidden_size, info.dtype),
        teacher_params=info.num_params,
    )


def teacher_tokenizer(folder: ModelFolder, progress: Progress) -> PreTrainedTokenizerBase:
    """The teacher's tokenizer, with a note of how it was read where that needs one."""
    tokenizer = folder.tokenizer
    for note in folder.notes:
        progress.note(note)
    return tokenizer


def require_same(plan: Plan, existing: Plan, cache: Path) -> None:
    """The cache there must be of the same teacher and settings. Raises CacheError naming the field and both values."""
    wanted, there = (_identity(each) for each in (plan, existing))
    for name, value in wanted.items():
        if there[name] != value:
            changed = name.startswith(("fingerprint.", "head.", "vocabulary_digest"))
            again = "put back the teacher's files as they were" if changed else extract_again(cache)
            raise CacheError(
                f"this cache was made with {name} = {there[name]!r}, this command asks for {value!r}; "
                f"choose another --cache, or {again}",
                where=cache,
            )


def _identity(plan: Plan) -> dict[str, object]:
    """Everything that is one for a whole cache, however often it grew."""
    groups = {group: getattr(plan, group).model_dump() for group in ("settings", "fingerprint", "head", "engine")}
    del groups["fingerprint"]["data"]
    flat = {f"{group}.{name}": value for group, fields in groups.items() for name, value in fields.items()}
    return flat | {"heldout_fraction": plan.heldout_fraction, "vocabulary_digest": plan.vocabulary_digest}


def require_room(plan: Plan, folder: Path, cache: Path) -> None:
    """Room in `folder` for the shards that `cache` lacks, for the head and the tokenizer. Raises SpaceError."""
    missing = [number for number in range(len(plan.shards)) if not commit_path(cache, number).exists()]
    needed = SMALL_FILES + sum(shard_layout(plan, number, NO_DIGEST).num_bytes for number in missing)
    if not (cache / PLAN_FILE).exists():
        needed += num_bytes(CODECS["raw"], plan.head.head_rows, plan.head.hidden_size, plan.head.dtype)
    place = os.statvfs(folder)
    free = place.f_bavail * place.f_frsize
    if needed > free:
        raise SpaceError(
            f"the forecast is {needed:,} bytes, {free:,} are free; choose another disk, or fewer or shorter samples",
            where=cache,
        )


def plan_cache(
    spec: ExtractSpec,
    info: TeacherInfo,
    plan: Plan,
    tokenizer: PreTrainedTokenizerBase,
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
    written = _write_samples(spec, info, tokenizer, folder, progress, plan=plan, present=present)
    plan = plan.changed(
        fingerprint=plan.fingerprint.model_copy(update={"data": written.data_digest}),
        num_samples=int(written.shards.num_samples.sum()),
        num_tokens=int(written.shards.num_tokens.sum()),
        num_rows=int(written.shards.num_rows.sum()),
        counts=written.counts,
        samples_digest=written.samples_digest,
        shards_digest=written.shards_digest,
        num_shards=len(written.shards),
        shards=written.shards,
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
        require_room(plan, folder, cache)
    return plan, True


def plan_without_samples(
    spec: ExtractSpec,
    info: TeacherInfo,
    engine: EngineRecord,
    tokenizer: PreTrainedTokenizerBase,
    inputs: Inputs,
) -> Plan:
    """All of the plan that is decided before any data is read. Raises ConfigError for a codec or size that is none."""
    find_codec(spec.codec, where="--codec")
    if not 1 <= spec.shard_tokens <= MAX_SHARD_TOKENS:
        raise ConfigError(
            f"a shard of {spec.shard_tokens:,} tokens, expected 1 to {MAX_SHARD_TOKENS:,}", where="--shard-tokens"
        )
    head = head_record(info, real_vocab_size(spec.teacher, tokenizer, info.head_rows))
    return Plan(
        fingerprint=Fingerprint(
            teacher=info.folder.digest(inputs.digest),
            tokenizer=digest_json(json.loads(tokenizer.backend_tokenizer.to_str())),
            template=digest_json(tokenizer.chat_template),
            data="",
        ),
        settings=Settings(
            max_length=spec.data_spec.max_length,
            overlong=spec.data_spec.overlong,
            supervise=spec.data_spec.supervise,
            rows=spec.rows,
            codec=spec.codec,
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


@dataclass(frozen=True, kw_only=True, slots=True)
class Written:
    """What samples.arrow and shards.arrow hold, and what became of the records that were read.

    shards: all of the cache, those that were there before too
    """

    shards: ShardTable
    counts: dict[str, int]
    data_digest: str
    samples_digest: str
    shards_digest: str


def _write_samples(
    spec: ExtractSpec,
    info: TeacherInfo,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    progress: Progress,
    *,
    plan: Plan,
    present: Present | None,
) -> Written:
    """Write samples.arrow and shards.arrow, those left out that are present, and runs/prepare.jsonl.

    Raises DataError for a token without a row in the head.
    """
    path = folder / SAMPLES_FILE
    writer = SamplesWriter(
        path,
        shard_tokens=plan.settings.shard_tokens,
        batch_tokens=plan.engine.batch_tokens,
        every_row=spec.rows == "all",
        after=None if present is None else present.samples,
    )
    kept = 0
    incidents: Counter[str] = Counter()
    unread: Counter[str] = Counter()
    with open(folder / "runs" / "prepare.jsonl", "x", encoding="utf-8") as log:

        def record(incident: Incident) -> None:
            incidents[incident.kind] += 1
            log.write(json.dumps(asdict(incident)) + "\n")

        with closing(_samples(spec, info, tokenizer, record, unread, progress)) as samples:
            for sample in samples:
                _check_ids(sample, plan.head.vocab_size, tokenizer)
                kept += 1
                if present is None or not present.take(sample):
                    # The name alone: the same data from another place is the same cache.
                    writer.add(replace(sample, source=os.path.basename(sample.source)))
    brought = writer.close()
    counts = _counts(kept, incidents, unread)
    log_name = _log_name(present, is_new=present is None or len(brought) > 0)
    for kind, count in sorted(incidents.items()):
        what = kind.replace("_", " ")
        progress.note(f"{count} of {counts['read']} samples {what}: see {log_name} in the cache")
    with open(path, "rb") as file:
        samples_digest = hashlib.file_digest(file, "sha256").hexdigest()
    return Written(
        shards=brought if present is None else ShardTable.joined([present.plan.shards, brought]),
        counts=counts,
        data_digest=writer.data_digest(),
        samples_digest=samples_digest,
        shards_digest=write_shards(folder / SHARDS_FILE, brought),
    )


def _check_ids(sample: Sample, vocab_size: int, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises DataError for a token without a row in the head."""
    if (highest := int(sample.token_ids.max())) >= vocab_size:
        raise DataError(
            f"token id {highest} ({tokenizer.convert_ids_to_tokens(highest)}) has no row in the lm_head, which has "
            f"{vocab_size}; is it a token of another modality?",
            where=f"{sample.source}:{sample.line}",
        )


def _log_name(present: Present | None, *, is_new: bool) -> str:
    """Where in the cache the incidents are listed. is_new: the data has samples that are not present"""
    generation = 0 if present is None else present.plan.generation
    if present is not None and is_new:
        return str(plan_folder(Path(), generation + 1) / "runs" / "prepare.jsonl")
    return "runs/prepare.jsonl" + (" and its like in grown/" if generation else "")


def _samples(
    spec: ExtractSpec,
    info: TeacherInfo,
    tokenizer: PreTrainedTokenizerBase,
    record: Callable[[Incident], None],
    unread: Counter[str],
    progress: Progress,
) -> Generator[Sample, None, None]:
    """Every sample of the data, its records counted in `unread` by what they hold that is not read.

    Raises DataError for a sample that is longer than the teacher takes.
    """
    progress.begin("prepare", total=None, unit="samples")
    prepared = prepare(
        spec.data,
        tokenizer,
        spec.data_spec,
        on_incident=record,
        stop_ids=info.folder.stop_ids,
        on_note=progress.note,
        unread=unread,
        workers=spec.prepare_workers,
    )
    with closing(prepared):
        for sample in prepared:
            if info.max_positions is not None and len(sample.token_ids) > info.max_positions:
                raise DataError(
                    f"{len(sample.token_ids)} tokens, the teacher takes {info.max_positions} "
                    f"(max_position_embeddings); --max-length {info.max_positions} cuts such samples, with "
                    "--overlong drop it leaves them out",
                    where=f"{sample.source}:{sample.line}",
                )
            progress.advance(1)
            yield sample
    progress.end()
    if unread:
        listed = ", ".join(f"{name} ({count:,})" for name, count in sorted(_shown(unread).items()))
        progress.note(f"not read, with the number of records that have it: {listed}")


def _counts(num_samples: int, incidents: Counter[str], unread: Counter[str]) -> dict[str, int]:
    dropped = sum(count for kind, count in incidents.items() if kind not in KEPT)
    left = {f"not read: {name}": count for name, count in _shown(unread).items()}
    return {"read": num_samples + dropped, "kept": num_samples, **dict(sorted(incidents.items())), **left}


def _shown(unread: Counter[str]) -> dict[str, int]:
    """The names as a log can take them, the first of a great many: a data file may name its columns as it likes."""
    shown: Counter[str] = Counter()
    for number, (name, count) in enumerate(sorted(unread.items())):
        safe = "".join(char if char.isprintable() else ascii(char)[1:-1] for char in name[:NAME_CHARS])
        shown[safe if number < NAMES else "further columns"] += count
    return dict(shown)
