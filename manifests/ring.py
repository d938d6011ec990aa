"""Ring: a teacher's rows from one process to another through shared memory, without a name, a copy or a pickle.

    writer_end, reader_end = make_ring(64 << 20)           in the process that starts both sides
    writer:  slot = ring.reserve(num_bytes, who); slot.array[:] = ...; ring.publish(slot, key)       ... ring.finish()
    reader:  with ring.take(who) as message: use(message.array)                                      None: the end
             ring.ask(keys) says what it wants next, in this order; the writer has them in ring.asked
             ring.tell(key, data) says what a key means that the writer cannot know; the writer has it in ring.told

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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import numpy as np
import xxhash

from kdpipe.manifests.errors import CorruptError, KdpipeError, TemporaryError, error_of, fields_of

PACKET = struct.Struct("<4sIQqQQQ16x")
"""Magic, kind, number of the message, key, place, bytes, xxh3-64 of them; both ways. 64 bytes."""
MAGIC = b"kdr1"
HELLO, ROWS, FREED, ASKED, END, FAILED, TOLD = range(1, 8)
MAX_MESSAGES = 64
"""Messages on their way at a time: a socket's buffer holds some 270 of 64 bytes at the system's default."""
MAX_WORDS, MAX_CHARS = 1 << 15, 4000
"""Bytes of the error that a side leaves to the other, and characters of its message."""
MOST_ASKED = 1024
"""Keys that are asked for in one packet."""
ALIGNMENT = 64
LOOK_S = 1.0
"""Between two looks at a peer that is silent."""
PATIENCE_S = 600.0
SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


@dataclass(slots=True)
class RingEnd:
    """One side of a ring as it is handed to a process: descriptors to inherit, and the size.

    As text it fits in an argument: "3,5,67108864"; give `fds` to Popen's pass_fds.
    Invariant: the descriptors are closed once, here or by the reader or writer that was made of it.
    """

    memory: int
    socket: int
    num_bytes: int
    ours: bool = True
    """The descriptors are still this object's to close."""

    @property
    def fds(self) -> tuple[int, int]:
        return self.memory, self.socket

    def __str__(self) -> str:
        return f"{self.memory},{self.socket},{self.num_bytes}"

    @classmethod
    def of(cls, text: str) -> "RingEnd":
        memory, socket, num_bytes = (int(part) for part in text.split(","))
        return cls(memory, socket, num_bytes)

    def __reduce__(self) -> tuple[object, ...]:
        """To a process that is being started, its own copies of the descriptors."""
        from multiprocessing.reduction import DupFd

        return _inherited, (DupFd(self.memory), DupFd(self.socket), self.num_bytes)

    def close(self) -> None:
        """In a process that only passes it on: the other side sees an end as gone when the last copy is closed."""
        if self.ours:
            self.ours = False
            for number in self.fds:
                os.close(number)


