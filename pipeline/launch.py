"""Launch: one function in N processes of this machine, one a rank, through torch's elastic launcher.

Invariant: when `launch` returns or raises, no rank is left; a rank's KdpipeError is raised here as it was raised there.
The first signal to stop is passed on to the ranks, which end by themselves when their work is saved; the next kills
them. Ranks end with the launcher, even when that is killed. Cost: a start of Python and torch for each rank.
"""

import contextlib
import json
import logging
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from kdpipe.manifests.bus_errors import explain_bus_errors
from kdpipe.manifests.cores import THREADS, asked_threads, num_cores
from kdpipe.manifests.errors import InternalError, KdpipeError, PeerError, TemporaryError, error_of, fields_of, stopped
from kdpipe.manifests.running import LED
from kdpipe.pipeline.endings import answered
from kdpipe.pipeline.last_net import Crash, crash_of, kept
from kdpipe.stages.train.signals import SAME_S

LAUNCHER_LOGS = ("torch.distributed.elastic", "torch.multiprocessing")
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR2)
SHUTDOWN_S = 100
"""How long the others have to end by themselves when a rank has failed."""
BYSTANDER_S = 3.0
"""How long a rank waits before it dies of what may be another's death, so that the launcher sees that one first."""


def launch(
    function: Callable[..., object], *args: object, nproc: int, where: object = None, kept: Callable[[], str] = str
) -> Any:
    """Run `function(*args)` in `nproc` ranks of torch.distributed; rank 0's result.

    The function and its arguments must pickle: a function of a module. RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and
    MASTER_PORT are in each rank's environment. Raises the first KdpipeError a rank raised, TemporaryError for a rank
    killed by a signal, InternalError that names a file for any other exception. A signal to stop ends as the rank says
    that it ended by it, else with StoppedError (Ctrl-C) or TemporaryError.

    kept, where: says what is kept of the work at `where`, for ranks that a signal ended before they could say it
    """

    def stop(name: str) -> KdpipeError:
        return stopped(name, where=where, kept=kept())

    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=nproc,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",  # the rendezvous takes a free port
        local_addr="127.0.0.1",
        max_restarts=0,
        start_method="spawn",
        shutdown_timeout=SHUTDOWN_S,
        signals_to_handle=signal.SIGQUIT.name,  # the others are ours
    )
    _start_tracker()
    with tempfile.TemporaryDirectory(prefix="kdpipe-ranks-") as folder, _quiet(), _threads(nproc), _signals() as asked:
        try:
            return elastic_launch(config, _rank)(function, args, folder)[0]
        except ChildFailedError as err:
            rank, failure = err.get_first_failure()
            raise _verdict(Path(folder), rank, failure.exitcode, asked, stop) from None
        except SignalException as err:
            raise _verdict(Path(folder), 0, -err.sigval, asked or [err.sigval], stop) from None


def _rank(function: Callable[..., object], args: tuple[object, ...], folder: str) -> object:
    """What each process runs: an error is left as JSON in `folder` for the launcher to raise."""
    # SIGINT comes from Ctrl-C and, by torch's doing, when the launcher is gone. A rank deep in a collective would never
    # notice a KeyboardInterrupt, so the signal itself ends it, unless the function has a handler for it.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    explain_bus_errors(lambda err: _leave(Path(folder), fields_of(err)))
    try:
        return function(*args)
    except Exception as err:
        # The boundary of the process: nobody above could keep this traceback, and only one rank's is wanted.
        ours = answered(err)
        if ours is None:
            _leave(Path(folder), {"crash": asdict(crash_of(err))})
        else:
            _leave(Path(folder), fields_of(ours))
        if ours is None or isinstance(ours, TemporaryError):
            time.sleep(BYSTANDER_S)
        sys.exit(InternalError.exit_code if ours is None else ours.exit_code)


def _leave(folder: Path, fields: dict[str, object]) -> None:
    """Write a rank's last words; the rename makes them whole."""
    rank = int(os.environ["RANK"])
    half = folder / f"{rank}.half"
    half.write_text(json.dumps(fields | {"rank": rank, "time": time.time()}), encoding="utf-8")
    half.rename(folder / f"{rank}.json")


