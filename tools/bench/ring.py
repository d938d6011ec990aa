"""Records from one process to another: bytes over the processor time of both sides, as a share of memcpy's; wake-ups.

throughput   the writer copies a record of random bytes in, the reader has it as an array; processor time of both sides
             together, so that other work on the machine disturbs it little. Every reader checks every record's
             digest, which the writer has from the engine's receipt. The floor is np.copyto of as much
wake-up      from just before a record of 64 bytes is sent to the moment a sleeping reader has it; the next one is sent
             50 us after that

Rivals: a pipe, ZMQ over ipc, multiprocessing.Queue, torch.multiprocessing.Queue (a shared tensor a record), and a ring
of chunks with a flag byte each, pickled records and a reader that yields while it waits, as vLLM's MessageQueue.
In each round everybody moves as many bytes in random order; a ratio is taken within a round, medians are printed.
"""

import argparse
import importlib
import json
import multiprocessing
import os
import pickle
import random
import statistics
import time
from collections.abc import Callable, Iterator
from multiprocessing import shared_memory
from typing import Any, Protocol

import numpy as np
import torch.multiprocessing
import xxhash

from kdpipe.manifests.ring import RingReader, RingWriter, Slot, make_ring

zmq: Any = importlib.import_module("zmq")
"""It comes with SGLang: the gate does without it."""
MIB = 1 << 20
SLOTS = 8
SOURCES = 16
"""Records to copy from, more than the processor's caches hold."""


class Way(Protocol):
    """One way: made before the fork; then send and close on one side, receive on the other."""

    def send(self, record: np.ndarray, digest: int) -> None: ...

    def receive(self) -> Iterator[np.ndarray]:
        """Every record to the end."""

    def close(self) -> None: ...


class Ring:
    def __init__(self, size: int) -> None:
        self.ends = make_ring(SLOTS * max(size, 4096))
        self.size = size
        self.writer: RingWriter | None = None
        self.slot: Slot | None = None

    def ready(self) -> None:
        if self.writer is None:
            self.ends[1].close()
            self.writer = RingWriter(self.ends[0])
        self.slot = self.slot or self.writer.reserve(self.size, "a record")

    def send(self, record: np.ndarray, digest: int) -> None:
        self.ready()
        assert self.writer is not None
        assert self.slot is not None
        np.copyto(self.slot.array, record)
        self.writer.publish(self.slot, 0, digest)
        self.slot = None

    def receive(self) -> Iterator[np.ndarray]:
        self.ends[0].close()
        with RingReader(self.ends[1]) as reader:
            for message in reader:
                yield message.array

    def close(self) -> None:
        assert self.writer is not None
        self.writer.finish()
        self.writer.close()


class Pipe:
    def __init__(self, size: int) -> None:
        self.reading, self.writing = os.pipe()
        self.size = size

    def send(self, record: np.ndarray, digest: int) -> None:
        left = record.data
        while left:
            left = left[os.write(self.writing, left) :]

    def receive(self) -> Iterator[np.ndarray]:
        os.close(self.writing)
        record = np.empty(self.size, np.uint8)
        with open(self.reading, "rb", buffering=0) as file:
            while True:
                at = 0
                while at < self.size:
                    count = file.readinto(record.data[at:])
                    if not count:
                        return
                    at += count
                yield record

    def close(self) -> None:
        os.close(self.writing)


class Zmq:
    def __init__(self, size: int) -> None:
        self.address = f"ipc://@kdpipe-bench-{os.getpid()}-{random.random()}"
        self.socket: Any = None

    def send(self, record: np.ndarray, digest: int) -> None:
        if self.socket is None:
            self.socket = zmq.Context().socket(zmq.PUSH)
            self.socket.set_hwm(SLOTS)
            self.socket.connect(self.address)
        self.socket.send(record.data)

    def receive(self) -> Iterator[np.ndarray]:
        socket = zmq.Context().socket(zmq.PULL)
        socket.set_hwm(SLOTS)
        socket.bind(self.address)
        while len(frame := socket.recv(copy=False)):
            yield np.frombuffer(frame.buffer, np.uint8)

    def close(self) -> None:
        self.socket.send(b"")
        self.socket.close(linger=60_000)


