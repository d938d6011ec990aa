"""Reading a cache: random samples' rows copied into a reused batch buffer, as a share of memcpy's throughput.

The floor is np.copyto of the same number of bytes from random places of a plain array as large as the cache. kdpipe is
`cache[i].rows` copied out, as the rivals' rows are; "packed batch" is `Packer.pack`, which makes ids, positions and
labels too. In each round everybody reads another batch, so nobody finds its bytes in the processor's cache; a ratio is
taken within a round, the median over rounds is printed. All files are in the page cache.

steady: files open and mapped, checksums verified before
first touch: files opened anew, every block's checksum verified (kdpipe only; no rival has any)

Time is this thread's processor time, so that other work on the machine disturbs it little.
"""

# Shapes: S samples of a batch, R rows of a sample, E teacher width.

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from safetensors import safe_open

sys.path.insert(0, str(Path(__file__).parents[2]))  # a script's own folder is all Python adds

from tests.caches import make_cache

from kdpipe.manifests.cache import Cache
from kdpipe.manifests.sample import Sample, content_id
from kdpipe.manifests.shard import shard_path
from kdpipe.stages.feed.dataset import of_caches
from kdpipe.stages.feed.packing import Packer, row_buffer

MIB = 1 << 20
Reader = Callable[[Sequence[int]], object]


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """Samples of mean_rows / 2 to mean_rows * 3 / 2 rows of width E, batches of about 64 MiB."""

    hidden_size: int
    mean_rows: int
    num_bytes: int

    @property
    def num_samples(self) -> int:
        return self.num_bytes // (2 * self.hidden_size * self.mean_rows)

    @property
    def batch(self) -> int:
        return max(64 * MIB // (2 * self.hidden_size * self.mean_rows), 1)

    def __str__(self) -> str:
        return f"E={self.hidden_size} R~{self.mean_rows} {self.num_bytes // MIB} MiB"


class Places:
    """Where every sample's rows lie: in which shard, from which row, how many."""

    def __init__(self, cache: Cache) -> None:
        self.shard, self.first, self.count = (
            cache.samples.column(name).astype(np.int64) for name in ("shard", "first_row", "num_rows")
        )


def make_samples(case: Case) -> list[Sample]:
    """A prompt of 100 tokens and an answer: only the answer has rows."""
    rng = np.random.default_rng(4)
    counts = rng.integers(case.mean_rows // 2, case.mean_rows * 3 // 2, case.num_samples)
    return [
        Sample(
            content_id=content_id(index),
            source="bench",
            line=index + 1,
            token_ids=rng.integers(0, 97, 100 + count).astype(np.int32),
            supervised=np.arange(100 + count) >= 100,
        )
        for index, count in enumerate(counts)
    ]


def read_floor(cache: Cache, places: Places, buffer: np.ndarray) -> Reader:
    width = buffer.shape[1]
    source = row_buffer(cache.plan.num_rows, width, torch.uint8, pin=False).numpy()
    source[:] = np.random.default_rng(0).integers(0, 255, source.shape, dtype=np.uint8)
    rng = np.random.default_rng(1)

    def read(members: Sequence[int]) -> None:
        at = 0
        for member in members:
            count = places.count[member]
            first = rng.integers(0, len(source) - count)
            np.copyto(buffer[at : at + count], source[first : first + count])
            at += count

    return read


def read_cache(cache: Cache, buffer: np.ndarray) -> Reader:
    """What the feed does with rows, and nothing else."""

    def read(members: Sequence[int]) -> None:
        at = 0
        for member in members:
            rows = cache[member].rows.view(np.uint8)
            buffer[at : at + len(rows)] = rows
            at += len(rows)

    return read


def read_safetensors(cache: Cache, places: Places, buffer: torch.Tensor) -> Reader:
    """The shards themselves: each is a valid safetensors file. Kept open."""
    numbers = range(len(cache.plan.shards))
    slices = [safe_open(shard_path(cache.path, number), "pt").get_slice("hidden") for number in numbers]

    def read(members: Sequence[int]) -> None:
        at = 0
        for member in members:
            first, count = int(places.first[member]), int(places.count[member])
            buffer[at : at + count] = slices[places.shard[member]][first : first + count]
            at += count

    return read


def read_torch(cache: Cache, folder: Path, buffer: torch.Tensor) -> Reader:
    """One file a sample, as trainers that cache hidden states keep them."""
    folder.mkdir(exist_ok=True)
    for index, view in enumerate(cache):
        torch.save(torch.from_numpy(view.rows.view(np.int16).copy()).view(torch.bfloat16), folder / f"{index}.pt")

    def read(members: Sequence[int]) -> None:
        at = 0
        for member in members:
            rows = torch.load(folder / f"{member}.pt", mmap=True)
            buffer[at : at + len(rows)] = rows
            at += len(rows)

    return read


def read_arrow(cache: Cache, places: Places, path: Path, buffer: np.ndarray) -> Reader:
    """One Arrow IPC file, mapped once: a record batch a shard, a binary value a sample."""
    schema = pa.schema([("rows", pa.large_binary())])
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        for number, shard in enumerate(cache.plan.shards):
            mapped = cache.shard(number)
            values = [mapped.sample(index).rows.tobytes() for index in range(shard.num_samples)]
            writer.write_batch(pa.record_batch([pa.array(values, pa.large_binary())], schema=schema))
    reader = pa.ipc.open_file(pa.memory_map(str(path)))
    firsts = np.array([shard.first_sample for shard in cache.plan.shards])

    def read(members: Sequence[int]) -> None:
        at = 0
        for member in members:
            shard, count = int(places.shard[member]), places.count[member]
            value = reader.get_batch(shard).column(0)[member - int(firsts[shard])].as_buffer()
            np.copyto(buffer[at : at + count], np.frombuffer(value, np.uint8).reshape(count, -1))
            at += count

    return read


def timed(read: Reader, members: Sequence[int]) -> float:
    began = time.thread_time()
    read(members)
    return time.thread_time() - began


def steady(cache: Cache, readers: dict[str, Reader], batch: int, rounds: int) -> dict[str, float]:
    """Throughput of each reader over the floor's: the median over rounds of the ratio within one."""
    count = Places(cache).count
    for read in readers.values():  # map, verify and fault in everything once
        for first in range(0, len(cache), batch):
            read(range(first, min(first + batch, len(cache))))
    rng = np.random.default_rng(2)
    ratios: dict[str, list[float]] = {name: [] for name in readers}
    for _ in range(rounds):
        order = rng.permutation(len(cache))
        speed = {}
        for turn, name in enumerate(rng.permutation(list(readers))):
            members = [int(member) for member in np.roll(order, turn * batch)[:batch]]
            speed[name] = count[members].sum() / timed(readers[name], members)
        for name in readers:
            ratios[name].append(speed[name] / speed["floor"])
    return {name: statistics.median(values) for name, values in ratios.items() if name != "floor"}


def first_touch(cache: Cache, floor: Reader, buffer: torch.Tensor, batch: int, rounds: int) -> dict[str, float]:
    """The same for a whole pass in random order, with files opened anew for it."""
    places, rng = Places(cache), np.random.default_rng(3)
    ratios: dict[str, list[float]] = {"kdpipe": [], "safetensors, unverified": []}
    for _ in range(rounds):
        order = [int(member) for member in rng.permutation(len(cache))]
        batches = [order[first : first + batch] for first in range(0, len(order), batch)]
        fresh: dict[str, Reader] = {
            "floor": floor,
            "kdpipe": Packer(of_caches([Cache.open(cache.path)])).pack,
            "safetensors, unverified": read_safetensors(cache, places, buffer),
        }
        seconds = {name: sum(timed(read, members) for members in batches) for name, read in fresh.items()}
        for name in ratios:
            ratios[name].append(seconds["floor"] / seconds[name])
    return {name: statistics.median(values) for name, values in ratios.items()}


def report(case: str, ratios: dict[str, float], *, as_json: bool) -> None:
    rivals = {name: round(value, 3) for name, value in ratios.items() if name != "kdpipe"}
    line = {"bench": "cache_read", "case": case, "metric": "throughput", "unit": "x memcpy"}
    if as_json:
        print(json.dumps({**line, "kdpipe": round(ratios["kdpipe"], 3), "rivals": rivals}), flush=True)
    else:
        others = "  ".join(f"{name} {value}" for name, value in rivals.items())
        print(f"{case:46} kdpipe {ratios['kdpipe']:.3f} x memcpy   {others}", flush=True)


def run(case: Case, folder: Path, *, rounds: int, as_json: bool) -> None:
    cache = make_cache(folder / "cache", samples=make_samples(case), hidden_size=case.hidden_size, shard_tokens=8192)
    places = Places(cache)
    most = case.batch * case.mean_rows * 3 // 2
    # The feed's own kind of buffer. One from malloc starts 16 bytes into a page, and copies from mapped pages into it
    # run at 0.6 of the speed of those between two arrays of malloc's.
    plain = row_buffer(most, 2 * case.hidden_size, torch.uint8, pin=False).numpy()
    tensor = torch.zeros(most, case.hidden_size, dtype=torch.bfloat16)
    readers: dict[str, Reader] = {
        "floor": read_floor(cache, places, plain),
        "kdpipe": read_cache(cache, plain),
        "kdpipe, packed batch": Packer(of_caches([cache])).pack,
        "safetensors": read_safetensors(cache, places, tensor),
        "torch.load mmap": read_torch(cache, folder / "torch", tensor),
        "arrow ipc": read_arrow(cache, places, folder / "rows.arrow", plain),
    }
    report(f"steady {case}", steady(cache, readers, case.batch, rounds), as_json=as_json)
    touched = first_touch(cache, readers["floor"], tensor, case.batch, max(rounds // 8, 3))
    report(f"first touch {case}", touched, as_json=as_json)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--quick", action="store_true", help="half the data and fewer rounds: under a minute")
    parser.add_argument("--folder", type=Path, help="where the files go; the system's temporary folder by default")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    num_bytes, rounds = (512 * MIB, 24) if arguments.quick else (1024 * MIB, 96)
    for hidden_size, mean_rows in ((4096, 512), (1024, 256)):
        folder = Path(tempfile.mkdtemp(prefix="kdpipe-bench-", dir=arguments.folder))
        try:
            case = Case(hidden_size=hidden_size, mean_rows=mean_rows, num_bytes=num_bytes)
            run(case, folder, rounds=rounds, as_json=arguments.json)
        finally:
            shutil.rmtree(folder)


if __name__ == "__main__":
    main()
