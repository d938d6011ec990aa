"""What coded rows cost a training step, a cold epoch from a slow disk and an extraction, beside raw ones.

    python tools/bench/codec_cost.py --json            SmolLM2-135M-Instruct on documentation chats, and a student of 22
                                                       of its 30 layers: ten minutes on two cores
    python tools/bench/codec_cost.py --json --quick    models of random numbers: seconds, and figures that say little

    step        steps of 512 tokens from caches of the same rows, in turn. `share` is what packing coded rows and
                decoding them takes, timed where it happens, of the step; `time` a whole step over one of raw rows.
                "folded" is what training does where that is exact enough, "decoded" what it does elsewhere.
    cold epoch  all rows of an epoch brought to batches, no student: reading is what takes time. The disk is a model:
                files are in memory, and a read waits until a disk of 100 MB/s would have had its bytes, which reads
                ahead what it is asked to and one piece after the other. `time` is raw over coded, over the ratio of the
                bytes: 1 where a codec saves all the time that its bytes save.
    extraction  the teacher over the same chats into an empty cache, in turn, from first batch to last shard, the
                codec there already; `calibration` is the seconds that fitting it took before, on so few rows.

All on one thread. Of every round one ratio is taken, the median is printed.
"""

import argparse
import dataclasses
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))  # a script's own folder is all Python adds
sys.path.insert(0, str(Path(__file__).parents[1] / "demo"))

import corpus
import student as pruned
from teacher import write_teacher
from tests.chats import write_chats
from tests.models import make_model, make_tokenizer

from kdpipe.manifests import shard
from kdpipe.manifests.access import FileBytes, open_bytes
from kdpipe.manifests.cache import Cache
from kdpipe.manifests.errors import StudentError
from kdpipe.manifests.fitted import Choice
from kdpipe.manifests.progress import Silent
from kdpipe.manifests.specs import DataSpec, Io, LossSpec, TrainSpec
from kdpipe.stages.extract import ExtractSpec, extract
from kdpipe.stages.extract.convert import convert
from kdpipe.stages.feed import packing
from kdpipe.stages.feed.batches import PlannedBatches
from kdpipe.stages.feed.dataset import of_caches
from kdpipe.stages.feed.decoding import Decoder
from kdpipe.stages.models.folder import ModelFolder
from kdpipe.stages.ranks import joined
from kdpipe.stages.student import TeacherHead, exam_text, load_sharded, load_teacher_heads
from kdpipe.stages.train.trainer import Trainer