class Queue:
    def __init__(self, size: int) -> None:
        self.queue: Any = multiprocessing.get_context("fork").Queue(SLOTS)

    def send(self, record: np.ndarray, digest: int) -> None:
        self.queue.put(record)

    def receive(self) -> Iterator[np.ndarray]:
        while (record := self.queue.get()) is not None:
            yield record

    def close(self) -> None:
        self.queue.put(None)
        self.queue.close()
        self.queue.join_thread()


class TorchQueue(Queue):
    def __init__(self, size: int) -> None:
        self.queue = torch.multiprocessing.get_context("fork").Queue(SLOTS)
        self.taken = torch.multiprocessing.get_context("fork").Semaphore(0)

    def send(self, record: np.ndarray, digest: int) -> None:
        self.queue.put(torch.from_numpy(record).clone())

    def receive(self) -> Iterator[np.ndarray]:
        while (record := self.queue.get()) is not None:
            yield record.numpy()
        self.taken.release()

    def close(self) -> None:
        self.queue.put(None)
        self.taken.acquire(timeout=60)  # a tensor lives as long as the process that sent it
        self.queue.close()
        self.queue.join_thread()


class Chunks:
    """A ring of chunks: byte 0 written, byte 1 read; records pickled into them."""

    def __init__(self, size: int) -> None:
        self.chunk = size + 4096
        self.shared = shared_memory.SharedMemory(create=True, size=SLOTS * self.chunk)
        self.turn = 0

    def send(self, record: np.ndarray | None, digest: int) -> None:
        assert self.shared.buf is not None
        data = pickle.dumps(record, protocol=5)
        at = self.turn % SLOTS * self.chunk
        while self.shared.buf[at] and not self.shared.buf[at + 1]:
            os.sched_yield()
        self.shared.buf[at] = 0
        self.shared.buf[at + 8 : at + 16] = len(data).to_bytes(8, "little")
        self.shared.buf[at + 16 : at + 16 + len(data)] = data
        self.shared.buf[at + 1] = 0
        self.shared.buf[at] = 1
        self.turn += 1

    def receive(self) -> Iterator[np.ndarray]:
        buffer, turn = self.shared.buf, 0
        assert buffer is not None
        while True:
            at = turn % SLOTS * self.chunk
            began = time.monotonic()
            while not (buffer[at] and not buffer[at + 1]):
                os.sched_yield()
                if time.monotonic() - began > 3:
                    time.sleep(0.1)
            record = pickle.loads(buffer[at + 16 : at + 16 + int.from_bytes(buffer[at + 8 : at + 16], "little")])
            buffer[at + 1] = 1
            if record is None:
                return
            yield record
            turn += 1

    def close(self) -> None:
        self.send(None, 0)

    def unlink(self) -> None:
        self.shared.close()
        self.shared.unlink()


WAYS: dict[str, Callable[[int], Way]] = {
    "kdpipe": Ring,
    "pipe": Pipe,
    "ZMQ": Zmq,
    "mp.Queue": Queue,
    "torch.multiprocessing": TorchQueue,
    "chunks, as vLLM": Chunks,
}


def apart(way: Way, send: Callable[[Way], float], receive: Callable[[Way], list[float]]) -> tuple[float, list[float]]:
    """What the sending side and the receiving process return."""
    back, forth = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.write(forth, json.dumps(receive(way)).encode())
        finally:
            os._exit(0)
    os.close(forth)
    spent = send(way)
    way.close()
    with open(back) as file:
        found = json.loads(file.read())
    os.waitpid(child, 0)
    if isinstance(way, Chunks):
        way.unlink()
    return spent, found


