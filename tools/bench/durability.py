"""What safety costs: verified reading, checkpoints and durable extraction, each beside the same work without it.

    bytes        seconds a GiB of rows of each part of making a shard, beside the same bytes written once and flushed:
                 for judging a teacher or a student faster than this machine's
    extraction   planning and filling with the whole protocol, beside the same without checksums, digests, fsyncs,
                 links, commit records and claims: a shard is renamed into place, its commit record is an empty file
    reading      an epoch from a cache opened anew, every block's checksum verified on first touch, beside the same
                 epoch with every block taken for good. Later epochs verify nothing
    checkpoints  one every 200 steps, train.save_every's default, over those steps; beside it the same bytes written
                 once and flushed

With and without alternate, step by step or extraction by extraction, each repetition in the other order and giving one
ratio; medians are printed, the repetitions go to stderr. "Whole" is the ratio of the whole epochs or extractions, less
one: that is the truth, with the noise of the models' work, which is larger than what is looked for. So the first number
is of what safety alone takes, over the whole without it: the difference of the feeds' times, the time spent inside the
protocol's functions.
Reading and the parts of "bytes" that do not flush are in processor time of one thread; checkpoints, extraction and
flushes are in wall-clock time, because they wait for the disk. What is read lies in the page cache for both sides;
before anything that flushes is timed, sync lets the disk come to rest, for both sides.
"""

# Shapes: E teacher width.

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import crc32c
import numpy as np
import torch
import xxhash

sys.path.insert(0, str(Path(__file__).parents[2]))  # a script's own folder is all Python adds

from sweep import TEACHER, Sweep, seconds, take_step
from tests.caches import make_plan, make_samples

from kdpipe.manifests.cache import Cache
from kdpipe.manifests.claims import Claims
from kdpipe.manifests.progress import Silent
from kdpipe.manifests.samples import Samples
from kdpipe.manifests.shard import NO_DIGEST, Commit, Shard, ShardWriter, commit_path, shard_path
from kdpipe.stages import rows
from kdpipe.stages.feed.batches import PlannedBatches
from kdpipe.stages.feed.dataset import of_caches
from kdpipe.stages.feed.packing import PackedBatch
from kdpipe.stages.ranks import joined
from kdpipe.stages.teacher import gate, transformers_engine
from kdpipe.stages.train.run import Run
from kdpipe.stages.train.training import find

GIB = 1 << 30
ROWS_A_SAMPLE = 16
"""Of `make_samples`, about."""
PLACE = 512
"""Rows that are written at a time."""
SAVE_EVERY = 200
WIDE = TEACHER | {"hidden_size": 4096, "intermediate_size": 256, "num_hidden_layers": 1, "num_attention_heads": 4}
"""Rows as wide as a large teacher's from one that costs little: bytes are what reading is about."""


class TimedFeed(PlannedBatches):
    """A feed that adds up its own processor time."""

    seconds = 0.0

    def step(self, step: int) -> Iterator[PackedBatch]:
        began = time.thread_time()
        batches = list(super().step(step))  # one, as long as there is no accumulation
        self.seconds += time.thread_time() - began
        yield from batches


@contextmanager
def unverified() -> Iterator[None]:
    """Every block counts as found good."""
    with patch.object(Shard, "_unseen", lambda shard, begin, end: -1):
        yield


def timed_feed(run: Run, folder: Path) -> TimedFeed:
    """The run's feed on the cache opened anew: nothing of it was touched yet."""
    spec = run.training.spec.train
    return TimedFeed(
        of_caches([Cache.open(folder)]),
        run.train_samples,
        seed=spec.seed,
        batch_tokens=spec.batch_tokens,
        padded=run.student.padded,
    )


def measure_reading(run: Run, folder: Path, repetitions: int) -> dict[str, list[float]]:
    """Of every epoch: what the checks add to it, as a share of the epoch without them."""
    shares: dict[str, list[float]] = {"kdpipe": [], "whole": []}
    for repetition in range(-1, repetitions):
        checked, bare = timed_feed(run, folder), timed_feed(run, folder)
        spent = {checked: 0.0, bare: 0.0}
        for step in range(checked.steps_per_epoch):
            for feed in (checked, bare) if (step + repetition) % 2 else (bare, checked):
                run.trainer.batches = feed
                with ExitStack() as stack:
                    if feed is bare:
                        stack.enter_context(unverified())
                    began = time.process_time()
                    take_step(run, step)
                    spent[feed] += time.process_time() - began
        if repetition >= 0:  # in the first round kernels are compiled for every length of batch
            shares["whole"].append(spent[checked] / spent[bare] - 1)
            shares["kdpipe"].append((checked.seconds - bare.seconds) / spent[bare])
    return shares