CODECS = {"fisher kl=1e-2": Choice("fisher", kl=1e-2), "int8": Choice("int8")}
STEP_TOKENS, EPOCH_TOKENS = 512, 4096
DROPPED = range(12, 20)
"""Layers of the teacher that the demo's student lacks."""
DISK_RATE = 100e6
PIECE = 1 << 16
"""Bytes that the disk reads at a time."""
CPU = torch.device("cpu")
EVERY_SAMPLE = DataSpec(heldout_fraction=0.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Size:
    """chats: of the cache that is read; extracted: of those that the teacher runs over again and again"""

    chats: int
    extracted: int
    steps: int
    epochs: int
    extractions: int


FULL = Size(chats=300, extracted=60, steps=8, epochs=11, extractions=4)
QUICK = Size(chats=80, extracted=80, steps=3, epochs=3, extractions=2)


@dataclass(frozen=True, kw_only=True, slots=True)
class Folders:
    """What is read: models, chats, the cache of each codec."""

    teacher: Path
    student: Path
    few: Path
    caches: Mapping[str, Path]


def prepare(folder: Path, size: Size, teacher: Path | None, *, quick: bool) -> Folders:
    """The models, and the rows of the same chats under every codec."""
    chats, few, student = folder / "chats.jsonl", folder / "few.jsonl", folder / "student"
    if quick:
        teacher = make_tokenizer(make_model("qwen3", folder / "teacher", vocab_size=304))
        make_tokenizer(make_model("llama", student, vocab_size=320, seed=1, sizes={"hidden_size": 32}))
        write_chats(chats, size.chats)
        write_chats(few, size.extracted)
    else:
        if teacher is None:
            write_teacher(teacher := folder / "teacher")
        pruned.cut(teacher, student, drop=DROPPED)
        corpus.write_chats(chats, num_chats=size.chats)
        corpus.write_chats(few, num_chats=size.extracted)
    raw = extract(ExtractSpec(teacher=teacher, data=(chats,), data_spec=EVERY_SAMPLE), folder / "raw", Silent())
    caches = {"raw": raw.path}
    for number, (name, choice) in enumerate(CODECS.items()):
        caches[name] = folder / f"coded{number}"
        convert(raw, caches[name], choice, Silent())
    return Folders(teacher=teacher, student=student, few=few, caches=caches)


@dataclass(slots=True)
class Clock:
    """Seconds spent in what it is asked to time."""

    seconds: float = 0.0

    def timed(self, work: Callable[..., Any]) -> Callable[..., Any]:
        def taken(*arguments: Any, **named: Any) -> Any:
            started = time.perf_counter()
            found = work(*arguments, **named)
            self.seconds += time.perf_counter() - started
            return found

        return taken


class ClockedDecoder:
    """A decoder whose time is taken."""

    def __init__(self, decoder: Decoder, clock: Clock) -> None:
        self.rows = clock.timed(decoder.rows)


def step_lines(folders: Folders, size: Size) -> Iterator[dict[str, object]]:
    """A step of each cache over one of raw rows, and the share of it that is decoding."""
    ways = {"raw": ("raw", False)}
    for name in CODECS:
        ways |= {f"{name}, folded": (name, False)} if name.startswith("fisher") else {}
        ways |= {f"{name}, decoded": (name, True)}
    clock = Clock()
    with joined(CPU) as ranks, mock.patch.object(packing, "stored_rows", clock.timed(packing.stored_rows)):
        student = load_sharded(
            ModelFolder(folders.student, StudentError), ranks, stored=torch.float32, computed=torch.bfloat16
        ).train()
        feeds: dict[str, PlannedBatches] = {}
        heads: dict[str, list[TeacherHead]] = {}
        for way, (name, as_rows) in ways.items():
            dataset = of_caches([Cache.open(folders.caches[name])])
            feeds[way] = PlannedBatches(dataset, np.arange(len(dataset)), seed=0, batch_tokens=STEP_TOKENS)
            heads[way] = [clocked(head, clock) for head in load_teacher_heads(dataset.teachers, CPU, as_rows=as_rows)]
            assert heads[way][0].rows_are in f"{way} rows", f"{way}: its rows are {heads[way][0].rows_are}"
        student.examine(exam_text(dataset, np.arange(len(dataset)), student.model.config), folders.student)
        trainer = Trainer(student, feeds["raw"], heads["raw"], TrainSpec(batch_tokens=STEP_TOKENS), LossSpec(), ranks)

        def step(way: str, number: int) -> tuple[float, float]:
            """Seconds of the step, and of decoding in it."""
            trainer.batches, trainer.heads, trainer.done = feeds[way], heads[way], number
            clock.seconds = 0.0
            return trainer.step()["seconds"], clock.seconds

        for way in ways:  # what is made at a first step is made now
            step(way, 0)
        rounds = []
        for number in range(1, size.steps + 1):
            step("raw", number)  # what is made for sizes that no batch had before is made now
            order = list(ways) if number % 2 else list(ways)[::-1]
            rounds.append({way: step(way, number) for way in order})
    for way in list(ways)[1:]:
        case = f"step, {way}"
        share = statistics.median(each[way][1] / each[way][0] for each in rounds)
        times = statistics.median(each[way][0] / each["raw"][0] for each in rounds)
        seconds = {"seconds": round(statistics.median(each[way][0] for each in rounds), 4)}
        yield {"case": case, "metric": "share", "unit": "of a step", "kdpipe": round(share, 5), **seconds}
        yield {"case": case, "metric": "time", "unit": "x raw", "kdpipe": round(times, 3)}


def clocked(head: TeacherHead, clock: Clock) -> TeacherHead:
    """The same head, whose decoder's time is taken."""
    return head if head.decoder is None else dataclasses.replace(head, decoder=ClockedDecoder(head.decoder, clock))


@dataclass(slots=True)
class SlowDisk:
    """When a disk of DISK_RATE would have read what: pieces one after the other, each once."""

    free_at: float = 0.0
    ready_at: dict[tuple[Path, int], float] = field(default_factory=dict)

    def ask(self, path: Path, begin: int, end: int) -> float:
        """When the last of these bytes is there."""
        last = 0.0
        for piece in range(begin // PIECE, -(-end // PIECE)):
            if (path, piece) not in self.ready_at:
                self.free_at = max(self.free_at, time.perf_counter()) + PIECE / DISK_RATE
                self.ready_at[path, piece] = self.free_at
            last = max(last, self.ready_at[path, piece])
        return last


class SlowFile:
    """The bytes of a file on a slow disk."""

    def __init__(self, file: FileBytes, path: Path, disk: SlowDisk) -> None:
        self._file, self._path, self._disk = file, path, disk

    def read(self, begin: int, end: int) -> np.ndarray:
        if (wait := self._disk.ask(self._path, begin, end) - time.perf_counter()) > 0:
            time.sleep(wait)
        return self._file.read(begin, end)

    def prefetch(self, begin: int, end: int) -> None:
        self._disk.ask(self._path, begin, end)


@contextmanager
def from_slow_disk() -> Iterator[None]:
    """Shards lie on a disk none of which was read yet: the one place where a reader opens them."""
    disk = SlowDisk()

    def opened(path: Path, num_bytes: int, io: Io) -> FileBytes:
        return SlowFile(open_bytes(path, num_bytes, io), path, disk)

    with mock.patch.object(shard, "open_bytes", opened):
        yield


def epoch(cache: Path) -> float:
    """Seconds in which all rows of an epoch come from a slow disk into batches."""
    dataset = of_caches([Cache.open(cache)])
    feed = PlannedBatches(dataset, np.arange(len(dataset)), seed=0, batch_tokens=EPOCH_TOKENS)
    with from_slow_disk():
        started = time.perf_counter()
        for step in range(feed.num_steps):
            for _ in feed.step(step):
                pass
        return time.perf_counter() - started


def epoch_lines(folders: Folders, size: Size) -> Iterator[dict[str, object]]:
    """Raw over coded, over the ratio of the bytes."""
    num_bytes = {
        name: sum(each.stat().st_size for each in (path / "shards").iterdir()) for name, path in folders.caches.items()
    }
    for path in folders.caches.values():
        epoch(path)
    rounds = [{name: epoch(path) for name, path in folders.caches.items()} for _ in range(size.epochs)]
    raw = statistics.median(each["raw"] for each in rounds)
    for name in CODECS:
        wanted = num_bytes["raw"] / num_bytes[name]
        faster = statistics.median(each["raw"] / each[name] for each in rounds)
        yield {
            "case": f"cold epoch at {DISK_RATE / 1e6:.0f} MB/s, {name}",
            "metric": "time",
            "unit": "x the ratio of bytes",
            "kdpipe": round(faster / wanted, 3),
            "faster": round(faster, 3),
            "bytes": round(wanted, 3),
            "raw_seconds": round(raw, 3),
        }


class Stopwatch(Silent):
    """Seconds from the first batch of an extraction to its last shard, and of the codec's calibration."""

    def __init__(self) -> None:
        self.seconds, self.calibration, self._began = 0.0, 0.0, 0.0

    def begin(self, *_: object, **__: object) -> None:
        self._began = time.perf_counter()

    def end(self) -> None:
        self.seconds = time.perf_counter() - self._began  # the last to end is the extraction

    def event(self, kind: str, **fields: Any) -> None:
        if kind == "codec":
            self.calibration = fields["seconds"]


def extraction_lines(folders: Folders, size: Size, folder: Path) -> Iterator[dict[str, object]]:
    """The teacher's run with a codec over one without."""
    raw = ExtractSpec(teacher=folders.teacher, data=(folders.few,), data_spec=EVERY_SAMPLE)
    specs = {"raw": raw} | {
        name: dataclasses.replace(raw, codec=choice.name, codec_kl=choice.kl) for name, choice in CODECS.items()
    }

    def run(name: str) -> Stopwatch:
        watch, cache = Stopwatch(), folder / f"extracted {name}"
        extract(specs[name], cache, watch)
        for part in ("shards", "commits"):
            shutil.rmtree(cache / part)
            (cache / part).mkdir()
        return watch

    calibration = {name: run(name).calibration for name in specs}
    rounds = []
    for number in range(size.extractions):
        rounds.append({name: run(name).seconds for name in (list(specs) if number % 2 else list(specs)[::-1])})
    for name in CODECS:
        times = statistics.median(each[name] / each["raw"] for each in rounds)
        seconds = {"raw_seconds": round(statistics.median(each["raw"] for each in rounds), 2)}
        yield {"case": f"extraction, {name}", "metric": "time", "unit": "x raw", "kdpipe": round(times, 3), **seconds}
        yield {
            "case": f"extraction, {name}",
            "metric": "calibration",
            "unit": "s",
            "kdpipe": round(calibration[name], 2),
        }


PARTS = ("step", "epoch", "extraction")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--quick", action="store_true", help="models of random numbers")
    parser.add_argument("--teacher", type=Path, help="folder of SmolLM2, where it was unpacked already")
    parser.add_argument("--only", choices=PARTS, nargs="+", default=PARTS, help="some of the three parts")
    options = parser.parse_args()
    size = QUICK if options.quick else FULL
    torch.set_num_threads(1)  # of several some wait for others that a busy machine has put aside
    with tempfile.TemporaryDirectory(prefix="kdpipe-bench-") as name:
        folder = Path(name)
        folders = prepare(folder, size, options.teacher, quick=options.quick)
        parts = {
            "step": lambda: step_lines(folders, size),
            "epoch": lambda: epoch_lines(folders, size),
            "extraction": lambda: extraction_lines(folders, size, folder),
        }
        for part in options.only:
            for line in parts[part]():
                if options.json:
                    print(json.dumps({"bench": "codec_cost"} | line), flush=True)
                else:
                    print(f"{line['case']}: {line['metric']} {line['kdpipe']} {line['unit']}", flush=True)


if __name__ == "__main__":
    main()
