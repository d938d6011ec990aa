"""A bus error told as what it is: a mapped file that shrank, or a disk that could not give or take a page.

    explain_bus_errors(report)

Python cannot see this signal in time: its own handlers run after the instruction that faulted, which never ends. So the
handler is put in place through libc, asks /proc which file lies at the address, reports, and ends the process.
"""

import ctypes
import os
import signal
from collections.abc import Callable
from pathlib import Path

from kdpipe.manifests.errors import CorruptError, KdpipeError

ADDRESS_AT = 16
"""Offset of si_addr in siginfo_t on 64-bit Linux."""
WITH_INFO = 4
"""SA_SIGINFO"""

Handler = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_size_t, ctypes.c_size_t)


class SigAction(ctypes.Structure):
    """struct sigaction of glibc and musl."""

    _fields_ = (
        ("handler", Handler),
        ("mask", ctypes.c_uint8 * 128),
        ("flags", ctypes.c_int),
        ("restorer", ctypes.c_void_p),
    )


def explain_bus_errors(report: Callable[[KdpipeError], None]) -> None:
    """From now on a bus error in a mapped file ends the process with `report` of an error and that error's exit code.

    Any other is left to the signal's usual course. For whole processes, not for libraries: it stays in place.
    """

    def handle(number: int, info: int, context: int) -> None:
        address = ctypes.c_size_t.from_address(info + ADDRESS_AT).value
        error = _error_at(address)
        if error is None:
            signal.signal(signal.SIGBUS, signal.SIG_DFL)  # the instruction faults again and the process dies of it
            return
        try:
            report(error)
        finally:
            os._exit(error.exit_code)

    action = SigAction(handler=Handler(handle), flags=WITH_INFO)
    ctypes.CDLL(None).sigaction(int(signal.SIGBUS), ctypes.byref(action), None)
    _kept.append(action)


_kept: list[SigAction] = []
"""What libc has pointers to."""


def _error_at(address: int) -> KdpipeError | None:
    """What happened to the file that is mapped at an address; None where none is."""
    with open("/proc/self/maps") as file:
        for line in file:
            span, _, offset, _, _, *name = line.split(maxsplit=5)
            begin, end = (int(edge, 16) for edge in span.split("-"))
            if begin <= address < end and name and name[0].startswith("/"):
                return _error_of(name[0].rstrip("\n"), int(offset, 16) + address - begin)
    return None


def _error_of(name: str, at: int) -> KdpipeError:
    gone = name.endswith(" (deleted)")
    path = Path(name.removesuffix(" (deleted)"))
    size = path.stat().st_size if path.exists() else 0
    if not gone and size > at:
        err = KdpipeError(
            f"byte {at} could not be read or written: the disk is full or failing; look at the kernel's log", where=path
        )
        err.code = "E-IO"
        return err
    now = "removed" if gone else f"cut to {size} bytes"
    return CorruptError(
        f"it was {now} by somebody else while it was mapped, and byte {at} was wanted; nothing that was read before is "
        "wrong. kdpipe cache verify tells what is left; --io pread reads without mapping",
        where=path,
    )
