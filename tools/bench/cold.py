"""A first epoch whose rows are not in the page cache, over one whose rows are: what reading ahead hides of the disk.

Pairs of epochs of the same steps, in turn cold (every page of the shards given back, which mincore confirms)
and warm, each through a cache opened anew, so that both verify every checksum. A pair gives one ratio of
wall-clock time, the median is printed. Waits for a core that other processes had are left out, and the computing, which
is the same in both, counts as its median over all epochs: other work on the machine makes it faster and slower.

    kdpipe            the next step's rows are asked for while this step runs, the first's while the student is measured
    asked for late    the same run, its rows asked for when they are packed

The student is slower than the disk: "disk" in the case is the time that reading the rows takes by itself, in order,
over that of a warm epoch.
"""

import argparse
import ctypes
import gc
import json
import mmap
import os
import resource
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))  # a script's own folder is all Python adds

from tests.caches import make_cache
from tests.models import make_model

from kdpipe.manifests.cache import Cache
from kdpipe.manifests.errors import StudentError
from kdpipe.manifests.row_source import CacheRows
from kdpipe.manifests.sample import Sample, content_id
from kdpipe.manifests.specs import LossSpec, TrainSpec
from kdpipe.stages.feed.batches import PlannedBatches
from kdpipe.stages.feed.dataset import of_caches
from kdpipe.stages.feed.packing import PackedBatch, Packer
from kdpipe.stages.models.folder import ModelFolder
from kdpipe.stages.ranks import joined
from kdpipe.stages.student import exam_text, load_sharded, load_teacher_head
from kdpipe.stages.train.trainer import Trainer

WIDTH, ROWS, PROMPT = 4096, 128, 40
VOCAB_SIZE = 256
BATCH_TOKENS = 4096
STUDENT = {
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 1024,
}
"""So small that an epoch takes about twice as long as reading its rows from a fast disk."""
RESIDENT = 0.01
"""Share of the pages that may be in memory at the start of a cold epoch: a header is read to open a shard."""
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)


def clock() -> float:
    """Seconds, without those for which this thread was ready to run and another process had its core."""
    _, waited, _ = Path("/proc/thread-self/schedstat").read_text().split()
    return time.perf_counter() - int(waited) / 1e9


def computing() -> float:
    """Seconds that this thread has computed, outside of the kernel."""
    return resource.getrusage(resource.RUSAGE_THREAD).ru_utime


