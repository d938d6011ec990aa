"""Kept: the answers of a student with their teacher's rows, as an ordinary cache that further students train from.

    as they pass by      -> FOLDER/rows, FOLDER/texts, appended            `Kept`, in the teacher's process
    when the run ended   -> plan, samples.arrow, shards, committed         `seal`, those that the run's own files name

An answer that is scored again, after a kill, is appended again: the last one counts.
Invariant: the cache appears under its name with its plan, as extract's does; its rows are those that went to the
student, checked against their digest once more.
Cost: one write of the rows beside the run and one copy at its end, so twice their size on the disk for a while.
"""

import hashlib
import json
import os
import shutil
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import xxhash

from kdpipe.manifests.cache import Cache
from kdpipe.manifests.durable import disk_error, fsync_folder, fsync_tree, scratch_name, scratch_of, sweep
from kdpipe.manifests.errors import CacheError, ConfigError, CorruptError
from kdpipe.manifests.places import require_outside
from kdpipe.manifests.plan import FOLDERS, PLAN_FILE, SAMPLES_FILE
from kdpipe.manifests.progress import Progress
from kdpipe.manifests.run import ROLLOUTS
from kdpipe.manifests.sample import Sample, SampleTokens, content_id
from kdpipe.manifests.samples import SamplesWriter
from kdpipe.manifests.shard import DTYPES, TAGS
from kdpipe.stages.extract.reading import finish
from kdpipe.stages.live.answers import MEASURED
from kdpipe.stages.live.tee import Tee

ENTRY = struct.Struct("<qQQQQ")
"""Of an answer in `texts`, before its tokens: index, bytes of tokens, where its rows begin, bytes of rows, xxh3-64."""
SOURCE = "rollouts"
"""What samples.arrow calls the file of the answers, whose lines count them in the order of training."""


def kept_folder(cache: Path, output: Path) -> Path:
    """Beside the cache until it is made: of this run's output alone."""
    run = hashlib.sha256(os.fsencode(output.absolute())).hexdigest()[:8]
    return cache.absolute().parent / f".{cache.name}.{run}.rollouts"


def start_anew(cache: Path, output: Path) -> None:
    """Nothing is kept of a run that there was before."""
    shutil.rmtree(kept_folder(cache, output), ignore_errors=True)


def require_free(cache: Path, output: Path) -> None:
    """The answers are kept in a cache of their own. Raises ConfigError for a folder that is there already."""
    require_outside(cache, option="--tee")
    if output.resolve() in (cache.resolve(), *cache.resolve().parents):
        raise ConfigError("it lies in the student's --output; choose another --tee, outside of it", where=cache)
    if cache.exists() and not kept_folder(cache, output).exists():
        raise ConfigError("it exists; the student's answers are kept in a new cache, choose another --tee", where=cache)


@dataclass(frozen=True, slots=True)
class _Entry:
    text: SampleTokens
    offset: int
    num_bytes: int
    digest: int

    def says(self, answer: Sequence[int]) -> bool:
        """Whether its text ends with an answer: another run's of the same index says something else."""
        return self.text.token_ids[self.text.supervised].tolist() == list(answer)


class Kept:
    """with Kept(folder) as kept: kept.keep(index, text, rows)"""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        last = max((entry.offset + entry.num_bytes for _, entry in _entries(folder)), default=0)
        self._rows = open(folder / "rows", "ab")  # noqa: SIM115
        self._texts = open(folder / "texts", "ab")  # noqa: SIM115
        self._rows.truncate(last)
        self._rows.seek(last)
        self._texts.truncate(_whole_bytes(folder))
        self._texts.seek(0, os.SEEK_END)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, err: BaseException | None, _: TracebackType | None) -> None:
        self._rows.close()
        self._texts.close()

    def keep(self, index: int, text: SampleTokens, rows: np.ndarray, digest: int) -> None:
        """rows [R, E], and their xxh3-64. Raises SpaceError."""
        if index >= MEASURED:
            return
        offset, tokens = self._rows.tell(), text.to_bytes()
        try:
            self._rows.write(rows.view(np.uint8).reshape(-1).data)
            self._rows.flush()  # before its entry: what is torn by a kill has none
            self._texts.write(ENTRY.pack(index, len(tokens), offset, rows.nbytes, digest) + tokens)
            self._texts.flush()
        except OSError as err:
            raise disk_error(err, self._folder) from err