def _verdict(
    folder: Path, rank: int, exitcode: int, asked: Sequence[signal.Signals], stop: Callable[[str], KdpipeError]
) -> KdpipeError:
    """The error to raise, from what the ranks left behind and the exit code of the first that fell.

    A rank that raised an error of ours knows best. A rank that was killed comes next: the exceptions of the others are
    then about their lost peer. asked: the signals that the launcher was sent; stop: the error for one of them
    """
    words = sorted((json.loads(path.read_text()) for path in folder.glob("*.json")), key=lambda word: word["time"])
    words = [word for word in words if word.get("class") != PeerError.__name__] or words
    ours = [word for word in words if "class" in word]
    ours.sort(key=lambda word: word["class"] == TemporaryError.__name__)  # stable: by time, lost peers last
    bugs = [word for word in words if "crash" in word]
    if ours and (asked or ours[0]["class"] != TemporaryError.__name__):
        return error_of(ours[0])
    if asked:
        return stop(asked[0].name)
    if exitcode == -signal.SIGINT:
        return stop(signal.SIGINT.name)
    if exitcode < 0:
        name = signal.Signals(-exitcode).name
        why = " (out of memory?)" if -exitcode == signal.SIGKILL else ""
        return TemporaryError(
            f"killed by {name}{why}, the other ranks were ended; run the same command again", where=f"rank {rank}"
        )
    if ours:
        return error_of(ours[0])
    if bugs:
        crash = Crash(**bugs[0]["crash"])
        return kept(replace(crash, summary=f"rank {bugs[0]['rank']}: {crash.summary}"))
    return KdpipeError(f"ended with exit code {exitcode} and no message", where=f"rank {rank}")


def _start_tracker() -> None:
    """Start the process that multiprocessing tidies up with so that no signal to the whole group ends it.

    It ignores SIGINT and SIGTERM by itself. Ended by another, it is started anew, knows nothing of what the first one
    had, and prints a traceback for each thing. A signal that is blocked where a process starts stays blocked in it.
    """
    others = {number for number in SIGNALS if number not in (signal.SIGINT, signal.SIGTERM)}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, others)
    try:
        resource_tracker.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the launcher's own log of failures to itself: ours is one line."""
    logs, handler = [logging.getLogger(name) for name in LAUNCHER_LOGS], logging.NullHandler()
    for log in logs:
        log.addHandler(handler)
        log.propagate = False
    try:
        yield
    finally:
        for log in logs:
            log.removeHandler(handler)
            log.propagate = True


@contextlib.contextmanager
def _signals() -> Iterator[list[signal.Signals]]:
    """The signals that asked the launcher to stop: the first is passed on to the ranks, the next kills them.

    One that is ignored (nohup) stays so.
    """
    asked: list[signal.Signals] = []
    heard = time.monotonic()
    before = {number: signal.getsignal(number) for number in (*SIGNALS, signal.SIGQUIT)}

    def pass_on(number: int, frame: object) -> None:
        nonlocal heard
        if asked and LED in os.environ and time.monotonic() - heard < SAME_S:
            return  # the scheduler's own, and then the sweep's
        heard = time.monotonic()
        asked.append(signal.Signals(number))
        ranks = multiprocessing.active_children()
        for rank in ranks:
            if len(asked) > 1:
                rank.kill()
            elif rank.pid is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(rank.pid, number)
        if len(asked) > 1 or not ranks:
            raise SignalException(f"stopped by {asked[0].name}", sigval=asked[0])

    for number in SIGNALS:
        if before[number] != signal.SIG_IGN:
            signal.signal(number, pass_on)
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _threads(nproc: int) -> Iterator[None]:
    """Share the cores among the ranks, unless the user has said how. Read when torch loads, so it must be inherited."""
    if asked_threads(os.environ) is not None:
        yield
        return
    before = os.environ.get(THREADS)
    os.environ[THREADS] = str(max(num_cores() // nproc, 1))
    try:
        yield
    finally:
        del os.environ[THREADS]
        if before is not None:
            os.environ[THREADS] = before