def seconds(make: Callable[[int], Way], records: list[np.ndarray], digests: list[int], count: int) -> float:
    """Processor seconds of both sides for `count` records, after a turn of every slot that touches what is new."""

    def send(way: Way) -> float:
        began = 0.0
        for number in range(SLOTS + count):
            if number == SLOTS:
                began = time.process_time()
            way.send(records[number % len(records)], digests[number % len(records)])
        return time.process_time() - began

    def receive(way: Way) -> list[float]:
        began = 0.0
        for number, record in enumerate(way.receive()):
            if number == SLOTS:
                began = time.process_time()
            same = isinstance(way, Ring) or xxhash.xxh3_64_intdigest(record.data) == digests[number % len(records)]
            assert same, "the ring's reader has looked already"
        assert number == SLOTS + count - 1
        return [time.process_time() - began]

    sent, (received,) = apart(make(len(records[0])), send, receive)
    return sent + received


def floor(records: list[np.ndarray], count: int) -> float:
    places = [np.zeros_like(records[0]) for _ in range(SLOTS)]
    began = time.process_time()
    for number in range(count):
        np.copyto(places[number % SLOTS], records[number % len(records)])
    return time.process_time() - began


def wakes(make: Callable[[int], Way], count: int) -> tuple[float, float]:
    """(p50, p99) microseconds until a reader that sleeps has a record of 64 bytes."""

    asked, asking = os.pipe()

    def send(way: Way) -> float:
        record = np.zeros(64, np.uint8)
        for number in range(count):
            if number:
                os.read(asked, 1)
            if isinstance(way, Ring):
                way.ready()  # its place is there before its rows are
            asleep = time.monotonic_ns() + 50_000
            while time.monotonic_ns() < asleep:
                pass
            record[:8] = np.frombuffer(time.monotonic_ns().to_bytes(8, "little"), np.uint8)
            way.send(record, xxhash.xxh3_64_intdigest(record.data))
        return 0.0

    def receive(way: Way) -> list[float]:
        found: list[float] = []
        for record in way.receive():
            found.append(time.monotonic_ns() - int.from_bytes(record[:8].tobytes(), "little"))
            os.write(asking, b".")
        return found

    _, found = apart(make(64), send, receive)
    ordered = sorted(found[count // 10 :])
    return ordered[len(ordered) // 2] / 1000, ordered[len(ordered) * 99 // 100] / 1000


def report(case: str, metric: str, unit: str, values: dict[str, float], *, as_json: bool, digits: int = 3) -> None:
    rivals = {name: round(value, digits) for name, value in values.items() if name != "kdpipe"}
    line = {"bench": "ring", "case": case, "metric": metric, "unit": unit, "kdpipe": round(values["kdpipe"], digits)}
    if as_json:
        print(json.dumps({**line, "rivals": rivals}), flush=True)
    else:
        others = "  ".join(f"{name} {value}" for name, value in rivals.items())
        print(f"{case:24} kdpipe {line['kdpipe']} {unit}   {others}", flush=True)


def throughput(size: int, rounds: int, *, as_json: bool) -> None:
    rng = np.random.default_rng(0)
    records = [rng.integers(0, 256, size, dtype=np.uint8) for _ in range(max(SOURCES, 64 * MIB // size))]
    digests = [xxhash.xxh3_64_intdigest(record.data) for record in records]
    count = max(256 * MIB // size, 16)
    ratios: dict[str, list[float]] = {name: [] for name in WAYS}
    for turn in range(rounds):
        base = floor(records, count)
        for name in random.Random(turn).sample(list(WAYS), len(WAYS)):
            ratios[name].append(base / seconds(WAYS[name], records, digests, count))
    case = f"{size // MIB} MiB" if size >= MIB else f"{size // 1024} KiB"
    medians = {name: statistics.median(values) for name, values in ratios.items()}
    report(f"records of {case}", "throughput", "x memcpy", medians, as_json=as_json)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--quick", action="store_true", help="fewer rounds: under a minute")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rounds, count = (3, 500) if arguments.quick else (11, 3000)
    for size in (4 * MIB, 64 << 10):
        throughput(size, rounds, as_json=arguments.json)
    found = {name: wakes(make, count) for name, make in WAYS.items() if not name.startswith("chunks")}
    for place, name in enumerate(("p50", "p99")):
        values = {way: both[place] for way, both in found.items()}
        report(f"wake-up {name}", "latency", "us", values, as_json=arguments.json, digits=1)


if __name__ == "__main__":
    main()