def measure_checkpoints(run: Run, repetitions: int) -> dict[str, list[float]]:
    """Of every checkpoint: its time over that of SAVE_EVERY steps, and so for its bytes written once and flushed."""
    shares: dict[str, list[float]] = {"kdpipe": [], "written once": []}
    for repetition in range(repetitions):
        step = statistics.mean(seconds(partial(take_step, run, step)) for step in range(run.planned.steps_per_epoch))
        run.trainer.done = repetition + 1
        os.sync()
        shares["kdpipe"].append(seconds(partial(run.loop.save, Silent())) / step / SAVE_EVERY)
        files = [path for path in run.checkpoints.path(run.trainer.done).iterdir() if path.suffix == ".safetensors"]
        data = np.concatenate([np.fromfile(path, np.uint8) for path in files])
        os.sync()
        shares["written once"].append(sum(write_once(run.training.output / "plain", data)) / step / SAVE_EVERY)
    return shares


def write_once(path: Path, data: np.ndarray) -> tuple[float, float]:
    """Processor seconds of writing a file of these bytes, and seconds of flushing it; it is removed."""
    with open(path, "xb", buffering=0) as file:
        os.posix_fallocate(file.fileno(), 0, len(data))
        view, at = data.data, 0
        began = time.thread_time()
        while at < len(data):
            at += file.write(view[at:])
        written = time.thread_time() - began
        flushed = seconds(partial(os.fsync, file.fileno()))
    path.unlink()
    return written, flushed


class Watch:
    """Adds up the wall-clock time spent in functions, that of one called by another only once."""

    def __init__(self) -> None:
        self.seconds, self._inside = 0.0, False

    def over(self, function: Callable[..., object]) -> Callable[..., object]:
        def watched(*arguments: object) -> object:
            if self._inside:
                return function(*arguments)
            self._inside, began = True, time.perf_counter()
            try:
                return function(*arguments)
            finally:
                self._inside = False
                self.seconds += time.perf_counter() - began

        return watched


def put_in_place(writer: ShardWriter) -> Commit:
    """What `ShardWriter.commit` comes to where nothing may go wrong."""
    os.rename(writer.path, shard_path(writer._folder, writer._index))
    commit_path(writer._folder, writer._index).touch()
    return Commit(shard=writer._index, plan="", num_bytes=writer.layout.num_bytes, digest=NO_DIGEST)


# What makes an extraction durable, and what stands for it where nobody cares: the same rows in the same place.
PROTOCOL: tuple[tuple[Any, str, Callable[..., object]], ...] = (
    (os, "fsync", lambda descriptor: None),
    (xxhash, "xxh3_128_hexdigest", lambda data: NO_DIGEST),
    (transformers_engine, "checksum", lambda array: 0),
    (gate, "checksum", lambda array: 0),
    (ShardWriter, "commit", put_in_place),
    (Claims, "take", lambda claims, number: True),
    (Claims, "held_by_another", lambda claims, number: False),
    (Claims, "keep", lambda claims: None),
    (Claims, "drop", lambda claims, number: None),
)


def extract(sweep: Sweep, number: int, watch: Watch | None) -> tuple[float, float]:
    """Seconds by the clock and of the processor: a careful extraction, watched, or a careless one without a watch."""
    os.sync()
    with ExitStack() as stack:
        for owner, name, instead in PROTOCOL:
            stack.enter_context(patch.object(owner, name, watch.over(getattr(owner, name)) if watch else instead))
        began = time.process_time()
        wall, processor = sweep.extract(number), time.process_time() - began
    shutil.rmtree(sweep.folder / f"cache-{number}")
    return wall, processor


def measure_extraction(sweep: Sweep, repetitions: int) -> dict[str, list[float]]:
    """Of every pair of extractions: what the protocol adds, as a share of the careless one, and its milliseconds."""
    shares: dict[str, list[float]] = {"kdpipe": [], "whole": [], "whole, processor time": [], "ms": []}
    for repetition in range(repetitions):
        watch, spent = Watch(), {}
        for careful in (True, False) if repetition % 2 else (False, True):
            spent[careful] = extract(sweep, repetition + 1, watch if careful else None)
        shares["ms"].append(watch.seconds * 1e3)
        shares["kdpipe"].append(watch.seconds / spent[False][0])
        for clock, name in enumerate(("whole", "whole, processor time")):
            shares[name].append(spent[True][clock] / spent[False][clock] - 1)
    return shares


class Clock:
    """A function that adds up its time: the processor's, and the clock's."""

    def __init__(self, function: Callable[..., object]) -> None:
        self._function, self.processor, self.wall = function, 0.0, 0.0

    def __call__(self, *arguments: object) -> object:
        began, started = time.thread_time(), time.perf_counter()
        result = self._function(*arguments)
        self.processor += time.thread_time() - began
        self.wall += time.perf_counter() - started
        return result


