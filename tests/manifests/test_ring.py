"""The ring: every message whole, once and in order, whoever is slow, stopped, killed or wrong."""

import gc
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.manifests.ring_sides import LARGEST, ended, forked, payload, read, read_all, write

from kdpipe.manifests.errors import CorruptError, DataError, TemporaryError
from kdpipe.manifests.ring import MAX_MESSAGES, RingEnd, RingReader, RingWriter, make_ring

RING = 16 << 10
"""Bytes: a few messages of LARGEST, so that both sides wait and stretches wrap."""


@pytest.fixture(autouse=True)
def nothing_is_left():
    """No descriptor, and no name of ours in /dev/shm, where other processes have theirs."""
    gc.collect()  # what other tests of this process left to be collected, and what a traceback holds below
    before = len(os.listdir("/proc/self/fd"))
    yield
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before
    assert not [name for name in os.listdir("/dev/shm") if "kdpipe-ring" in name]


def both(num_bytes: int = RING, **options: object) -> tuple[RingWriter, RingReader]:
    ours, theirs = make_ring(num_bytes)
    return RingWriter(ours, **options), RingReader(theirs, **options)  # type: ignore[arg-type]


def send(writer: RingWriter, key: int, data: np.ndarray | None = None) -> None:
    data = payload(key) if data is None else data
    slot = writer.reserve(len(data), f"message {key}")
    slot.array[:] = data
    writer.publish(slot, key)


@pytest.mark.parametrize(("writing", "reading", "hold"), [(0, 0, 0), (50, 0, 0), (0, 50, 0), (30, 40, 3)])
def test_every_message_comes_whole_once_and_in_order(writing: int, reading: int, hold: int) -> None:
    ours, theirs = make_ring(RING)
    child = forked(write, ours, theirs, count=3000, rarely=writing)
    with RingReader(theirs) as ring:
        assert read(ring, rarely=reading, hold=hold) == 3000
        assert ring.take("more") is None, "the end stays the end"
    assert ended(child) == 0


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 5 * RING // 4), min_size=1, max_size=60), st.randoms(use_true_random=False))
def test_no_two_messages_share_a_byte_whatever_the_sizes_and_the_order_of_release(
    sizes: list[int], random: random.Random
) -> None:
    writer, reader = both(patience_s=0.0)
    with writer, reader:
        held: list[tuple[int, np.ndarray]] = []
        messages = {}
        for key, size in enumerate(sizes):
            data = np.full(min(size, RING), key % 251, np.uint8)
            while True:
                try:
                    send(writer, key, data)
                    break
                except TemporaryError:
                    assert held, "an empty ring takes any message that it can hold"
                    messages.pop(held.pop(random.randrange(len(held)))[0]).release()
            messages[key] = reader.take("it")
            held.append((key, data))
            for each, wanted in held:
                assert np.array_equal(messages[each].array, wanted)


