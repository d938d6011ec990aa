"""Local: steps worked off on this machine, several at a time, each a child process with its own cores or GPUs.

    run_steps(steps, share_out(jobs, ...), watcher) -> Outcome of each

Two runs on the same cores are ten times slower than one after the other (docs/notes.md), so the cores are shared out:
disjoint sets, no more threads than cores. All of them read a cache through the machine's one page cache.
Invariant: a step starts when those it needs have ended well, a failed one stops no other; when `run_steps` ends or
raises no child is left, and where this process is killed they save and end by themselves (pipeline/child.py).
Cost: a start of Python and torch for each step; none of torch here.
"""

import contextlib
import os
import re
import select
import signal
import subprocess
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Protocol

from kdpipe.manifests.cores import Cores
from kdpipe.manifests.durable import disk_error, make_folder
from kdpipe.manifests.errors import BusyError, ConfigError, KdpipeError, TemporaryError
from kdpipe.manifests.run import LOG
from kdpipe.manifests.running import require_nobody_in
from kdpipe.pipeline.child import command_of
from kdpipe.pipeline.options import group_for
from kdpipe.pipeline.roles import Share
from kdpipe.pipeline.steps import Step

LOOK_S = 0.5
"""Between two looks at what the children say of themselves; the end of one is seen at once."""
BUSY_S = 120.0
"""How long a run is waited for that somebody else has in a step's output, when there is nothing else to do: children of
a leader that was killed may be saving."""
SIGNALS = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT, signal.SIGHUP)
ERROR_LINE = re.compile(r"E-[A-Z]+[ :].*")
TAIL_BYTES = 1 << 16
"""Of a log, in which its last error is looked for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """How a step ended.

    exit_code: its own, that of a temporary error where a signal killed it; None for one that was not started
    error: one line, None where it ended well
    log: what it said, where that went to a file
    """

    step: Step
    exit_code: int | None
    error: str | None = None
    seconds: float = 0.0
    log: Path | None = None

    @property
    def is_good(self) -> bool:
        return self.exit_code == 0


class Watcher(Protocol):
    """Whoever shows what happens."""

    def started(self, step: Step, log: Path | None) -> None:
        """A step is at work."""

    def ended(self, outcome: Outcome) -> None:
        """A step is no longer at work, or will never be."""

    def waits(self, step: Step) -> None:
        """Nothing can be done until another's run in the output of this step has ended; said again and again."""

    def look(self, at_work: Collection[Step]) -> None:
        """Now and then."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Child:
    """A step at work. slot: what it has of the machine, None for all; said: bytes that its log had before"""

    step: Step
    slot: Share | None
    process: "subprocess.Popen[bytes]"
    log: Path | None
    said: int
    since: float = field(default_factory=time.monotonic)


def share_out(jobs: int, cores: Cores, gpus: Sequence[str]) -> list[Share]:
    """A machine in as many shares as there are jobs at a time: disjoint where there are cores and GPUs enough.

    4 cores, 3 jobs -> 0 | 1 | 2 3; 2 GPUs, 3 jobs -> 0 | 0 | 1
    """
    edges = [number * cores.count // jobs for number in range(jobs + 1)]
    few = cores.count < jobs
    parts = [Cores(count=1)] * jobs if few else cores.parts([after - at for at, after in pairwise(edges)])
    return [Share(cores=part, gpus=_gpus(gpus, number, jobs)) for number, part in enumerate(parts)]


def _gpus(gpus: Sequence[str], number: int, jobs: int) -> tuple[str, ...]:
    first, after = number * len(gpus) // jobs, (number + 1) * len(gpus) // jobs
    return tuple(gpus[first : max(after, first + 1)])


def run_steps(
    steps: Sequence[Step], slots: Sequence[Share], watcher: Watcher
) -> tuple[list[Outcome], signal.Signals | None]:
    """Work off the steps; how each ended that was begun or became vain, and the signal that asked to stop, if one did.

    slots: what of the machine each of the runs at a time has; a step that is none, such as extract, has all of it
    The first signal is passed on to the children, which save and end, and no more are started; the second kills them.
    """
    waiting, free, at_work = list(steps), list(slots), dict[int, Child]()
    ended: dict[str, Outcome] = {}
    idle_since = time.monotonic()

    def end(outcome: Outcome) -> None:
        nonlocal idle_since
        ended[outcome.step.name], idle_since = outcome, time.monotonic()
        watcher.ended(outcome)

    with _none_left(at_work), _passed_on(at_work) as asked:
        while at_work or (waiting and not asked):
            for outcome in _in_vain(waiting, ended):
                waiting.remove(outcome.step)
                end(outcome)
            ready = [] if asked or not free else _ready(steps, waiting, ended)
            patient = bool(at_work) or time.monotonic() - idle_since < BUSY_S
            if ready and (step := _take(ready, patient, watcher)) is not None:
                waiting.remove(step)
                try:
                    child = _start(step, None if step.member is None else free[0])
                except (OSError, KdpipeError) as err:
                    end(_refused(step, err))
                    continue
                at_work[os.pidfd_open(child.process.pid)] = child
                if child.slot is not None:
                    free.remove(child.slot)
                if asked:  # it came between the two
                    child.process.send_signal(asked[0])
                watcher.started(step, child.log)
                continue
            for number in select.select(list(at_work), [], [], LOOK_S)[0]:
                child = at_work.pop(number)
                os.close(number)
                if child.slot is not None:
                    free.insert(0, child.slot)
                end(_outcome(child))
            watcher.look([child.step for child in at_work.values()])
    return [ended[step.name] for step in steps if step.name in ended], asked[0] if asked else None


def _ready(steps: Sequence[Step], waiting: Sequence[Step], ended: Mapping[str, Outcome]) -> list[Step]:
    """The steps for which all that they need is done; what is not among the steps was done before."""
    names = {step.name for step in steps}

    def is_done(need: str, *, whatever: bool) -> bool:
        return need not in names or (need in ended and (whatever or ended[need].is_good))

    return [step for step in waiting if all(is_done(need, whatever=step.whatever) for need in step.needs)]


def _in_vain(waiting: Sequence[Step], ended: Mapping[str, Outcome]) -> list[Outcome]:
    """The steps that will never start, as one that they need has not ended well."""
    found = []
    for step in waiting:
        lost = [] if step.whatever else [need for need in step.needs if need in ended and not ended[need].is_good]
        if lost:
            found.append(Outcome(step=step, exit_code=None, error=f"not started, as {lost[0]} did not end well"))
    return found


def _take(ready: Sequence[Step], patient: bool, watcher: Watcher) -> Step | None:
    """The first in whose output nobody is at work; patient: whether to wait where somebody is in all of them."""
    free = next((step for step in ready if not _is_busy(step)), None)
    if free is None:
        watcher.waits(ready[0])
    return free if free is not None or patient else ready[0]


def _is_busy(step: Step) -> bool:
    try:
        if step.member is not None:
            require_nobody_in(step.output)
    except BusyError:
        return True
    return False


def _start(step: Step, slot: Share | None) -> Child:
    """Begin a step: a student says what it says to its log, whatever else there is to this process's stderr."""
    environment, share = dict(os.environ), slot or Share()
    share.settle(environment)
    before = os.sched_getaffinity(0)
    with contextlib.ExitStack() as stack:
        log, said = None, 0
        out, err = subprocess.DEVNULL, 2
        if step.member is not None:
            if os.path.lexists(step.output) and not step.output.is_dir():
                raise ConfigError("this is not a folder; remove it, or choose another output", where=step.output)
            make_folder(step.output, group_for(step.member.run.train.group, step.output))
            log = step.output / LOG
            file = stack.enter_context(open(log, "ab"))
            out, err, said = file.fileno(), file.fileno(), file.tell()
        try:
            if share.cores is not None:
                share.cores.keep()  # before it starts, so that all of its threads do
            process = subprocess.Popen(
                command_of(step.argv),
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                start_new_session=True,  # a Ctrl-C is ours, and is passed on once
            )
        finally:
            os.sched_setaffinity(0, before)
    return Child(step=step, slot=slot, process=process, log=log, said=said)


