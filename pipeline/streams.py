"""Streams: stdout and stderr that outlast their disk, their pipe and their terminal.

    with lasting_streams() as lost: ...; lost("stdout") is the error of the first byte that was dropped, None for none

Invariant: a write to stdout or stderr never raises, whoever writes: a log that cannot be written is no lost run. What
is dropped is remembered, so that the command line can say it once at its end. Cost: none that shows.
"""

import contextlib
import io
import os
import sys
from collections.abc import Callable, Iterator
from typing import Literal, TextIO

DESCRIPTORS = {"stdout": 1, "stderr": 2}
Name = Literal["stdout", "stderr"]


class Lasting(io.FileIO):
    """A descriptor to write to; what cannot be written is dropped, `lost` is the first error."""

    lost: OSError | None = None

    def write(self, data: object, /) -> int:
        try:
            return super().write(data)  # type: ignore[arg-type]  # FileIO's own
        except OSError as err:
            self.lost = self.lost or err
            return memoryview(data).nbytes  # type: ignore[arg-type]


def lost(stream: TextIO) -> OSError | None:
    """The error of the first write to a stream that was dropped; None where it lost nothing."""
    return getattr(getattr(getattr(stream, "buffer", None), "raw", None), "lost", None)


@contextlib.contextmanager
def lasting_streams() -> Iterator[Callable[[Name], OSError | None]]:
    """While it lasts, sys.stdout and sys.stderr drop what they cannot write."""
    _open_closed()
    before = (sys.stdout, sys.stderr)
    for stream in before:
        if stream is not None:
            stream.flush()
    made = {name: _lasting(number) for name, number in DESCRIPTORS.items()}
    sys.stdout, sys.stderr = made["stdout"], made["stderr"]
    try:
        yield lambda name: lost(made[name])
    finally:
        for stream in made.values():
            stream.flush()
        sys.stdout, sys.stderr = before


def _lasting(descriptor: int) -> TextIO:
    """Names of files need not be text: what has no place in UTF-8 is spelled out, in JSON too."""
    raw = Lasting(descriptor, "w", closefd=False)
    return io.TextIOWrapper(io.BufferedWriter(raw), "utf-8", "backslashreplace", line_buffering=True)


def _open_closed() -> None:
    """Give the descriptors 0 to 2 to /dev/null where they are closed: a file opened later would get what is printed."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