def test_a_stretch_is_used_again_to_its_last_byte_and_no_further() -> None:
    writer, reader = both(patience_s=0.0)
    with writer, reader:
        messages = []
        for key, size in enumerate((RING // 4, RING // 4, RING // 2)):
            send(writer, key, np.zeros(size, np.uint8))
            messages.append(reader.take("it"))
        for message in messages[:2]:  # first with the newest before the end of the ring, then with it at the start
            assert message is not None
            message.release()
            with pytest.raises(TemporaryError):
                writer.reserve(RING // 4 + 1, "a byte too many")
            send(writer, 9, np.ones(RING // 4, np.uint8))
        assert messages[2] is not None
        assert not messages[2].array.any()


def test_more_than_the_ring_holds_is_refused_and_its_whole_is_not() -> None:
    writer, reader = both()
    with writer, reader:
        with pytest.raises(ValueError, match="16,385 bytes, the ring holds 16,384"):
            writer.reserve(RING + 1, "it")
        send(writer, 0, np.ones(RING, np.uint8))
        message = reader.take("it")
        assert message is not None
        assert message.array.sum() == RING


def test_its_size_cannot_be_changed_and_all_of_it_is_there() -> None:
    ours, theirs = make_ring(100_000)
    assert os.fstat(ours.memory).st_blocks * 512 >= ours.num_bytes >= 100_000
    for size in (0, 1 << 20):
        with pytest.raises(PermissionError):
            os.ftruncate(theirs.memory, size)
    ours.close()
    theirs.close()


def test_an_end_is_closed_once_whoever_closes_it() -> None:
    ours, theirs = make_ring(RING)
    with RingWriter(ours) as writer:
        ours.close()
        with pytest.raises(ValueError, match="is another's, or closed"):
            RingReader(ours)
        writer.reserve(1, "it is open")
    again = make_ring(RING)
    for end in (ours, theirs, theirs):
        end.close()
    os.fstat(again[0].memory)
    for end in again:
        end.close()


def test_no_room_for_it_is_said_at_once() -> None:
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(MemoryError, match="are available on this machine"):
        make_ring(1 << 60)
    assert len(os.listdir("/proc/self/fd")) == before


def test_bytes_that_are_not_those_that_were_written_are_seen() -> None:
    writer, reader = both()
    with writer, reader:
        slot = writer.reserve(100, "it")
        slot.array[:] = 7
        writer.publish(slot, 41)
        slot.array[99] ^= 1
        with pytest.raises(CorruptError, match=r"sample 41: message 0 \(key 41\) is not what was written"):
            reader.take("sample 41")


def test_another_process_can_fill_a_slot() -> None:
    writer, reader = both()
    with writer, reader:
        writer.reserve(1000, "another")
        slot = writer.reserve(5, "it")
        code = "import os, sys; os.pwrite(os.open(sys.argv[1], os.O_RDWR), b'hello', int(sys.argv[2]))"
        subprocess.run([sys.executable, "-c", code, slot.path, str(slot.offset)], check=True)
        writer.publish(slot, 1)
        message = reader.take("it")
        assert message is not None
        assert message.array.tobytes() == b"hello"


def test_a_slot_that_was_given_up_is_free_again() -> None:
    writer, reader = both(patience_s=0.0)
    with writer, reader:
        for _ in range(3):
            writer.abandon(writer.reserve(RING, "it"))
        with pytest.raises(RuntimeError), reader_of(writer, reader):
            raise RuntimeError
        writer.reserve(RING, "a message that was released in finally")


def reader_of(writer: RingWriter, reader: RingReader):
    send(writer, 0, np.zeros(RING, np.uint8))
    message = reader.take("it")
    assert message is not None
    return message


@pytest.mark.parametrize("which", ["writer", "reader"])
def test_the_error_of_one_side_is_the_others(which: str) -> None:
    writer, reader = both()
    failing, other = (writer, reader) if which == "writer" else (reader, writer)
    with pytest.raises(DataError), failing:
        raise DataError("seven is not a list\n" + "x" * 100_000, where="d:3")
    with other, pytest.raises(DataError, match="E-DATA d:3: seven is not a list x"):
        other.take("it") if isinstance(other, RingReader) else [send(writer, key) for key in range(100)]
    writer, reader = both()
    send(writer, 0)
    with pytest.raises(ZeroDivisionError), writer:
        raise ZeroDivisionError("by zero")
    with reader:
        assert reader.take("what came before it") is not None
        with pytest.raises(TemporaryError, match="ZeroDivisionError: by zero; run the same command again"):
            reader.take("it")


def test_a_side_that_is_silent_is_named_with_its_state_and_since_when() -> None:
    ours, theirs = make_ring(RING)
    child = forked(write, ours, theirs, count=10**9, rarely=1)
    with RingReader(theirs, patience_s=0.3) as ring:
        assert ring.take("it") is not None
        os.kill(child, signal.SIGSTOP)
        says = rf"message \d+: the teacher \(process {child}, stopped\) gave no sign for 0.3 s, since \d\d:\d\d:\d\d;"
        with pytest.raises(TemporaryError, match=says):
            drain(ring, 1, MAX_MESSAGES + 2)
        os.kill(child, signal.SIGCONT)
        message = ring.take("it goes on")
        assert message is not None
    assert ended(child) == TemporaryError.exit_code


def test_two_full_sides_wait_for_no_one_but_each_other() -> None:
    """As many messages as may be on their way, none of them released: the writer waits, bounded, and sends no more."""
    writer, reader = both(1 << 20, patience_s=0.05)
    with writer, reader:
        for key in range(MAX_MESSAGES):
            send(writer, key, np.zeros(1, np.uint8))
        with pytest.raises(TemporaryError, match=r"the student .* gave no sign"):
            writer.reserve(1, "one more")
        messages = [reader.take("it") for _ in range(MAX_MESSAGES)]
        for message in reversed(messages):
            assert message is not None
            message.release()
        for key in range(MAX_MESSAGES):
            send(writer, key, np.zeros(1, np.uint8))


def test_the_time_that_a_side_waits_is_counted() -> None:
    ours, theirs = make_ring(RING)

    def late(end: RingEnd) -> None:
        time.sleep(0.3)
        write(end, count=1)

    child = forked(late, ours, theirs)
    with RingReader(theirs) as ring:
        assert read(ring) == 1
        assert 0.2 < ring.waited_s <= 20
        assert 0.5 < ring.share(ring.waited_s) <= 1.0
    assert ended(child) == 0


def send_all(ring: RingWriter, first: int, after: int) -> None:
    for key in range(first, after):
        send(ring, key)


def drain(ring: RingReader, first: int, after: int) -> int:
    """Take the messages `first` to `after`, each whole and in its turn; `after`."""
    for count in range(first, after):
        message = ring.take(f"message {count}")
        assert message is not None
        with message:
            assert (message.key, np.array_equal(message.array, payload(count))) == (count, True)
    return max(first, after)


# Kills: the one that lives has every message that was sent, sees the other go within a second, and nothing is left.


def kill_the_writer(moment: random.Random) -> None:
    ours, theirs = make_ring(RING)
    child = forked(write, ours, theirs, count=10**9, rarely=100)
    until = time.monotonic() + moment.random() * 0.02
    with RingReader(theirs, patience_s=20) as ring:
        count = 0
        while time.monotonic() < until:
            count = drain(ring, count, count + 1)
        os.kill(child, signal.SIGKILL)
        assert ended(child) == -signal.SIGKILL
        killed = time.monotonic()
        with pytest.raises(TemporaryError, match=r"the teacher.* is gone without a word"):
            drain(ring, count, 10**9)
        assert time.monotonic() - killed < 1.0


def kill_the_reader(moment: random.Random) -> None:
    ours, theirs = make_ring(RING)
    child = forked(read_all, theirs, ours, rarely=100)
    until = time.monotonic() + moment.random() * 0.02
    with RingWriter(ours, patience_s=20) as ring:
        key = 0
        while time.monotonic() < until:
            send(ring, key)
            key += 1
        os.kill(child, signal.SIGKILL)
        assert ended(child) == -signal.SIGKILL
        killed = time.monotonic()
        with pytest.raises(TemporaryError, match=r"the student.* is gone without a word"):
            send_all(ring, key, 10**9)
        assert time.monotonic() - killed < 1.0


def stop_for_a_while(moment: random.Random) -> None:
    """Either side is stopped twice and goes on: nothing is lost."""
    ours, theirs = make_ring(RING)
    child = forked(write, ours, theirs, count=800, rarely=50)
    with RingReader(theirs, patience_s=20) as ring:
        count = 0
        for stop_at in sorted(moment.sample(range(800), 2)):
            count = drain(ring, count, stop_at)
            os.kill(child, signal.SIGSTOP)
            time.sleep(0.005)
            os.kill(child, signal.SIGCONT)
        assert drain(ring, count, 800) == 800
        assert ring.take("the end") is None
    assert ended(child) == 0


HARMS = (kill_the_writer, kill_the_reader, stop_for_a_while)


@pytest.mark.parametrize("harm", HARMS)
def test_kills_and_stops_at_random_moments(harm) -> None:
    for seed in range(15):
        harm(random.Random(seed))


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("harm", HARMS)
def test_500_kills_and_stops_at_random_moments(harm) -> None:
    for seed in range(500):
        harm(random.Random(1000 + seed))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_million_messages() -> None:
    ours, theirs = make_ring(RING)
    child = forked(write, ours, theirs, count=1_000_000, rarely=700)
    with RingReader(theirs) as ring:
        assert read(ring, rarely=900, hold=3) == 1_000_000
    assert ended(child) == 0


def test_the_module_needs_no_library_of_models() -> None:
    code = (
        "import sys, kdpipe.manifests.ring; sys.exit(bool({'torch', 'pyarrow', 'transformers'} & sys.modules.keys()))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=Path(__file__).parents[2]).returncode == 0


def test_the_largest_message_of_the_tests_fits() -> None:
    assert max(len(payload(key)) for key in range(5000)) == LARGEST < RING