def _entries(folder: Path) -> Iterator[tuple[int, _Entry]]:
    """(index, entry) of everything whole in `texts`, in the order of writing."""
    size = (folder / "rows").stat().st_size if (folder / "rows").exists() else 0
    if not (folder / "texts").exists():
        return
    with open(folder / "texts", "rb") as file:
        while len(head := file.read(ENTRY.size)) == ENTRY.size:
            index, num_tokens, offset, num_bytes, digest = ENTRY.unpack(head)
            tokens = file.read(num_tokens)
            if len(tokens) < num_tokens or offset + num_bytes > size:
                return
            yield index, _Entry(SampleTokens.from_bytes(tokens), offset, num_bytes, digest)


def _whole_bytes(folder: Path) -> int:
    return sum(ENTRY.size + 4 * len(entry.text.token_ids) for _, entry in _entries(folder))


def seal(base: Cache, output: Path, cache: Path, progress: Progress) -> None:
    """Make the cache of what a run has kept, in the order in which it was trained on; nothing where that was done.

    base: whose teacher it has; output: the run's, whose files name the answers
    Raises CacheError where something else has its name, CorruptError for rows that are not those that were written.
    """
    folder = kept_folder(cache, output)
    if not folder.exists():
        return
    found, written = dict(_entries(folder)), dict(_written(output))
    indices = sorted(index for index in written.keys() & found.keys() if found[index].says(written[index]))
    if not indices:
        progress.note(f"the student was trained on no answer of its own: {cache} is not made")
        shutil.rmtree(folder)
        return
    if not (cache / PLAN_FILE).exists():
        _plan(base, [found[index].text for index in indices], cache)
    made = Cache.open(cache)
    if len(made) != len(indices):
        raise CacheError(
            f"it has {len(made):,} samples, this run kept {len(indices):,} answers; choose another --tee", where=cache
        )
    width, dtype = base.plan.head.hidden_size, DTYPES[TAGS[base.plan.head.dtype]]
    progress.begin("keep", total=len(indices), unit="answers")
    with open(folder / "rows", "rb") as file, Tee(made, progress) as tee:
        for number, index in enumerate(indices):
            entry = found[index]
            file.seek(entry.offset)
            data = file.read(entry.num_bytes)
            if xxhash.xxh3_64_intdigest(data) != entry.digest:
                raise CorruptError(f"the rows of answer {index} are not what was written", where=folder / "rows")
            tee.keep(number, np.frombuffer(data, dtype).reshape(-1, width))
            progress.advance(1)
    progress.end()
    shutil.rmtree(folder)


def _written(output: Path) -> Iterator[tuple[int, list[int]]]:
    """The indices and tokens of a run's answers, of all ranks."""
    for path in output.glob(ROLLOUTS):
        with open(path, "rb") as file:
            yield from ((int(each["index"]), each["token_ids"]) for each in map(json.loads, file))


def _plan(base: Cache, texts: Sequence[SampleTokens], cache: Path) -> None:
    """A cache of these samples without their rows, whole under its name or not there."""
    parent = cache.absolute().parent
    sweep(scratch_of(parent, f".{cache.name}.plan"))
    folder = scratch_name(parent, f".{cache.name}.plan")
    for name in FOLDERS:
        (folder / name).mkdir(parents=True)
    settings = base.plan.settings
    writer = SamplesWriter(
        folder / SAMPLES_FILE,
        shard_tokens=settings.shard_tokens,
        batch_tokens=base.plan.engine.batch_tokens,
        every_row=settings.rows == "all",
    )
    for number, text in enumerate(texts, start=1):
        ids, mask = text.token_ids, text.supervised
        content = content_id([ids.tolist(), mask.tolist()])
        writer.add(Sample(content_id=content, source=SOURCE, line=number, token_ids=ids, supervised=mask))
    written = finish(writer, folder, {"read": len(texts), "kept": len(texts)})
    shutil.copytree(base.teacher_folder, folder / "teacher", dirs_exist_ok=True)
    plan = base.plan.changed(
        **written.fields(),
        fingerprint=base.plan.fingerprint.model_copy(update={"data": written.data_digest}),
        grown_from=(),
    )
    (folder / PLAN_FILE).write_bytes(plan.to_bytes())
    fsync_tree(folder)
    try:
        os.rename(folder, cache)
    except OSError as err:
        raise disk_error(err, cache) from err
    fsync_folder(parent)