def measure_bytes(folder: Path, num_rows: int, repetitions: int) -> dict[str, list[float]]:
    """Seconds a GiB of every part of making a shard of rows 4096 wide, and of writing its bytes once."""
    width = WIDE["hidden_size"]
    samples = make_samples(num_rows // ROWS_A_SAMPLE)
    plan = make_plan(folder, samples, hidden_size=width, shard_tokens=1 << 30)
    table = Samples(folder, plan).shard(0)
    values = np.random.default_rng(0).integers(0, 1 << 16, (plan.num_rows, width), dtype=np.uint16)
    found: dict[str, list[float]] = {}
    for repetition in range(repetitions):
        spent: dict[str, float] = {}
        for ours in (True, False) if repetition % 2 else (False, True):
            os.sync()
            spent |= seal(folder, ShardWriter(folder, plan, 0, table), values) if ours else floor(folder, values)
        spent["gate's checksums"] = 2 * clocked(rows.checksum, values)  # by who wrote them and by the gate
        for name, value in spent.items():
            found.setdefault(name, []).append(value * GIB / values.nbytes)
    return found


def floor(folder: Path, values: np.ndarray) -> dict[str, float]:
    written, flushed = write_once(folder / "plain", values.reshape(-1).view(np.uint8))
    return {"plain: write": written, "plain: fsync": flushed}


def clocked(function: Callable[..., object], *arguments: object) -> float:
    """Processor seconds of a call."""
    clock = Clock(function)
    clock(*arguments)
    return clock.processor


def fill(writer: ShardWriter, values: np.ndarray) -> None:
    """As engines do it: a place is asked for, then rows are copied to it."""
    for first in range(0, len(values), PLACE):
        piece = values[first : first + PLACE]
        place, _ = writer.rows(first, len(piece))
        np.copyto(place.view(np.uint16), piece)


def seal(folder: Path, writer: ShardWriter, values: np.ndarray) -> dict[str, float]:
    """Seconds of filling and sealing a shard, by parts; it is removed."""
    block, digest = Clock(crc32c.crc32c), Clock(xxhash.xxh3_128_hexdigest)
    with writer, patch.object(crc32c, "crc32c", block), patch.object(xxhash, "xxh3_128_hexdigest", digest):
        filled = clocked(fill, writer, values)
        sealed = seconds(writer.commit)
    for path in (shard_path(folder, 0), commit_path(folder, 0)):
        path.unlink()
    return {
        "write": filled,
        "crc32c": block.processor,
        "xxh3": digest.processor,
        "flush": sealed - block.wall - digest.wall,
    }


def report(case: str, found: dict[str, list[float]], *, unit: str, as_json: bool, digits: int = 4) -> None:
    medians = {name: round(statistics.median(values), digits) for name, values in found.items()}
    kdpipe = medians.pop("kdpipe")
    if as_json:
        line = {"bench": "durability", "case": case, "metric": "time", "unit": unit}
        print(json.dumps({**line, "kdpipe": kdpipe, "rivals": medians}), flush=True)
    else:
        others = "  ".join(f"{name} {value}" for name, value in medians.items())
        print(f"{case:58} kdpipe {kdpipe} {unit}   {others}", flush=True)
    for name, values in found.items():
        print(f"{case}, {name}: {[round(each, digits) for each in values]}", file=sys.stderr)


def report_bytes(found: dict[str, list[float]], *, as_json: bool) -> None:
    plain = {name: found.pop(f"plain: {name}") for name in ("write", "fsync")}
    show = partial(report, unit="s/GiB", as_json=as_json, digits=3)
    show("bytes: write", {"kdpipe": found["write"], "plain": plain["write"]})
    for name in ("crc32c", "xxh3", "gate's checksums"):
        show(f"bytes: {name}", {"kdpipe": found[name]})
    show("bytes: flush, link and record", {"kdpipe": found["flush"], "plain": plain["fsync"]})
    show("bytes: all of it", {"kdpipe": added(found), "plain": added(plain)})


def added(parts: dict[str, list[float]]) -> list[float]:
    return [sum(values) for values in zip(*parts.values(), strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--quick", action="store_true", help="less data and fewer repetitions: within a minute")
    parser.add_argument("--folder", type=Path, help="where the files go; the system's temporary folder by default")
    options = parser.parse_args()
    torch.set_num_threads(1)
    num_samples, repetitions, num_rows = (18, 3, 1 << 14) if options.quick else (40, 7, 1 << 15)
    share = partial(report, as_json=options.json)
    with tempfile.TemporaryDirectory(prefix="kdpipe-bench-", dir=options.folder) as name:
        folder = Path(name)
        report_bytes(measure_bytes(folder / "bytes", num_rows, repetitions), as_json=options.json)
        for sizes in (TEACHER, WIDE):
            width = sizes["hidden_size"]
            sweep = Sweep(folder / str(width), num_samples, sizes)
            sweep.extract(0)
            cache = sweep.folder / "cache-0"
            if sizes is TEACHER:
                spent = measure_extraction(sweep, repetitions)
                num_tokens = Cache.open(cache).plan.num_tokens
                case = f"extraction of {num_tokens} tokens, teacher 8x512, bf16"
                share(f"{case}: a plan, a shard", {"kdpipe": spent.pop("ms")}, unit="ms", digits=1)
                share(case, spent, unit="share of an extraction")
            with joined(torch.device("cpu")) as ranks:
                run = Run(sweep.training, find(sweep.training), ranks)
                spent = measure_reading(run, cache, repetitions)
                share(f"reading rows {width} wide, student 4x256", spent, unit="share of a training epoch")
                if sizes is TEACHER:
                    spent = measure_checkpoints(run, repetitions)
                    share("checkpoints, 4096 tokens a step, student 4x256", spent, unit="share of 200 steps")


if __name__ == "__main__":
    main()
