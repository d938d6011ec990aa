"""Inputs: the files an extraction reads, remembered beside its plan, so that unchanged ones are not read again.

runs/inputs.json beside PLAN.json has the digest of every file that the plan was made from, and one digest over all that
decides which samples come of them. Where that is the same again, the plan's samples are what reading the data would
give, and neither is the data tokenised nor are the weights read: for another --part, for a cache that is finished.
Invariant: a changed file is found. Its content is read unless size, inode, time of change and time of modification are
what they were when it was last read, and that was a moment after its change at least: the kernel sets the time of
change itself, so what is written later has a later one. Nothing here is part of a plan or a fingerprint.
Cost: opening every file once; reading what is not known at the speed of its disk.
"""

import contextlib
import os
import stat
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import transformers

from kdpipe.manifests import durable
from kdpipe.manifests.durable import canonical, open_regular, scratch_name
from kdpipe.manifests.errors import LayoutError
from kdpipe.manifests.made_with import RUNS
from kdpipe.manifests.provenance import digest_json, digest_stream
from kdpipe.manifests.record import Record, read_record
from kdpipe.stages.prepare.files import list_files

INPUTS_FILE = "inputs.json"
WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack"}


class SeenFile(Record):
    """A file as it was when its content was last read."""

    path: str
    num_bytes: int
    inode: int
    changed_ns: int
    modified_ns: int
    digest: str
    """xxh3-128"""


class Remembered(Record):
    """runs/inputs.json"""

    asked: str
    """sha256 over the digests of all data files and of all that decides which samples come of them."""
    files: tuple[SeenFile, ...]


class Inputs:
    """The files of one extraction; each is read once at most."""

    def __init__(self, remembered: Remembered | None = None) -> None:
        self._known = {} if remembered is None else {seen.path: seen for seen in remembered.files}
        self._asked = None if remembered is None else remembered.asked
        self._seen: dict[str, tuple[SeenFile, bool]] = {}

    @classmethod
    def of(cls, folder: Path) -> "Inputs":
        """What is remembered in a plan's folder; nothing where it is missing or cannot be read."""
        try:
            return cls(read_record(folder / RUNS / INPUTS_FILE, Remembered))
        except (OSError, LayoutError):
            return cls()

    def digest(self, path: Path) -> str:
        """xxh3-128 of a file's bytes, read where it may have changed."""
        name = str(path.resolve())
        if name not in self._seen:
            # Opened, not only asked about: a network file system then looks at the server.
            with open(path, "rb") as file:
                now, before = time.time_ns(), os.fstat(file.fileno())
                known = self._known.get(name)
                if known is not None and known == _seen(name, before, known.digest):
                    self._seen[name] = (known, True)
                else:
                    found = _seen(name, before, digest_stream(file))
                    is_old = now - before.st_ctime_ns > durable.MOMENT_S * 1e9
                    self._seen[name] = (found, is_old and stat.S_ISREG(before.st_mode))
        return self._seen[name][0].digest

    def asked(self, model: Path, data: Sequence[Path], choices: Mapping[str, object]) -> str:
        """The digest of all that decides which samples there are.

        model: whose tokenizer makes them; choices: all of it that is in no file
        """
        return digest_json(
            {
                "data": [[path.suffix.lower(), self.digest(path)] for path in list_files(data)],
                "teacher": {path.name: self.digest(path) for path in _small_files(model)},
                "choices": choices,
                "versions": [_own_version(), transformers.__version__],
            }
        )

    def were_asked(self, asked: str) -> bool:
        """Whether the plan was made from just these."""
        return asked == self._asked

    def remember(self, folder: Path, asked: str) -> None:
        """Write what is known to folder/runs, where no file changed since it was read; without an error where not."""
        if not all(_unchanged(seen) for seen, _ in self._seen.values()):
            return
        files = tuple(seen for seen, is_old in self._seen.values() if is_old)
        data = canonical(Remembered(asked=asked, files=files).model_dump())
        scratch = scratch_name(folder / RUNS, INPUTS_FILE)
        with contextlib.suppress(OSError):
            try:
                scratch.write_bytes(data)
                scratch.replace(folder / RUNS / INPUTS_FILE)
            finally:
                scratch.unlink(missing_ok=True)


def _seen(name: str, status: os.stat_result, digest: str) -> SeenFile:
    return SeenFile(
        path=name,
        num_bytes=status.st_size,
        inode=status.st_ino,
        changed_ns=status.st_ctime_ns,
        modified_ns=status.st_mtime_ns,
        digest=digest,
    )


def _unchanged(seen: SeenFile) -> bool:
    try:
        descriptor = open_regular(Path(seen.path))
    except (OSError, LayoutError):
        return False
    try:
        return seen == _seen(seen.path, os.fstat(descriptor), seen.digest)
    finally:
        os.close(descriptor)


def _small_files(folder: Path) -> list[Path]:
    """Config, tokenizer, templates, code: all that may decide how a text becomes tokens."""
    places = [*folder.iterdir(), *folder.glob("additional_chat_templates/*")]
    return sorted(path for path in places if path.is_file() and path.suffix not in WEIGHTS)


def _own_version() -> str:
    try:
        return version("kdpipe")
    except PackageNotFoundError:
        return "unknown"
