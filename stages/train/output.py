"""Output: the folder a run writes to, and what is in it: a finished student, one that is exported, checkpoints.

    .unfinished/ (files, kdpipe.json last) --move_in--> OUTPUT/{weights ..., kdpipe.json}

Invariant: what another run left in it is neither finished, removed nor gone on from. A folder with kdpipe.json holds a
whole student; the last evaluation only adds figures to it.
"""

import os
import shutil
from contextlib import suppress
from pathlib import Path

from kdpipe.manifests.aligned import ALIGNED
from kdpipe.manifests.durable import canonical, disk_error, fsync_folder, fsync_tree, usual_modes, write_once
from kdpipe.manifests.errors import ConfigError, CorruptError
from kdpipe.manifests.failpoints import failpoint
from kdpipe.manifests.places import require_outside
from kdpipe.manifests.run import (
    ELASTIC,
    EVENTS,
    LOG,
    ROLLOUTS,
    RUN_FILE,
    TEACHERS,
    TENSORBOARD,
    WANDB,
    CheckpointRecord,
    RunInputs,
    RunRecord,
    read_run,
)
from kdpipe.manifests.running import RUNNING_FILE
from kdpipe.stages.train.checkpoint import (
    CHECKPOINTS,
    UNFINISHED,
    file_difference,
    newest_record,
    remove_checkpoints,
    written,
)

INCIDENTS = "prepare.jsonl"
"""What of the data was cut or left out, where the run has prepared them itself."""
REPORT = "report.html"
SUBMITTED = "submit"
"""Folder of what was sent to a cluster for it."""
FILES = {EVENTS, INCIDENTS, RUNNING_FILE, LOG, REPORT}
FOLDERS = {ALIGNED, UNFINISHED, CHECKPOINTS, TEACHERS, SUBMITTED, TENSORBOARD, WANDB}
"""What an interrupted run leaves in its output."""


class Output:
    """An output folder, which may not be there yet."""

    def __init__(self, path: Path) -> None:
        self.path, self.scratch = path, path / UNFINISHED

    def began_with(self, resume: str) -> tuple[str, ...] | None:
        """Fingerprints of the caches that the run in it began with; None where no run is there to go on.

        resume: as in Training
        """
        record: RunRecord | CheckpointRecord | None = read_run(self.path) or read_run(self.scratch)
        if record is None and resume != "never":
            record = newest_record(self.path if resume == "auto" else Path(resume))
        return None if record is None else record.inputs.caches

    def goes_on(self) -> RunInputs | None:
        """Those of the run in it that is not finished and has something to go on from; None where there is none."""
        record = read_run(self.path) or read_run(self.scratch)
        if record is not None:
            return record.inputs if record.metrics is None else None
        checkpoint = newest_record(self.path)
        return None if checkpoint is None else checkpoint.inputs

    def finished(self, inputs: RunInputs) -> RunRecord | None:
        """The record of the run with these inputs, if its student is there. Raises ConfigError for another run's."""
        record = read_run(self.path)
        if record is None:
            return None
        if difference := inputs.difference(record.inputs, but=ELASTIC):
            raise ConfigError(
                f"it holds the student of another run: {difference}; choose another --output or remove the folder",
                where=self.path,
            )
        for name, recorded in record.files.items():
            if problem := file_difference(self.path / name, recorded):
                raise CorruptError(f"{problem}; remove this folder and run the same command again", where=self.path)
        return record

    def settle(self, inputs: RunInputs) -> None:
        """Finish what a kill interrupted after this very run's student was exported; another's is left alone."""
        exported = read_run(self.scratch)
        if exported is not None and not inputs.difference(exported.inputs, but=ELASTIC):
            self._move_in()
        moved = read_run(self.path)
        if moved is not None and not inputs.difference(moved.inputs, but=ELASTIC):
            remove_checkpoints(self.path)
            if moved.metrics is not None:
                self.remove_teachers()

    def require_free(self) -> Path:
        """The folder is free, or holds no more than an interrupted run leaves; the nearest folder above that exists.

        Raises ConfigError.
        """
        there = self.path.absolute()
        while not os.path.lexists(there):
            there = there.parent
        if not there.is_dir():
            raise ConfigError("this is not a folder; choose another --output", where=there)
        if there != self.path.absolute() or not any(self.path.iterdir()):
            require_outside(self.path, option="--output")
        for path in sorted(self.path.glob("*")):
            is_file = path.name in FILES or path.match(ROLLOUTS)
            ours = path.is_file() if is_file else path.name in FOLDERS and path.is_dir()
            if not ours or path.is_symlink():
                raise ConfigError(f"it holds other things ({path.name}); choose another --output", where=self.path)
        return there

    def list_incidents(self, path: Path) -> None:
        """Keep the list at `path` of what was cut or left out of the data; none where there was nothing."""
        try:
            (self.path / INCIDENTS).unlink(missing_ok=True)
            if path.stat().st_size:
                shutil.copyfile(path, self.path / INCIDENTS)
        except OSError as err:
            raise disk_error(err, self.path) from err

    def make_scratch(self) -> None:
        """An empty folder for what is not finished. Raises OSError."""
        shutil.rmtree(self.scratch, ignore_errors=True)
        self.scratch.mkdir(parents=True)

    def seal(self, record: RunRecord) -> RunRecord:
        """Flush the files in scratch and publish them; the record, which names them now."""
        usual_modes(self.scratch)
        fsync_tree(self.scratch)
        files = {
            path.relative_to(self.scratch).as_posix(): written(path)
            for path in self.scratch.rglob("*")
            if path.is_file()
        }
        record = record.model_copy(update={"files": files})
        self.publish(record)
        return record

    def publish(self, record: RunRecord) -> None:
        """Write the record beside the files in scratch, then give all of them their place, the record last."""
        write_once(self.scratch / RUN_FILE, canonical(record.model_dump(mode="json")), scratch_folder=self.scratch)
        failpoint("export:written")
        self._move_in()

    def update(self, record: RunRecord) -> None:
        """Replace the record of the finished student."""
        try:
            self.make_scratch()
        except OSError as err:
            raise disk_error(err, self.scratch) from err
        self.publish(record)

    def remove_teachers(self) -> None:
        """Those that the run made of its student: it is measured."""
        shutil.rmtree(self.path / TEACHERS, ignore_errors=True)

    def _move_in(self) -> None:
        """Move finished files to their place, the record last; the ranks of a launch may all do it at once."""
        try:
            for path in sorted(self.scratch.iterdir(), key=lambda path: path.name == RUN_FILE):
                with suppress(FileNotFoundError):  # another rank was first
                    path.replace(self.path / path.name)
                failpoint("export:moved")
            with suppress(FileNotFoundError):
                self.scratch.rmdir()
            fsync_folder(self.path)
        except OSError as err:
            raise disk_error(err, self.path) from err