def make_samples(num_samples: int) -> list[Sample]:
    """A prompt and an answer of ROWS / 2 to ROWS * 3 / 2 rows each."""
    rng = np.random.default_rng(4)
    lengths = PROMPT + rng.integers(ROWS // 2, ROWS * 3 // 2, num_samples)
    return [
        Sample(
            content_id=content_id(index),
            source="bench",
            line=index + 1,
            token_ids=rng.integers(0, VOCAB_SIZE, length).astype(np.int32),
            supervised=np.arange(length) >= PROMPT,
        )
        for index, length in enumerate(lengths)
    ]


def files(cache: Path) -> list[Path]:
    """Those with rows. The teacher's head stays mapped."""
    return sorted((cache / "shards").iterdir())


def evict(cache: Path) -> None:
    """Give every page of the cache's shards back, and see that they are gone."""
    for path in files(cache):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    share = resident(cache)
    assert share <= RESIDENT, f"{share:.1%} of the cache is in memory still: is something else reading it?"


def resident(cache: Path) -> float:
    """The share of the files' pages that are in memory."""
    found = pages = 0
    for path in files(cache):
        size = path.stat().st_size
        with open(path, "rb") as file, mmap.mmap(file.fileno(), size, flags=mmap.MAP_PRIVATE) as mapped:
            there = np.zeros(-(-size // mmap.PAGESIZE), np.uint8)
            begin = ctypes.c_char.from_buffer(mapped)
            _libc.mincore(ctypes.addressof(begin), size, there.ctypes.data)
            del begin
        found, pages = found + int((there & 1).sum()), pages + len(there)
    return found / pages


def read_in_order(cache: Path) -> float:
    """Seconds that reading the files from the disk takes."""
    evict(cache)
    began = time.perf_counter()
    for path in files(cache):
        with open(path, "rb", buffering=0) as file:
            while file.read(1 << 22):
                pass
    return time.perf_counter() - began


class Epochs:
    """Epochs of one student over one cache."""

    def __init__(self, trainer: Trainer, cache: Path, heldout: PackedBatch) -> None:
        self.trainer, self.cache, self.heldout = trainer, cache, heldout

    def run(self, *, cold: bool) -> tuple[float, float]:
        """Seconds of the steps of one epoch: of computing, and all others."""
        del self.trainer.batches  # a page that is mapped stays in memory
        gc.collect()
        if cold:
            evict(self.cache)
        else:
            for path in files(self.cache):
                path.read_bytes()
        batches = batches_of(self.cache)
        self.trainer.batches, self.trainer.done = batches, 0
        # As a run begins: its student is measured before the first step, whose rows are asked for before that.
        batches.read_ahead(0)
        self.trainer.student.measure(self.heldout, self.trainer.heads)
        began, computed = clock(), computing()
        for _ in range(self.trainer.num_steps):
            self.trainer.step()
        computed = computing() - computed
        return computed, clock() - began - computed

    def ratio(self, pairs: int) -> tuple[float, float]:
        """Median of cold over warm, and of the seconds of a warm epoch."""
        taken = []
        for pair in range(pairs):
            taken.append({cold: self.run(cold=cold) for cold in ((True, False), (False, True))[pair % 2]})
        computing = statistics.median(each[0] for turn in taken for each in turn.values())
        ratios = [(computing + turn[True][1]) / (computing + turn[False][1]) for turn in taken]
        return statistics.median(ratios), computing + statistics.median(turn[False][1] for turn in taken)


def batches_of(cache: Path) -> PlannedBatches:
    dataset = of_caches([Cache.open(cache)])
    return PlannedBatches(dataset, np.arange(len(dataset)), seed=0, batch_tokens=BATCH_TOKENS)


@contextmanager
def asked_for_late() -> Iterator[None]:
    """Nobody says beforehand which rows are needed."""
    with mock.patch.object(CacheRows, "want"):
        yield


def measure(folder: Path, *, num_samples: int, pairs: int) -> tuple[str, dict[str, float]]:
    """What the case is called, and its ratios."""
    opened = make_cache(
        folder / "cache",
        samples=make_samples(num_samples),
        hidden_size=WIDTH,
        vocab_size=VOCAB_SIZE,
        shard_tokens=8192,
        heldout_fraction=0.0,
    )
    path, dataset = opened.path, of_caches([opened])
    student = make_model("llama", folder / "student", vocab_size=VOCAB_SIZE, sizes=STUDENT)
    with joined(torch.device("cpu")) as ranks:
        model = load_sharded(
            ModelFolder(student, StudentError), ranks, stored=torch.float32, computed=torch.bfloat16
        ).train()
        model.examine(exam_text(dataset, np.arange(len(dataset)), model.model.config), student)
        heads = [load_teacher_head(teacher, ranks.device) for teacher in dataset.teachers]
        trainer = Trainer(model, batches_of(path), heads, TrainSpec(batch_tokens=BATCH_TOKENS), LossSpec(), ranks)
        heldout = Packer(dataset).pack(np.arange(BATCH_TOKENS // (PROMPT + ROWS)))
        del opened, dataset
        epochs = Epochs(trainer, path, heldout)
        epochs.run(cold=False)
        ours, warm = epochs.ratio(pairs)
        with asked_for_late():
            late, _ = epochs.ratio(pairs)
    num_steps = trainer.num_steps
    del epochs, trainer
    gc.collect()
    disk, size = read_in_order(path) / warm, sum(each.stat().st_size for each in files(path))
    case = f"{size / 2**20:.0f} MiB, {num_steps} steps, E={WIDTH}, disk {disk:.2f}"
    return case, {"kdpipe": ours, "asked for late": late}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--quick", action="store_true", help="a shorter epoch and fewer pairs: under a minute")
    parser.add_argument("--folder", type=Path, help="where the cache goes, on the disk to measure")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp(prefix="kdpipe-bench-", dir=arguments.folder))
    try:
        num_samples, pairs = (240, 3) if arguments.quick else (480, 9)
        case, found = measure(folder, num_samples=num_samples, pairs=pairs)
    finally:
        shutil.rmtree(folder)
    ours, late = (round(found[name], 3) for name in ("kdpipe", "asked for late"))
    if arguments.json:
        line = {"bench": "cold", "case": case, "metric": "time", "unit": "x warm epoch"}
        print(json.dumps({**line, "kdpipe": ours, "rivals": {"asked for late": late}}), flush=True)
    else:
        print(f"{case}: kdpipe {ours} x a warm epoch, asked for late {late}", flush=True)


if __name__ == "__main__":
    main()