def _inherited(memory: Any, socket: Any, num_bytes: int) -> RingEnd:
    return RingEnd(memory.detach(), socket.detach(), num_bytes)


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
    who: what it is for, in errors
    """

    number: int
    array: np.ndarray
    path: str
    offset: int
    who: str


Packet = tuple[int, int, int, int, int, int]
"""Kind, number, key, place, bytes, digest; 0 where a kind has no use for it."""


class _Side:
    """What both sides have: the memory, the socket, bounded waits, and how long they waited.

    peer: who is on the other side, for messages
    patience_s: longest silence of the other side while it is waited for
    waited_s: seconds spent waiting
    """

    _kinds: tuple[int, ...]
    """Of the packets that the other side sends, besides HELLO and FAILED."""

    def __init__(self, end: RingEnd, *, peer: str, patience_s: float, writable: bool) -> None:
        if not end.ours:
            raise ValueError("this end of a ring is another's, or closed")
        end.ours = False
        self.num_bytes, self.peer, self._patience_s = end.num_bytes, peer, patience_s
        access = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
        # Every page is mapped now: on first touch each would cost a fault, as long as the copy of its bytes.
        self._map = mmap.mmap(end.memory, end.num_bytes, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE, prot=access)
        self._bytes = np.frombuffer(self._map, np.uint8)
        self._memory = end.memory
        self._socket = socket.socket(fileno=end.socket)
        # The socket itself wakes from a wait now and then: one system call, where poll and recv are two.
        look_s = min(LOOK_S, max(patience_s, 0.001))
        look = struct.pack("ll", int(look_s), int(look_s % 1 * 1e6))
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, look)
        self._buffer = bytearray(PACKET.size + MAX_WORDS)
        self._peer_pid = 0
        self.waited_s = 0.0
        self._started = time.monotonic()
        self._closed = False
        self._send(HELLO, os.getpid())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, err: BaseException | None, _: TracebackType | None) -> None:
        """Leave the error to the other side, where there is one, and close."""
        if err is not None:
            self.fail(err)
        self.close()

    def share(self, seconds: float) -> float:
        """Of the time since the start: of `waited_s`, for one."""
        return seconds / max(time.monotonic() - self._started, 1e-9)

    def fail(self, err: BaseException) -> None:
        """Tell the other side why there will be no more; it raises the same error."""
        if not isinstance(err, KdpipeError):
            err = TemporaryError(f"{type(err).__name__}: {err}; run the same command again")
        fields = {name: value and value[:MAX_CHARS] for name, value in fields_of(err).items()}
        if not self._closed:
            self._send(FAILED, 0, words=json.dumps(fields, ensure_ascii=False).encode())

    def close(self) -> None:
        """Let go of the ring: the other side sees it at once. Arrays of it must not be used any more."""
        if not self._closed:
            self._closed = True
            self._socket.close()
            os.close(self._memory)
            self._bytes = np.empty(0, np.uint8)
            with contextlib.suppress(BufferError):  # an array is still held, and the mapping with it
                self._map.close()

    def look(self, who: str) -> None:
        """Take in what has arrived, without a wait. Raises as a wait does."""
        while (packet := self._read(who, socket.MSG_DONTWAIT)) is not None:
            self._take_in(packet)

    def fileno(self) -> int:
        """For select and poll."""
        return self._socket.fileno()

    def _take_in(self, packet: Packet) -> None:
        raise NotImplementedError

    def _send(
        self,
        kind: int,
        number: int,
        key: int = 0,
        offset: int = 0,
        num_bytes: int = 0,
        digest: int = 0,
        *,
        words: bytes = b"",
    ) -> bool:
        """Whether the other side is still there to read it.

        The writer's packets always find room: see MAX_MESSAGES. What a reader asks for may have to wait until the
        writer has read what was asked before, which it does whenever it waits itself.
        """
        packet = PACKET.pack(MAGIC, kind, number, key, offset, num_bytes, digest) + words
        began = time.monotonic()
        while True:
            try:
                self._socket.send(packet, socket.MSG_DONTWAIT)
                return True
            except (BrokenPipeError, ConnectionResetError):
                return False
            except BlockingIOError:
                if time.monotonic() - began >= self._patience_s:
                    raise self._silent("what it is asked for") from None
                select.select([], [self._socket], [], LOOK_S)

    def _receive(self, who: str) -> Packet:
        """The next packet, waited for.

        Raises TemporaryError where the other side is gone, or silent for `patience_s`, and the error that it left.
        """
        began = time.monotonic()
        try:
            while (packet := self._read(who)) is None:
                if time.monotonic() - began >= self._patience_s:
                    raise self._silent(who)
            return packet
        finally:
            self.waited_s += time.monotonic() - began

    def _read(self, who: str, flags: int = 0) -> Packet | None:
        """The next packet; None for a while without one. Raises as `_receive`."""
        while True:
            try:
                size = self._socket.recv_into(self._buffer, 0, flags)
            except BlockingIOError:
                return None
            except ConnectionResetError:
                continue  # it went with packets of ours unread; what it sent before comes now
            if not size:
                gone = f"{self._who()} is gone without a word; run the same command again"
                raise TemporaryError(gone, where=who)
            magic, kind, number, key, offset, num_bytes, digest = PACKET.unpack_from(self._buffer)
            if magic == MAGIC and kind in self._kinds and offset + num_bytes <= self.num_bytes:
                return kind, number, key, offset, num_bytes, digest
            if magic == MAGIC and kind == HELLO:
                self._peer_pid = number
            elif magic == MAGIC and kind == FAILED:
                raise error_of(json.loads(self._buffer[PACKET.size : size]))
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
    """The side that fills the ring.

    asked: keys that the reader has asked for and nobody has taken from here, oldest first
    told: what the reader said of a key, until somebody takes it from here
    ended: the reader has said that it asks for nothing more
    """

    _kinds = (FREED, ASKED, TOLD, END)

    def __init__(self, end: RingEnd, *, peer: str = "the student", patience_s: float = PATIENCE_S) -> None:
        super().__init__(end, peer=peer, patience_s=patience_s, writable=True)
        self._used: deque[_Extent] = deque()
        self._by_number: dict[int, _Extent] = {}
        self._next = 0
        self.asked: deque[int] = deque()
        self.told: dict[int, bytes] = {}
        self._telling = b""
        self.ended = False
        self._path = f"/proc/{os.getpid()}/fd/{self._memory}"

    def reserve(self, num_bytes: int, who: str) -> Slot:
        """A place for a message, as soon as the reader has freed enough; who: what it is for, in errors.

        Raises ValueError for more than the ring holds, TemporaryError where the reader is gone or silent too long, and
        the reader's own error where it left one.
        """
        size = max(-(-num_bytes // ALIGNMENT) * ALIGNMENT, ALIGNMENT)
        if size > self.num_bytes:
            raise ValueError(f"a message of {num_bytes:,} bytes, the ring holds {self.num_bytes:,}")
        while not self.has_room(num_bytes):
            self._take_in(self._receive(who))
            self.look(who)
        start = self._place(size)
        assert start is not None
        extent = _Extent(self._next, start, start + size)
        self._used.append(extent)
        self._by_number[extent.number] = extent
        self._next += 1
        return Slot(extent.number, self._bytes[start : start + num_bytes], self._path, start, who)

    def has_room(self, num_bytes: int) -> bool:
        """Whether `reserve` would not have to wait."""
        return self._place(max(-(-num_bytes // ALIGNMENT) * ALIGNMENT, ALIGNMENT)) is not None

    def publish(self, slot: Slot, key: int, checksum: int | None = None) -> None:
        """Hand a filled slot to the reader. checksum: xxh3-64 of its bytes where it is known. Raises as `reserve`."""
        digest = xxhash.xxh3_64_intdigest(slot.array.data) if checksum is None else checksum
        if not self._send(ROWS, slot.number, key, slot.offset, slot.array.nbytes, digest):
            while True:  # its last words, or that it left none
                self._receive(slot.who)

    def abandon(self, slot: Slot) -> None:
        """A slot that will not be published."""
        self._release(slot.number)

    def finish(self, who: str = "the end") -> None:
        """Tell the reader that there is no more, and wait until it has freed all it was given."""
        self._send(END, self._next, int(self.waited_s * 1000))
        while self._used:
            self._take_in(self._receive(who))

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

    def _take_in(self, packet: Packet) -> None:
        kind, number, key, _, _, is_last = packet
        if kind == FREED:
            self._release(number)
        elif kind == ASKED:
            self.asked.extend(np.frombuffer(self._buffer, np.int64, number, PACKET.size).tolist())
        elif kind == TOLD:
            self._telling += bytes(self._buffer[PACKET.size : PACKET.size + number])
            if is_last:
                self.told[key], self._telling = self._telling, b""
        else:
            self.ended = True

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
    peer_waited_s: seconds that the writer spent waiting, known at the end
    """

    _kinds = (ROWS, END)

    def __init__(
        self, end: RingEnd, *, peer: str = "the teacher", patience_s: float = PATIENCE_S, verify: bool = True
    ) -> None:
        super().__init__(end, peer=peer, patience_s=patience_s, writable=False)
        self._verify = verify
        self._held: set[int] = set()
        self._ended = False
        self.peer_waited_s = 0.0

    def take(self, who: str) -> Message | None:
        """The next message, None after the last; who: what it is for, in errors.

        Raises TemporaryError where the writer is gone before its end mark or silent too long, the writer's own error
        where it left one, CorruptError for bytes that are not those that were written.
        """
        if self._ended:
            return None
        kind, number, key, offset, num_bytes, digest = self._receive(who)
        if kind == END:
            self._ended, self.peer_waited_s = True, key / 1000
            return None
        array = self._bytes[offset : offset + num_bytes]
        message = Message(key, array, number, self)
        self._held.add(number)
        if self._verify and xxhash.xxh3_64_intdigest(array.data) != digest:
            raise CorruptError(f"message {number} (key {key}) is not what was written", where=who)
        return message

    def __iter__(self) -> Iterator[Message]:
        """Every message to the end, each released when the next is asked for."""
        while (message := self.take("the next message")) is not None:
            with message:
                yield message

    def ask(self, keys: np.ndarray) -> None:
        """Say what is wanted next, in this order: int64 [any]."""
        wanted = np.ascontiguousarray(keys, np.int64)
        for first in range(0, len(wanted), MOST_ASKED):
            some = wanted[first : first + MOST_ASKED]
            self._send(ASKED, len(some), words=some.tobytes())

    def tell(self, key: int, data: bytes) -> None:
        """Say what a key means, before it is asked for: a text of the student's own, for one."""
        for first in range(0, max(len(data), 1), MAX_WORDS):
            some = data[first : first + MAX_WORDS]
            self._send(TOLD, len(some), key, digest=int(first + len(some) == len(data)), words=some)

    def finish(self) -> None:
        """Say that nothing more will be asked for."""
        self._send(END, 0)

    def release(self, message: Message) -> None:
        if message.number in self._held and not self._closed:
            self._held.discard(message.number)
            message.array = message.array[:0]
            self._send(FREED, message.number)


def look_at_all(rings: Sequence[RingWriter], who: str) -> None:
    """Take in what has arrived in any of them. Raises as they do; an error that one left comes before a silence."""
    errors = []
    for ring in rings:
        try:
            ring.look(who)
        except KdpipeError as err:
            errors.append(err)
    if errors:
        raise next((err for err in errors if type(err) is not TemporaryError), errors[0])


def wait_for_any(rings: Sequence[RingWriter], who: str, patience_s: float = PATIENCE_S) -> None:
    """Wait until one of them has something to take in. Raises TemporaryError after `patience_s` of silence."""
    began = time.monotonic()
    try:
        while not select.select(rings, [], [], LOOK_S)[0]:
            if time.monotonic() - began >= patience_s:
                raise TemporaryError(f"no sign for {patience_s:g} s; run the same command again", where=who)
    finally:
        for ring in rings:
            ring.waited_s += time.monotonic() - began
