"""Checkpoints: a run's whole state in a folder of its own, whole under its name or not there.

    OUTPUT/checkpoints/000040/{shard-00001-...safetensors of rank 0, ..., checkpoint.json}

Written through torch.distributed.checkpoint as safetensors, each rank its shards; loading reshards, so another number
of ranks may go on. Protocol: files into a folder in .unfinished/, each flushed and its digest taken by the rank that
wrote it; the record, flushed; the folder renamed to its number; its parent flushed. Then all but the newest `keep` are
removed. What others put beside the checkpoints is left alone.
Invariant: what has a number has a record, and every file in the record was on the disk before the number was.
Cost: 12 bytes a parameter for weights and AdamW's moments in fp32, once to disk and once through xxh3 (25 GB/s).
"""

import contextlib
import os
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter

from kdpipe.manifests.durable import canonical, disk_error, fsync_folder
from kdpipe.manifests.errors import CorruptError, KdpipeError, LayoutError
from kdpipe.manifests.failpoints import failpoint
from kdpipe.manifests.progress import Progress
from kdpipe.manifests.provenance import digest_file
from kdpipe.manifests.record import read_record
from kdpipe.manifests.run import CHECKPOINT_FILE, CheckpointRecord, WrittenFile

State = dict[str, torch.Tensor]
CHECKPOINTS = "checkpoints"
UNFINISHED = ".unfinished"
"""Folder for what has no name of its own yet."""


class Checkpoints:
    """The checkpoints of one output folder. Every method but `records` and `path` is collective."""

    def __init__(self, output: Path, keep: int, device: torch.device) -> None:
        self.folder, self._keep, self._device = output / CHECKPOINTS, keep, device
        self._rank, self._world_size = dist.get_rank(), dist.get_world_size()

    def numbers(self) -> list[int]:
        """Steps that have a checkpoint, the newest first, as rank 0 sees them: another may be another NFS client."""
        found = [self._numbers() if self._rank == 0 else []]
        dist.broadcast_object_list(found, src=0)
        return found[0]

    def _numbers(self) -> list[int]:
        return [int(path.name) for path in checkpoint_folders(self.folder.parent)]

    def records(self) -> list[tuple[Path, CheckpointRecord]]:
        """Every checkpoint whose record can be read, whatever run it is of."""
        found = ((path, newest_record(path)) for path in checkpoint_folders(self.folder.parent))
        return [(path, record) for path, record in found if record is not None]

    def path(self, step: int) -> Path:
        return self.folder / f"{step:06d}"

    def save(self, state: State, record: CheckpointRecord) -> None:
        """Write the state after record.step steps; the files of `record` are filled in here."""
        final, scratch = self.path(record.step), self.folder / UNFINISHED / f"{record.step:06d}"
        try:
            if self._rank == 0:
                shutil.rmtree(scratch.parent, ignore_errors=True)
                if record.step in self._numbers():
                    shutil.rmtree(final)  # found damaged at the resume, or it would not be made again
                scratch.mkdir(parents=True)
            dist.barrier()
            with _quiet():
                dcp.save(state, storage_writer=HuggingFaceStorageWriter(str(scratch), save_distributed=True))
            failpoint("checkpoint:written")
            mine = scratch / file_name(self._rank)
            with open(mine, "rb") as file:
                os.fsync(file.fileno())
            told = written(mine)
            (scratch / f"{self._rank}.json").write_text(told.model_dump_json())
            failpoint("checkpoint:digested")
            dist.barrier()
            if self._rank == 0:
                self._publish(scratch, final, record)
            dist.barrier()
        except OSError as err:
            raise disk_error(err, final) from err

    def _publish(self, scratch: Path, final: Path, record: CheckpointRecord) -> None:
        """Rank 0: record, name, and the oldest make room."""
        files = []
        for rank in range(self._world_size):
            told = scratch / f"{rank}.json"
            files.append(WrittenFile.model_validate_json(told.read_bytes()))
            told.unlink()
        whole = record.model_copy(update={"files": tuple(files)})
        with open(scratch / CHECKPOINT_FILE, "xb") as file:
            file.write(canonical(whole.model_dump(mode="json")))
            file.flush()
            os.fsync(file.fileno())
        failpoint("checkpoint:recorded")
        fsync_folder(scratch)
        failpoint("checkpoint:flushed")
        scratch.rename(final)
        failpoint("checkpoint:named")
        fsync_folder(self.folder)
        fsync_folder(self.folder.parent)
        for old in self._numbers()[self._keep :]:
            shutil.rmtree(self.path(old))
        failpoint("checkpoint:pruned")

    def newest(self, progress: Progress) -> CheckpointRecord | None:
        """The record of the newest checkpoint whose files are what it says; those that are not are told of."""
        for step in self.numbers():
            record, problem = self._looked_at(self.path(step))
            if record is not None:
                return record
            progress.note(f"the checkpoint of step {step} is damaged ({problem}); taking the one before")
        return None

    def read(self, path: Path) -> CheckpointRecord:
        """The record of the checkpoint at `path`. Raises CorruptError or LayoutError where it is damaged."""
        record, problem = self._looked_at(path)
        if record is None:
            raise CorruptError(problem or "not a checkpoint", where=path)
        return record

    def _looked_at(self, path: Path) -> tuple[CheckpointRecord | None, str]:
        """The record, or what is wrong. Each rank reads its share of the files; damage found by one counts for all."""
        problem = ""
        try:
            record = read_record(path / CHECKPOINT_FILE, CheckpointRecord)
            if record is None:
                problem = f"{CHECKPOINT_FILE} is missing"
            else:
                for rank, file in list(enumerate(record.files))[self._rank :: self._world_size]:
                    problem = problem or file_difference(path / file_name(rank), file)
        except (LayoutError, OSError) as err:
            record, problem = None, str(err)
        bad = torch.tensor(float(bool(problem)), device=self._device)
        dist.all_reduce(bad)
        if float(bad):
            return None, problem or "found by another rank"
        return record, ""

    def load(self, state: State, path: Path) -> None:
        """Fill the tensors of `state` from the checkpoint at `path`, which was looked at before."""
        try:
            with _quiet():
                dcp.load(state, storage_reader=HuggingFaceStorageReader(str(path)))
        except (dcp.CheckpointException, RuntimeError) as err:
            raise KdpipeError(f"it does not fit this student: {err}", where=path) from err

    def forget(self, *, after: int) -> None:
        """Remove those of later steps, damaged or of a run that is started again: they would count as the newest."""
        if self._rank == 0:
            for step in self._numbers():
                if step > after:
                    shutil.rmtree(self.path(step), ignore_errors=True)
        dist.barrier()

    def remove(self) -> None:
        """All of them: the run is finished."""
        if self._rank == 0:
            remove_checkpoints(self.folder.parent)


