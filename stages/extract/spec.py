"""Spec: what an extraction is asked to do, as a run file says it."""

from dataclasses import dataclass, field, fields
from pathlib import Path

from kdpipe.manifests.engine import EngineOptions
from kdpipe.manifests.fitted import Choice, choose
from kdpipe.manifests.specs import (
    SHARD_TOKENS,
    DataSpec,
    Device,
    DeviceChoice,
    DtypeChoice,
    RowsChoice,
    RunFile,
)
from kdpipe.stages.extract.reading import Reading
from kdpipe.stages.models.context import Context
from kdpipe.stages.models.device import pick_device
from kdpipe.stages.teacher.describe import TeacherInfo


@dataclass(frozen=True, kw_only=True, slots=True)
class ExtractSpec:
    """What to extract.

    teacher: folder that from_pretrained loads
    data: data files and folders
    engine: "auto", or a name in kdpipe.stages.teacher.ENGINES
    dtype: of the teacher's pass and the rows; "auto" takes the checkpoint's
    rows: "supervised" keeps rows whose next token is a target, "all" keeps every row that has a next token
    codec: how rows are stored; codec_kl, codec_bytes: what that may lose or take, as in CacheSpec
    seed: fixes which rows the gate probes
    shard_tokens: tokens a shard holds at most
    batch_tokens: tokens of a padded teacher batch; 0 runs every sample alone; None: 0 on a CPU, 16384 on a GPU;
        for engines that do not batch by themselves
    options: how the engine is run
    group: number of the Unix group that may read the cache
    grow: add the data to what the cache holds; otherwise the data must have all of that too
    check_inputs: read every file, also those that have not changed since the plan was made from them
    keep_rows: rows go into shards, which must fit the disk; otherwise the plan is for a teacher beside its students
    prompts: a record without an answer is a sample too, one without rows: what a student is to answer
    prepare_workers: processes that tokenise the data; None: as many as it is worth, up to one a core
    """

    teacher: Path
    data: tuple[Path, ...]
    data_spec: DataSpec = field(default_factory=DataSpec)
    engine: str = "auto"
    dtype: DtypeChoice = "auto"
    rows: RowsChoice = "supervised"
    codec: str = "raw"
    codec_kl: float | None = None
    codec_bytes: float | None = None
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
    prompts: bool = False

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
            codec_kl=run.cache.codec_kl,
            codec_bytes=run.cache.codec_bytes,
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
        of_places = {"teacher", "data", "group", "options", "check_inputs", "prepare_workers", "keep_rows"}
        chosen = {entry.name: getattr(self, entry.name) for entry in fields(self) if entry.name not in of_places}
        return chosen | {"data_spec": self.data_spec.model_dump(mode="json", exclude={"subset"})}

    def codec_choice(self) -> Choice:
        """The codec that is asked for. Raises ConfigError for one that is not known, or does not take what is given."""
        return choose(self.codec, self.codec_kl, self.codec_bytes)

    def reading(self, info: TeacherInfo) -> Reading:
        """The data, read for this teacher."""
        longest = info.max_positions
        return Reading(
            data=self.data,
            spec=self.data_spec,
            model=info.folder,
            who="teacher",
            context=None if longest is None else Context(tokens=longest, field="max_position_embeddings", rotary=False),
            workers=self.prepare_workers,
            prompts=self.prompts,
        )

    def resolved_device(self) -> Device:
        """cpu or cuda. Raises ConfigError where cuda is asked for and there is none."""
        return "cuda" if pick_device(self.device).type == "cuda" else "cpu"
