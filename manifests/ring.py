"""Ring: a teacher's rows from one process to another through shared memory, without a name, a copy or a pickle.

    writer_end, reader_end = make_ring(64 << 20)           in the process that starts both sides
    writer:  slot = ring.reserve(num_bytes, who); slot.array[:] = ...; ring.publish(slot, key)       ... ring.finish()
    reader:  with ring.take(who) as message: use(message.array)                                      None: the end

The payload lies in a memfd, allocated in full and sealed against another size; turns go over a SOCK_SEQPACKET pair, a
descriptor of 64 bytes a message, and a credit back when its slot is free again. The system call orders the memory.
Invariants: a message is seen whole, once and in order, or not at all; a peer that is gone is seen at once, as the end
of its socket; nothing has a name, so nothing is left when both are gone; neither side ever blocks in a send, as fewer
messages are on their way than the socket holds. A wait is bounded and says whom it waits for, and since when.
Cost: two system calls a message and side; the reader checks the payload's digest (25 GB/s) unless it is not wanted.
"""

import contextlib
import fcntl
import json
import mmap
import os
import select
import socket
import struct
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import TracebackType
from typing import NamedTuple, Self

import numpy as np
import xxhash

from kdpipe.manifests.errors import CorruptError, KdpipeError, TemporaryError, error_of, fields_of

PACKET = struct.Struct("<4sIQqQQQ16x")
"""Magic, kind, number of the message, key, place, bytes, xxh3-64 of them; both ways. 64 bytes."""
MAGIC = b"kdr1"
HELLO, ROWS, FREED, END, FAILED = range(1, 6)
MAX_MESSAGES = 64
"""Messages on their way at a time: a socket's buffer holds some 270 of 64 bytes at the system's default."""
MAX_WORDS, MAX_CHARS = 1 << 15, 4000
"""Bytes of the error that a side leaves to the other, and characters of its message."""
ALIGNMENT = 64
LOOK_S = 1.0
"""Between two looks at a peer that is silent."""
PATIENCE_S = 600.0
SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


@dataclass(frozen=True, slots=True)
class RingEnd:
    """One side of a ring as it is handed to a process: descriptors to inherit, and the size.

    As text it fits in an argument: "3,5,67108864"; give `fds` to Popen's pass_fds.
    """

    memory: int
    socket: int
    num_bytes: int

    @property
    def fds(self) -> tuple[int, int]:
        return self.memory, self.socket

    def __str__(self) -> str:
        return f"{self.memory},{self.socket},{self.num_bytes}"

    @classmethod
    def of(cls, text: str) -> "RingEnd":
        return cls(*(int(part) for part in text.split(",")))

    def close(self) -> None:
        """In a process that only passes it on: the other side sees an end as gone when the last copy is closed."""
        for number in self.fds:
            with contextlib.suppress(OSError):
                os.close(number)


