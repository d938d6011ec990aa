"""Signals: the first that asks a run to stop is noted, so that it can finish its step and save; the next one ends it.

    with asked_to_stop() as asked: ...          asked: [] or [SIGINT]

SIGTERM and SIGUSR2 come from schedulers before they kill, SIGINT from Ctrl-C, SIGHUP from a terminal that was closed.
"""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

from kdpipe.manifests.running import LED

SIGNALS = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT, signal.SIGHUP)
SAME_S = 2.0
"""A launcher passes on to its ranks, and a sweep to its runs, what they may have heard themselves, from a terminal or a
scheduler that signals every process: what follows the first so closely is the same request."""


@contextlib.contextmanager
def asked_to_stop(*, say: bool = True) -> Iterator[list[signal.Signals]]:
    """A list that the first signal to stop adds itself to; the next does what it did before.

    say: whether the first is answered on stderr
    One that is ignored (nohup) stays so. Only a main thread can have handlers; elsewhere the list stays empty.
    """
    asked: list[signal.Signals] = []
    before: dict[signal.Signals, Any] = {}
    is_led, heard = not os.environ.keys().isdisjoint(("RANK", LED)), 0.0

    def put_back() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def note(number: int, frame: object) -> None:
        nonlocal heard
        if not asked:
            asked.append(signal.Signals(number))
            heard = time.monotonic()
            if say:
                _say(f"{asked[0].name}: finishing the step and saving; once more ends it at once")
            if not is_led:
                put_back()
        elif time.monotonic() - heard > SAME_S:
            put_back()
            os.kill(os.getpid(), number)

    if threading.current_thread() is threading.main_thread():
        for number in SIGNALS:
            if (handler := signal.getsignal(number)) not in (signal.SIG_IGN, None):
                before[number] = handler
                signal.signal(number, note)
    try:
        yield asked
    finally:
        put_back()


def _say(text: str) -> None:
    """By the system call alone: a handler may have come into the middle of a write of sys.stderr's own."""
    with contextlib.suppress(OSError):
        os.write(2, f"{chr(13)}{chr(27)}[K{text}\n".encode() if os.isatty(2) else f"{text}\n".encode())