def checkpoint_folders(output: Path) -> list[Path]:
    """The checkpoints in an output folder, the newest first; what others put beside them is not ours."""
    found = (path for path in (output / CHECKPOINTS).glob("*") if path.name.isdecimal() and len(path.name) >= 6)
    return sorted(found, key=lambda path: int(path.name), reverse=True)


def remove_checkpoints(output: Path) -> None:
    """All of them, and the folder where nothing else is in it."""
    for path in (*checkpoint_folders(output), output / CHECKPOINTS / UNFINISHED):
        shutil.rmtree(path, ignore_errors=True)
    with contextlib.suppress(OSError):
        (output / CHECKPOINTS).rmdir()


def newest_record(place: Path) -> CheckpointRecord | None:
    """The record of the checkpoint at `place`, or of the newest in an output folder that has a readable one."""
    for path in (place, *checkpoint_folders(place)):
        with contextlib.suppress(KdpipeError, OSError):
            if (record := read_record(path / CHECKPOINT_FILE, CheckpointRecord)) is not None:
                return record
    return None


def file_name(rank: int) -> str:
    """The file a rank writes, by torch.distributed.checkpoint's own rule."""
    return f"shard-{rank + 1:05d}-model-00001-of-00001.safetensors"


def written(path: Path) -> WrittenFile:
    """A file's size and digest."""
    return WrittenFile(num_bytes=path.stat().st_size, digest=digest_file(path))


def file_difference(path: Path, told: WrittenFile) -> str:
    """What is wrong with a file, "" where nothing is."""
    if not path.is_file():
        return f"{path.name} is missing"
    found = written(path)
    if found.num_bytes != told.num_bytes:
        return f"{path.name} has {found.num_bytes:,} bytes, {told.num_bytes:,} were written"
    return "" if found.digest == told.digest else f"{path.name} is not what was written"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """torch.distributed.checkpoint warns of its own internals."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