def make_ring(num_bytes: int) -> tuple[RingEnd, RingEnd]:
    """The writer's end and the reader's. Raises MemoryError where there is no room for it."""
    size = -(-max(num_bytes, 1) // mmap.PAGESIZE) * mmap.PAGESIZE
    if size > (available := _available_bytes()):  # to allocate more would be the end of some process, not an error
        raise MemoryError(f"a ring of {size:,} bytes, {available:,} are available on this machine")
    memory = os.memfd_create("kdpipe-ring", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.posix_fallocate(memory, 0, size)
    except OSError as err:
        os.close(memory)
        raise MemoryError(f"a ring of {size:,} bytes: {os.strerror(err.errno or 0)}") from None
    fcntl.fcntl(memory, fcntl.F_ADD_SEALS, SEALS)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    return RingEnd(memory, ours.detach(), size), RingEnd(os.dup(memory), theirs.detach(), size)


def _available_bytes() -> int:
    """Memory that can be had without swapping."""
    with open("/proc/meminfo") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable:"))


@dataclass(slots=True, eq=False)
class Slot:
    """A place in the ring that is being filled.

    array: uint8 [num_bytes], shared memory
    path, offset: the same place as a file and a byte offset, for another process of the same user
    """

    number: int
    array: np.ndarray
    path: str
    offset: int


class Packet(NamedTuple):
    """What travels over the socket; fields that a kind has no use for are 0."""

    kind: int
    number: int
    key: int = 0
    offset: int = 0
    num_bytes: int = 0
    digest: int = 0


class _Side:
    """What both sides have: the memory, the socket, bounded waits, and how long they waited.

    peer: who is on the other side, for messages
    patience_s: longest silence of the other side while it is waited for
    waited_s: seconds spent waiting
    """

    _kinds: tuple[int, ...]
    """Of the packets that the other side sends, besides HELLO and FAILED."""

    def __init__(self, end: RingEnd, *, peer: str, patience_s: float, writable: bool) -> None:
        self.num_bytes, self.peer, self._patience_s = end.num_bytes, peer, patience_s
        access = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
        self._map = mmap.mmap(end.memory, end.num_bytes, prot=access)
        self._bytes = np.frombuffer(self._map, np.uint8)
        self._memory = end.memory
        self._socket = socket.socket(fileno=end.socket)
        self._socket.setblocking(False)
        self._poll = select.poll()
        self._poll.register(self._socket, select.POLLIN)
        self._buffer = bytearray(PACKET.size + MAX_WORDS)
        self._peer_pid = 0
        self.waited_s = 0.0
        self._started = time.monotonic()
        self._closed = False
        self._send(Packet(HELLO, os.getpid()))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, err: BaseException | None, _: TracebackType | None) -> None:
        """Leave the error to the other side, where there is one, and close."""
        if err is not None:
            self.fail(err)
        self.close()

    def share_waiting(self) -> float:
        """Of the time since the start."""
        return self.waited_s / max(time.monotonic() - self._started, 1e-9)

    def fail(self, err: BaseException) -> None:
        """Tell the other side why there will be no more; it raises the same error."""
        if not isinstance(err, KdpipeError):
            err = TemporaryError(f"{type(err).__name__}: {err}; run the same command again")
        fields = {name: value and value[:MAX_CHARS] for name, value in fields_of(err).items()}
        if not self._closed:
            self._send(Packet(FAILED, 0), json.dumps(fields, ensure_ascii=False).encode())

    def close(self) -> None:
        """Let go of the ring: the other side sees it at once. Arrays of it must not be used any more."""
        if not self._closed:
            self._closed = True
            self._socket.close()
            os.close(self._memory)
            self._bytes = np.empty(0, np.uint8)
            with contextlib.suppress(BufferError):  # an array is still held, and the mapping with it
                self._map.close()

    def _send(self, packet: Packet, words: bytes = b"") -> None:
        """Never blocks: see MAX_MESSAGES. What the other side no longer reads is lost with it."""
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self._socket.send(PACKET.pack(MAGIC, *packet) + words)

    def _receive(self, who: str, *, wait: bool) -> Packet | None:
        """The next packet; None where there is none yet and `wait` is false.

        Raises TemporaryError where the other side is gone, or silent for `patience_s`, and the error that it left.
        """
        if (packet := self._read(who)) is not None or not wait:
            return packet
        began = time.monotonic()
        try:
            while (packet := self._read(who)) is None:
                left = began + self._patience_s - time.monotonic()
                if left <= 0.0:
                    raise self._silent(who)
                self._poll.poll(min(left, LOOK_S) * 1000)
        finally:
            self.waited_s += time.monotonic() - began
        return packet

    def _read(self, who: str) -> Packet | None:
        """The next packet that is there."""
        while True:
            try:
                size = self._socket.recv_into(self._buffer)
            except BlockingIOError:
                return None
            except ConnectionResetError:
                continue  # it went with packets of ours unread; what it sent before comes now
            if not size:
                gone = f"{self._who()} is gone without a word; run the same command again"
                raise TemporaryError(gone, where=who)
            magic, *fields = PACKET.unpack_from(self._buffer) if size >= PACKET.size else (b"",)
            packet = Packet(*fields) if magic == MAGIC else Packet(0, 0)
            if packet.kind == HELLO:
                self._peer_pid = packet.number
            elif packet.kind == FAILED:
                raise error_of(json.loads(self._buffer[PACKET.size : size]))
            elif packet.kind in self._kinds and packet.offset + packet.num_bytes <= self.num_bytes:
                return packet
            else:
                raise CorruptError(f"{self._who()} sent {bytes(self._buffer[:16])!r}, which means nothing", where=who)

    def _silent(self, who: str) -> TemporaryError:
        since = time.strftime("%H:%M:%S", time.localtime(time.time() - self._patience_s))
        return TemporaryError(
            f"{self._who()} gave no sign for {self._patience_s:g} s, since {since}; run the same command again",
            where=who,
        )

    def _who(self) -> str:
        return f"{self.peer} (process {self._peer_pid}, {_state_of(self._peer_pid)})" if self._peer_pid else self.peer


def _state_of(pid: int) -> str:
    """Of a process, as /proc has it: "stopped", "running" ..."""
    try:
        with open(f"/proc/{pid}/status") as file:
            line = next(line for line in file if line.startswith("State:"))
    except (OSError, StopIteration):
        return "gone"
    return line.partition("(")[2].strip().rstrip(")") or "alive"


@dataclass(slots=True, eq=False)
class _Extent:
    """A stretch of the ring that is in use, in the order of reservation."""

    number: int
    start: int
    stop: int
    free: bool = False


class RingWriter(_Side):
    """The side that fills the ring."""

    _kinds = (FREED,)

    def __init__(self, end: RingEnd, *, peer: str = "the student", patience_s: float = PATIENCE_S) -> None:
        super().__init__(end, peer=peer, patience_s=patience_s, writable=True)
        self._used: deque[_Extent] = deque()
        self._by_number: dict[int, _Extent] = {}
        self._next = 0
        self._path = f"/proc/{os.getpid()}/fd/{self._memory}"

    def reserve(self, num_bytes: int, who: str) -> Slot:
        """A place for a message, as soon as the reader has freed enough; who: what it is for, in errors.

        Raises ValueError for more than the ring holds, TemporaryError where the reader is gone or silent too long, and
        the reader's own error where it left one.
        """
        size = max(-(-num_bytes // ALIGNMENT) * ALIGNMENT, ALIGNMENT)
        if size > self.num_bytes:
            raise ValueError(f"a message of {num_bytes:,} bytes, the ring holds {self.num_bytes:,}")
        while self._take_credit(who, wait=False):
            pass
        while (start := self._place(size)) is None:
            self._take_credit(who, wait=True)
        extent = _Extent(self._next, start, start + size)
        self._used.append(extent)
        self._by_number[extent.number] = extent
        self._next += 1
        return Slot(extent.number, self._bytes[start : start + num_bytes], self._path, start)

    def publish(self, slot: Slot, key: int, checksum: int | None = None) -> None:
        """Hand a filled slot to the reader. checksum: xxh3-64 of its bytes where it is known."""
        digest = xxhash.xxh3_64_intdigest(slot.array.data) if checksum is None else checksum
        self._send(Packet(ROWS, slot.number, key, slot.offset, slot.array.nbytes, digest))

    def abandon(self, slot: Slot) -> None:
        """A slot that will not be published."""
        self._release(slot.number)

    def finish(self, who: str = "the end") -> None:
        """Tell the reader that there is no more, and wait until it has freed all it was given."""
        self._send(Packet(END, self._next))
        while self._used:
            self._take_credit(who, wait=True)

    @property
    def num_waiting(self) -> int:
        """Slots that are reserved, or published and not yet freed."""
        return len(self._used)

    def _place(self, size: int) -> int | None:
        """Where a stretch of `size` bytes is free: behind the newest, or at the start again; None for nowhere."""
        if not self._used:
            return 0
        if len(self._used) >= MAX_MESSAGES:
            return None
        first, last = self._used[0].start, self._used[-1].stop
        if last > first:  # in use: first to last
            return last if last + size <= self.num_bytes else 0 if size <= first else None
        return last if last + size <= first else None

    def _take_credit(self, who: str, *, wait: bool) -> bool:
        """Whether a slot was freed."""
        packet = self._receive(who, wait=wait)
        if packet is not None:
            self._release(packet.number)
        return packet is not None

    def _release(self, number: int) -> None:
        self._by_number.pop(number).free = True
        while self._used and self._used[0].free:
            self._used.popleft()


@dataclass(slots=True, eq=False)
class Message:
    """A message of the ring: its key and its bytes, a view valid until `release`, or the end of the `with` block."""

    key: int
    array: np.ndarray
    number: int
    ring: "RingReader" = field(repr=False)

    def __enter__(self) -> "Message":
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def release(self) -> None:
        """The slot is free. Running it twice is fine."""
        self.ring.release(self)


class RingReader(_Side):
    """The side that reads it.

    verify: check every message's digest
    """

    _kinds = (ROWS, END)

    def __init__(
        self, end: RingEnd, *, peer: str = "the teacher", patience_s: float = PATIENCE_S, verify: bool = True
    ) -> None:
        super().__init__(end, peer=peer, patience_s=patience_s, writable=False)
        self._verify = verify
        self._held: dict[int, Message] = {}
        self._ended = False

    def take(self, who: str) -> Message | None:
        """The next message, None after the last; who: what it is for, in errors.

        Raises TemporaryError where the writer is gone before its end mark or silent too long, the writer's own error
        where it left one, CorruptError for bytes that are not those that were written.
        """
        if self._ended:
            return None
        packet = self._receive(who, wait=True)
        assert packet is not None
        if packet.kind == END:
            self._ended = True
            return None
        array = self._bytes[packet.offset : packet.offset + packet.num_bytes]
        message = Message(packet.key, array, packet.number, self)
        self._held[packet.number] = message
        if self._verify and xxhash.xxh3_64_intdigest(array.data) != packet.digest:
            raise CorruptError(f"message {packet.number} (key {packet.key}) is not what was written", where=who)
        return message

    def __iter__(self) -> Iterator[Message]:
        """Every message to the end, each released when the next is asked for."""
        while (message := self.take("the next message")) is not None:
            with message:
                yield message

    def release(self, message: Message) -> None:
        if self._held.pop(message.number, None) is not None and not self._closed:
            message.array = message.array[:0]
            self._send(Packet(FREED, message.number))
