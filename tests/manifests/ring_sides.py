"""The two sides of a ring as processes of their own: what is sent is a function of its key."""

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable

import numpy as np

from kdpipe.manifests.errors import KdpipeError
from kdpipe.manifests.ring import RingEnd, RingReader, RingWriter

LARGEST = 3000


def payload(key: int) -> np.ndarray:
    """uint8 of 0 to LARGEST bytes."""
    size = key * 7919 % (LARGEST + 1)
    return (np.arange(size, dtype=np.uint64) * (2 * key + 1) + key >> 3).astype(np.uint8)


def pause(key: int, rarely: int) -> None:
    """A short sleep before one message in `rarely`, never where it is 0."""
    if rarely and key * 2654435761 % rarely == 0:
        time.sleep(key % 5 / 5000)


def forked(function: Callable[..., None], end: RingEnd, *others: RingEnd, **options: object) -> int:
    """The pid of a child that runs function(end, **options); the parent's copy of `end` is closed.

    Exit status: 0, or that of the error of ours that ended it.
    """
    pid = os.fork()
    if pid:
        end.close()
        return pid
    status = 99
    try:
        for other in others:
            other.close()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        function(end, **options)
        status = 0
    except KdpipeError as err:
        status = err.exit_code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def ended(pid: int, timeout_s: float = 20.0) -> int:
    """The child's exit status, minus the signal that killed it. It is killed where it does not end in time."""
    until = time.monotonic() + timeout_s
    while time.monotonic() < until:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    raise AssertionError(f"process {pid} did not end in {timeout_s} s")


def write(end: RingEnd, *, count: int, rarely: int = 0, first: int = 0) -> None:
    """Send the messages `first` to `count`."""
    with RingWriter(end, patience_s=20) as ring:
        for key in range(first, count):
            data = payload(key)
            slot = ring.reserve(len(data), f"message {key}")
            pause(key, rarely)
            slot.array[:] = data
            ring.publish(slot, key)
        ring.finish()


def read(ring: RingReader, *, rarely: int = 0, hold: int = 0) -> int:
    """Take messages to the end or an error and compare each; the number of whole ones, in order from 0.

    hold: messages kept a while, and released in another order than they came
    """
    count, held = 0, []
    while (message := ring.take(f"message {count}")) is not None:
        assert message.key == count
        assert np.array_equal(message.array, payload(count))
        count += 1
        pause(count, rarely)
        held.append(message)
        if len(held) > hold:
            held.pop(count * 31 % len(held)).release()
    for message in held:
        message.release()
    return count


def read_all(end: RingEnd, *, rarely: int = 0, hold: int = 0) -> None:
    with RingReader(end, patience_s=20) as ring:
        read(ring, rarely=rarely, hold=hold)
