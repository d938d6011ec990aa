"""Teacher updates: a teacher that is made anew of its student while it trains, as a copy of it or a moving average.

    before step s, a multiple of live.teacher_update_every:
        ema * teacher + (1 - ema) * student -> OUTPUT/teachers/00000s -> the teacher's process -> its head, here

A teacher's version is the number of steps that had been made when it was taken; 0 is the teacher in its own folder.
Which version a step has is a function of the step, so a run that goes on needs the folders alone.
Invariants: a folder with a number is whole and on the disk; rows and head of a step are one teacher's on every rank.
Precision: averages are taken and kept in float32 whatever the teacher computes in. In bfloat16, with steps of 2^-8 of a
value, an average with ema 0.999 would hardly move.
Cost of an update: the student gathered on rank 0's host, written, read by the teacher's process: 4 bytes a parameter.
An average takes 4 bytes a parameter more, over the ranks; the disk holds this version and those of kept checkpoints.
"""

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from kdpipe.manifests.cache import HeadArrays
from kdpipe.manifests.durable import canonical, disk_error, fsync_folder, fsync_tree
from kdpipe.manifests.errors import ConfigError, CorruptError
from kdpipe.manifests.failpoints import failpoint
from kdpipe.manifests.run import TEACHERS
from kdpipe.manifests.specs import Dtype, FsdpSpec, LiveSpec
from kdpipe.stages.models.adapter import is_adapted
from kdpipe.stages.models.folder import ModelFolder
from kdpipe.stages.ranks import Ranks
from kdpipe.stages.rows import as_array
from kdpipe.stages.student import Student, load_sharded
from kdpipe.stages.student.export import Companions, export
from kdpipe.stages.student.lora import merged_weights
from kdpipe.stages.student.sharding import own_part
from kdpipe.stages.teacher.describe import describe_teacher
from kdpipe.stages.teacher.head import read_head
from kdpipe.stages.train.checkpoint import UNFINISHED, checkpoint_folders

RECORD = "teacher.json"
"""Beside the weights: the digest of the folder as it was written."""
FREE = {"_name_or_path", "transformers_version", "dtype", "use_cache", "initializer_range"}
"""Of a config: what may differ between two models whose weights are averaged, beside the ids of special tokens."""

Take = Callable[[Path], str]
"""Has the teacher's process take the teacher in a folder; the digest of what it opened."""


