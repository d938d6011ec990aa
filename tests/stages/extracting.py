"""What a process of a durability test does: functions of a module, so that spawned processes find them."""

import contextlib
import ctypes
import dataclasses
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.chats import write_chats
from tests.models import make_model, make_tokenizer

from kdpipe.manifests import claims, durable, failpoints
from kdpipe.manifests.cache import Cache
from kdpipe.manifests.errors import KdpipeError
from kdpipe.manifests.fitted import Choice
from kdpipe.manifests.progress import Progress, Silent
from kdpipe.manifests.specs import DataSpec
from kdpipe.stages.extract import ExtractSpec, extract, planning, shards
from kdpipe.stages.extract.convert import convert

SHARD_TOKENS = 150
FISHER = Choice("fisher", kl=0.05)


def small_spec(folder: Path) -> ExtractSpec:
    """Twelve chats and a teacher in `folder`, made where they are not there: five shards or so."""
    teacher, data = folder / "teacher", folder / "data.jsonl"
    if not data.exists():
        make_tokenizer(make_model("qwen3", teacher, vocab_size=304))
        write_chats(data, 12, longest=60)
    return ExtractSpec(
        teacher=teacher, data=(data,), data_spec=DataSpec(max_length=200), device="cpu", shard_tokens=SHARD_TOKENS
    )


def extract_small(
    spec: ExtractSpec,
    cache: Path,
    kill: str = "",
    part: tuple[int, int] | None = None,
    moment: float = 0.0,
    claim: float = 600.0,
    told: Path | None = None,
    progress: Progress | None = None,
) -> None:
    """Extract; die at the failpoint. What kills left is swept when `moment` seconds old.

    claim: seconds a claim lives; told: gets a line for every shard this process committed
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(durable, "MOMENT_S", moment)
        patch.setattr(claims, "CLAIM_S", claim)
        patch.setattr(shards, "WAIT_S", 0.05)
        torch.set_num_threads(1)
        failpoints.arm(kill)
        extract(spec, cache, progress or Committed(told), part=part)


def coded_spec(spec: ExtractSpec) -> ExtractSpec:
    """The same with a codec, which is fitted before the first shard."""
    return dataclasses.replace(spec, codec=FISHER.name, codec_kl=FISHER.kl)


def convert_small(source: Path, cache: Path, kill: str = "", progress: Progress | None = None) -> None:
    """Convert what was extracted to what extracting with the codec makes; die at the failpoint."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(durable, "MOMENT_S", 0.0)
        torch.set_num_threads(1)
        failpoints.arm(kill)
        convert(Cache.open(source), cache, FISHER, progress or Silent())


def require_exceptions(cache: Path) -> None:
    """A coded cache is only a case of its own where rows of several shards have exceptions."""
    opened = Cache.open(cache)
    tensors = [opened.shard(number).layout.tensors for number in opened.committed()]
    assert sum(each["exception_places"].shape[0] > 0 for each in tensors) > 2


class Committed(Silent):
    """Writes down which shards were committed."""

    def __init__(self, told: Path | None) -> None:
        self._told = told

    def event(self, kind: str, **fields: object) -> None:
        if kind == "shard" and self._told is not None:
            with open(self._told, "a") as file:
                file.write(f"{fields['shard']}\n")


def files(folder: Path, *, but: Callable[[Path], bool] = lambda path: False) -> dict[str, bytes]:
    """Everything a cache is made of, without the logs of runs."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.parent.name != "runs" and not but(path)
    }


def committed_are_whole(cache: Path) -> int:
    """Check every committed shard of a cache, complete or not; how many there are."""
    opened = Cache.open(cache)
    for number in opened.committed():
        opened.shard(number).verify(opened.samples.shard(number))
    return len(opened.committed())


def work_failing(work: Callable[[Any, Path], None], of: object, cache: Path, nth: int, number: int, told: Path) -> None:
    """work(of, cache) while the n-th system call on the cache's folder fails with this errno, 0: writes half.

    `told` gets how many calls there were and the error, if one was raised that is for a person; any other is a bug.
    """
    library = ctypes.CDLL(None)
    library.failing_arm(str(cache.parent).encode(), nth, number, int(not number))
    error = ""
    try:
        work(of, cache)
    except KdpipeError as err:
        error = str(err)
    count = library.failing_count()
    library.failing_arm(b"", 0, 0, 0)
    told.write_text(f"{count}\n{error}")


class Filling(Committed):
    """Fills the disk when so many shards are committed, and writes down when that was."""

    def __init__(self, told: Path, filler: Path, shards: int) -> None:
        super().__init__(None)
        self._file, self._filler, self._left = told, filler, shards

    def event(self, kind: str, **fields: object) -> None:
        self._left -= kind == "shard"
        if self._left == 0:
            self._left = -1
            with contextlib.suppress(OSError), open(self._filler, "wb", buffering=0) as file:
                while file.write(bytes(4096)):
                    pass
            self._file.write_text(f"{time.monotonic()}\n")


def extract_on_full_disk(spec: ExtractSpec, cache: Path, told: Path, shards: int, file_limit: int) -> None:
    """Extract while the disk fills up after some shards, or under a limit on the size of files (0: none).

    `told` gets when that began, when the error came, and the error.
    """
    planning.SMALL_FILES = 0
    told.write_text(f"{time.monotonic()}\n")
    if file_limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, resource.RLIM_INFINITY))
    try:
        extract_small(spec, cache, progress=Filling(told, cache.parent / "filler", shards))
    except KdpipeError as err:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
        with open(told, "a") as file:
            file.write(f"{time.monotonic()}\n{err}")
