"""What it costs to get hidden states out of SGLang: prefill alone, SGLang's own way, and kdpipe's sink into a cache.

    prefill   SGLang over the prompts, no hidden states, all handed over at once: the floor
    stock     the same with return_hidden_states=True, lists made into tensors as every user of it must
    kdpipe    the same prompts through kdpipe's engine into a cache: gate, checksums, fsync and commit

A sample is one token longer than its prompt: its last token is predicted and never computed, and each position of the
prompt has its row in the cache.
Prefill and kdpipe take turns on one engine, since two of the same arguments differ by several percent: each pass of
kdpipe's lies between two of prefill alone and is set against their mean, and the median of these ratios is printed.
SGLang's own way runs three times in an engine without kdpipe's plugin, which is stopped meanwhile because SGLang polls.
Memory is taken in a pass of its own before those that are timed: the largest proportional set size of the engine's
whole tree of processes, beyond its size at rest, and for kdpipe of the extracting process too.
"""

import argparse
import contextlib
import json
import os
import shutil
import signal
import socket
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))  # a script's own folder is all Python adds

TEACHER = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 1, "max_position_embeddings": 2048}
HEADS = {"num_attention_heads": 16, "num_key_value_heads": 8}


def serve_bare(descriptor: int) -> None:
    """A bare SGLang: takes ids, answers with the seconds that all their hidden states took."""
    import sglang
    import torch

    from kdpipe.stages.sglang.session import name_semaphores

    os.set_inheritable(descriptor, False)
    name_semaphores()
    link = Connection(descriptor)
    engine = sglang.Engine(**link.recv())
    link.send("ready")
    with contextlib.suppress(EOFError):
        while True:
            ids = link.recv()
            started = time.perf_counter()
            answers = engine.generate(input_ids=ids, sampling_params={"max_new_tokens": 1}, return_hidden_states=True)
            rows = [torch.tensor(answer["meta_info"]["hidden_states"][0]) for answer in answers]
            assert [len(found) for found in rows] == [len(own) for own in ids]
            link.send(time.perf_counter() - started)


def proportional_bytes(pids: list[int]) -> int:
    """Proportional set size of some processes together."""
    total = 0
    for pid in pids:
        with contextlib.suppress(OSError):
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
            total += next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))
    return total


@contextmanager
def peak_memory(pids: Callable[[], list[int]], found: list[int]) -> Iterator[None]:
    """Append the largest growth of the processes' memory within the block, sampled every 50 ms, which slows them."""
    rest = proportional_bytes(pids())
    peak, over = rest, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not over.wait(0.05):
            peak = max(peak, proportional_bytes(pids()))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()
        found.append(peak - rest)


class Bench:
    """The two engines, the plan, and the three ways."""

    def __init__(self, folder: Path, options: argparse.Namespace) -> None:
        from tests.models import make_model, make_tokenizer

        from kdpipe.manifests.engine import EngineOptions
        from kdpipe.manifests.errors import TeacherError
        from kdpipe.manifests.progress import Silent
        from kdpipe.manifests.samples import Samples
        from kdpipe.manifests.specs import DataSpec, Dtype
        from kdpipe.stages.extract import ExtractSpec
        from kdpipe.stages.extract.staging import staged
        from kdpipe.stages.models.folder import ModelFolder
        from kdpipe.stages.sglang import prefill
        from kdpipe.stages.sglang.arguments import host_environment, server_arguments
        from kdpipe.stages.sglang.session import Session, members
        from kdpipe.stages.teacher.describe import describe_teacher
        from kdpipe.stages.teacher.sglang_engine import SglangTeacher

        sizes = TEACHER | HEADS | {"hidden_size": options.hidden, "num_hidden_layers": options.layers}
        sizes["intermediate_size"] = options.hidden * 11 // 4
        dtype: Dtype = "bfloat16"
        teacher = make_model("llama", folder / "teacher", dtype=dtype, vocab_size=options.vocab, sizes=sizes)
        make_tokenizer(teacher)
        data = folder / "data.jsonl"
        with open(data, "w") as file:
            for number in range(options.samples):
                file.write(json.dumps({"text": f"{number} " + "A teacher writes rows. " * (options.tokens + 1)}) + "\n")
        engine_options = EngineOptions(mem_fraction=0.4 if options.device == "cuda" else None)
        spec = ExtractSpec(
            teacher=teacher,
            data=(data,),
            data_spec=DataSpec(max_length=options.tokens + 1, supervise="all"),
            engine="sglang",
            device=options.device,
        )
        self.folder, self.members = folder, members
        with staged(spec, folder / "plan", Silent()) as plan:
            self.head = plan.head
            self.plan = plan.publish()
        samples = Samples(self.plan.path, self.plan.plan)
        self.ids = [
            ids.values.to_pylist()[:-1]
            for number in range(len(self.plan.plan.shards))
            for ids in samples.shard(number).column("token_ids")
        ]
        self.num_tokens = sum(map(len, self.ids))
        bare = folder / "bare"
        bare.mkdir()
        ours, theirs = socket.socketpair()
        model = ModelFolder(teacher, TeacherError)
        longest = describe_teacher(model).max_positions
        arguments = server_arguments(teacher, dtype, longest, options.device, engine_options, prefill.ARGUMENTS)
        environment = host_environment(folder, options.device, engine_options)
        environment.pop("KDPIPE_SINK")
        self.bare = Session(
            [sys.executable, __file__, "--serve-bare", str(theirs.fileno())],
            env=environment | {"PYTHONPATH": str(Path(__file__).parents[2])},
            folder=bare,
            pass_fds=[theirs.fileno()],
        )
        theirs.close()
        self.link = Connection(ours.detach())
        self.link.send(arguments)
        assert self.link.recv() == "ready"
        self._pause(self.bare, True)
        self.engine = SglangTeacher(model, dtype=dtype, device=options.device, options=engine_options)
        self.engine.canary(self.head, [np.array(ids[:64], np.int32) for ids in self.ids[:2]])
        self._pause(self.session, True)

    @property
    def session(self) -> Any:
        return self.engine.process.session

    def _pause(self, session: Any, paused: bool) -> None:
        for pid in self.members(session.id):
            os.kill(pid, signal.SIGSTOP if paused else signal.SIGCONT)

    def time(self, way: str, number: int, memory: list[int] | None = None) -> float:
        """Seconds of one pass over all samples; the peak of its memory is appended to `memory`."""
        session = self.bare if way == "stock" else self.session
        own = [os.getpid()] if way == "kdpipe" else []
        watched = contextlib.nullcontext()
        if memory is not None:
            watched = peak_memory(lambda: self.members(session.id) + own, memory)  # type: ignore[assignment]
        self._pause(session, False)
        time.sleep(0.2)
        try:
            with watched:
                if way == "kdpipe":
                    return self.extract(number)
                if way == "prefill":
                    return self.prefill()
                self.link.send(self.ids)
                return float(self.link.recv())
        finally:
            self._pause(session, True)

    def prefill(self) -> float:
        """Seconds of the prompts through kdpipe's engine with nothing asked for."""
        from kdpipe.stages.sglang.prefill import Prompt

        prompts = [
            Prompt(key=(0, number, 0), token_ids=np.array(ids, np.int32), order=None, scored=())
            for number, ids in enumerate(self.ids)
        ]
        started = time.perf_counter()
        self.engine._send(prompts)
        for _ in prompts:
            self.engine.process.receive(600.0, lambda: "prefill")
        return time.perf_counter() - started

    def extract(self, number: int) -> float:
        """Seconds until the last shard of a fresh cache is committed, the engine running beforehand."""
        from kdpipe.manifests.cache import Cache
        from kdpipe.manifests.progress import Silent
        from kdpipe.stages.extract.shards import fill

        cache = shutil.copytree(self.plan.path, self.folder / f"cache-{number}")
        started = time.perf_counter()
        fill(Cache.open(cache), self.engine, self.head, Silent(), range(len(self.plan.plan.shards)))
        taken = time.perf_counter() - started
        shutil.rmtree(cache)
        return taken

    def close(self) -> None:
        for session in (self.bare, self.session):
            self._pause(session, False)
        self.engine.close()
        self.bare.end()