class TeacherUpdates:
    """The versions of a run's teacher, on one rank.

    start: version 0
    head: reads its lm_head; dtype: of rows and head of every version
    fsdp: how the student lies over the ranks
    """

    def __init__(
        self,
        live: LiveSpec,
        start: ModelFolder,
        output: Path,
        take: Take,
        *,
        head: Callable[[], HeadArrays],
        dtype: Dtype,
        fsdp: FsdpSpec,
    ) -> None:
        assert live.teacher_update_every is not None
        self._every, self._ema = live.teacher_update_every, live.ema
        self._start, self._output, self._take, self._head, self._dtype = start, output, take, head, dtype
        self._fsdp = fsdp
        self._average: Student | None = None
        self.version = 0

    def before(self, step: int, student: Student, ranks: Ranks) -> dict[str, float]:
        """Make the teacher of a step, where it is due; figures for the step's event. Collective.

        Raises SpaceError and other errors of the disk, CorruptError, and those of the teacher's process.
        """
        wanted = self.version_of(step)
        if wanted == self.version:
            return {"teacher/version": wanted}
        started = time.perf_counter()
        if wanted == step:
            self._make(step, student, ranks)
        self.take(wanted, ranks)
        return {"teacher/version": wanted, "update/seconds": time.perf_counter() - started}

    def version_of(self, step: int) -> int:
        """Of the teacher of a step, counted from 0."""
        return step // self._every * self._every

    def take(self, version: int, ranks: Ranks) -> None:
        """Have the teacher's process take a version that is there. Collective: no rank asks for rows before it has."""
        if version == self.version:
            return
        self._require_whole(version, ranks, self._take)
        self.version = version
        failpoint("update:taken")
        if ranks.rank == 0:
            self._forget()

    def end(self, num_steps: int, ranks: Ranks) -> None:
        """The teacher is the one that the last of some steps had, and no further one is made. Collective."""
        self._average = None
        self.take(self.version_of(num_steps - 1), ranks)

    def read_head(self) -> HeadArrays:
        """The lm_head of the teacher as it is. Raises as reading a folder does."""
        if not self.version:
            return self._head()
        head = read_head(describe_teacher(self._folder(self.version), self._dtype))
        return HeadArrays(weight=as_array(head.weight), bias=None if head.bias is None else as_array(head.bias))

    def _make(self, step: int, student: Student, ranks: Ranks) -> None:
        """Write the version of a step. Collective."""
        source = self._averaged(step, student, ranks) if self._ema else student
        model = self._start
        beside = Companions(
            files={name: model.file(name).read_bytes() for name in model.tokenizer_files},
            stop_ids=(),
            dtype=torch.float32,
            code=model.code,
        )
        scratch = self._output / TEACHERS / UNFINISHED

        def write() -> None:
            try:
                if ranks.rank == 0:
                    shutil.rmtree(scratch, ignore_errors=True)
                    scratch.mkdir(parents=True)
                export(source, beside, scratch, rank=ranks.rank)
                if ranks.rank == 0:
                    self._publish(scratch, step)
            except OSError as err:
                raise disk_error(err, scratch.parent) from err

        ranks.together(write)

    def _averaged(self, step: int, student: Student, ranks: Ranks) -> Student:
        """The average with the student as it is in it, each rank's part of it. Collective."""
        if self._average is None:
            before = self._folder(version := self.version_of(step - 1))
            if version:
                self._require_whole(version, ranks, lambda _: before.digest())
            self._average = load_sharded(
                before, ranks, stored=torch.float32, computed=torch.float32, fsdp=self._fsdp
            ).requires_grad_(False)
        if isinstance(student, FSDPModule):
            student.reshard()  # after an evaluation the root's parameters are whole
        averages = dict(self._average.model.named_parameters())
        if is_adapted(student.model):
            weights = (
                (name, own_part(whole, averages[name])) for name, whole in merged_weights(student.model, keep=True)
            )
        else:
            weights = ((name, _part(weight)) for name, weight in student.model.named_parameters())
        for name, weight in weights:
            _part(averages[name]).mul_(self._ema).add_(weight, alpha=1.0 - self._ema)
        return self._average

    def _publish(self, scratch: Path, version: int) -> None:
        """Rank 0: the record, and the number. Failpoints: update:written, update:flushed, update:named."""
        final = self._path(version)
        (scratch / RECORD).write_bytes(canonical({"digest": self._start.at(scratch).digest()}))
        failpoint("update:written")
        fsync_tree(scratch)
        failpoint("update:flushed")
        if final.exists():
            shutil.rmtree(final)  # of the run before it was interrupted
        scratch.rename(final)
        failpoint("update:named")
        fsync_folder(final.parent)
        fsync_folder(self._output)

    def _forget(self) -> None:
        """Remove all versions but this one and those that a run that goes on from a checkpoint begins with."""
        needed = {self.version_of(int(path.name) - 1) for path in checkpoint_folders(self._output)}
        names = {self._path(version).name for version in (self.version, *needed)}
        for path in (self._output / TEACHERS).iterdir():
            if path.name not in names:
                shutil.rmtree(path, ignore_errors=True)

    def _path(self, version: int) -> Path:
        return self._output / TEACHERS / f"{version:06d}"

    def _folder(self, version: int) -> ModelFolder:
        return self._start.at(self._path(version)) if version else self._start

    def _require_whole(self, version: int, ranks: Ranks, digest_of: Take) -> None:
        """What is read of a version is what was written. Collective; rank 0 looks. Raises CorruptError."""

        def look() -> None:
            folder = self._folder(version)
            written = folder.read_json(RECORD).get("digest")
            if not written or digest_of(folder.path) != written:
                raise CorruptError(
                    f"the teacher of step {version + 1} is {'not what was written' if written else 'missing'}; put it "
                    "back from a copy, or start again with --resume never",
                    where=folder.path,
                )

        ranks.together(look if ranks.rank == 0 else lambda: None)


def _part(parameter: torch.Tensor) -> torch.Tensor:
    """This rank's part of it, without gradient."""
    found = parameter.detach()
    return found.to_local() if isinstance(found, DTensor) else found


def require_same_model(student: ModelFolder, teacher: ModelFolder) -> None:
    """A teacher that is made anew of its student is the same model as it, but for its weights. Raises ConfigError."""
    ours, theirs = (_made_of(folder.config) for folder in (student, teacher))
    for key in sorted(ours.keys() | theirs.keys()):
        if ours.get(key) != theirs.get(key):
            raise ConfigError(
                f"{teacher.path} is made anew of the student, which must have its architecture and sizes: its {key} is "
                f"{json.dumps(theirs.get(key), default=str)}, the student's is {json.dumps(ours.get(key), default=str)}"
                "; leave the key out, or take --teacher student",
                where="live.teacher_update_every",
            )


def _made_of(config: Any) -> dict[str, Any]:
    """What of a config decides a model's weights and what it computes of them."""
    found: dict[str, Any] = config.to_dict()
    return {key: value for key, value in found.items() if key not in FREE and not key.endswith("_token_id")}