def _refused(step: Step, err: OSError | KdpipeError) -> Outcome:
    """Of a step that cannot be begun: its folder cannot be made, or its log."""
    said = disk_error(err, step.output) if isinstance(err, OSError) else err
    return Outcome(step=step, exit_code=said.exit_code, error=str(said))


def _outcome(child: Child) -> Outcome:
    code, error = child.process.wait(), None
    if code:
        error = _last_error(child)
    if code < 0:
        name = signal.Signals(-code).name
        why = " (out of memory?)" if -code == signal.SIGKILL else ""
        error, code = f"{TemporaryError.code}: killed by {name}{why}", TemporaryError.exit_code
    return Outcome(
        step=child.step,
        exit_code=code,
        error=error or (f"it ended with exit code {code}" if code else None),
        seconds=time.monotonic() - child.since,
        log=child.log,
    )


def _last_error(child: Child) -> str | None:
    """The last line of a child's log that is an error of ours."""
    if child.log is None:
        return None
    with open(child.log, "rb") as file:
        file.seek(max(child.said, os.fstat(file.fileno()).st_size - TAIL_BYTES))
        lines = file.read().decode("utf-8", "replace").splitlines()
    return next(filter(ERROR_LINE.match, reversed(lines)), None)


@contextlib.contextmanager
def _none_left(at_work: Mapping[int, Child]) -> Iterator[None]:
    """When the block ends, however it does, no child lives."""
    try:
        yield
    finally:
        for number, child in at_work.items():
            _kill(child)
            child.process.wait()
            os.close(number)


def _kill(child: Child) -> None:
    """A child and the ranks that it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.process.pid, signal.SIGKILL)


@contextlib.contextmanager
def _passed_on(at_work: Mapping[int, Child]) -> Iterator[list[signal.Signals]]:
    """The signals that asked this process to stop: the first is passed on to the children, the next kills them.

    One that is ignored (nohup) stays so.
    """
    asked: list[signal.Signals] = []
    before = {number: signal.getsignal(number) for number in SIGNALS}

    def pass_on(number: int, frame: object) -> None:
        asked.append(signal.Signals(number))
        for child in list(at_work.values()):
            if len(asked) > 1:
                _kill(child)
            else:
                child.process.send_signal(number)
        _say(asked)

    for number, handler in before.items():
        if handler not in (signal.SIG_IGN, None):
            signal.signal(number, pass_on)
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _say(asked: Sequence[signal.Signals]) -> None:
    """By the system call alone: a handler may have come into the middle of a write of sys.stderr's own."""
    text = (
        "the runs finish their step and save; once more ends them at once" if len(asked) == 1 else "the runs are killed"
    )
    line = f"{asked[-1].name}: {text}\n"
    with contextlib.suppress(OSError):
        os.write(2, f"\r\x1b[K{line}".encode() if os.isatty(2) else line.encode())