def measure(options: argparse.Namespace, repetitions: int) -> tuple[dict[str, list[float]], dict[str, list[int]], int]:
    """Seconds of every repetition by way, bytes likewise, and tokens of a pass."""
    times: dict[str, list[float]] = {"prefill": [], "stock": [], "kdpipe": []}
    memory: dict[str, list[int]] = {way: [] for way in times}
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        bench = Bench(Path(name), options)
        try:
            for way in times:
                bench.time(way, 0)  # the first pass compiles kernels
                bench.time(way, 0, memory[way])
            times["prefill"].append(bench.time("prefill", 0))
            for repetition in range(1, repetitions + 1):
                times["kdpipe"].append(bench.time("kdpipe", repetition))
                times["prefill"].append(bench.time("prefill", repetition))
                print({way: round(taken[-1], 2) for way, taken in times.items() if taken}, file=sys.stderr)
            times["stock"] = [bench.time("stock", 0) for _ in range(3)]
        finally:
            bench.close()
        return times, memory, bench.num_tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--quick", action="store_true", help="fewer repetitions")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=512, help="of a prompt")
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--vocab", type=int, default=32768)
    parser.add_argument("--folder", type=Path, help="where the cache is written; the system's temporary folder")
    parser.add_argument("--serve-bare", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve_bare is not None:
        serve_bare(options.serve_bare)
        return
    times, memory, num_tokens = measure(options, 5 if options.quick else 15)
    floors = [(before + after) / 2 for before, after in pairwise(times["prefill"])]
    ratio = statistics.median(own / floor for own, floor in zip(times["kdpipe"], floors, strict=True))
    stock = statistics.median(times["stock"]) / statistics.median(times["prefill"])
    case = f"{options.samples} x {options.tokens} tokens, hidden {options.hidden}, {options.layers} layers, bf16"
    peaks = {way: max(grown) // 2**20 for way, grown in memory.items()}
    records = [
        ("time", "x prefill alone", round(ratio, 3), {"stock": round(stock, 3)}),
        ("memory", "MiB over the engine at rest", peaks.pop("kdpipe"), peaks),
        (
            "throughput",
            "tokens/s",
            round(num_tokens / statistics.median(times["kdpipe"])),
            {way: round(num_tokens / statistics.median(times[way])) for way in ("prefill", "stock")},
        ),
    ]
    for metric, unit, ours, rivals in records:
        record = {"bench": "sglang_sink", "case": case, "metric": metric, "unit": unit}
        if options.json:
            print(json.dumps(record | {"kdpipe": ours, "rivals": rivals}))
        else:
            print(f"{case}: {metric} {ours} {unit}, {rivals}")


if __name__ == "__main__":
    main()
