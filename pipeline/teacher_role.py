"""The teacher's role: a process beside the student's, started with it, joined by rings and ended with it.

    with teacher_beside(run, plan, ends, share): ...        in the process that starts both
    python -m kdpipe.pipeline.teacher_role                  the process itself

Invariant: neither side outlives the other by more than a few seconds, whatever ended it; its error is the other's.
"""

import contextlib
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from kdpipe.manifests.cache import Cache
from kdpipe.manifests.errors import TemporaryError
from kdpipe.manifests.progress import Silent
from kdpipe.manifests.ring import RingEnd, RingWriter
from kdpipe.manifests.specs import RunFile
from kdpipe.pipeline.endings import answered
from kdpipe.pipeline.last_net import crash_of, kept
from kdpipe.pipeline.roles import Share

GRACE_S = 3.0
"""How long a teacher has to see by itself that a student is gone."""
END_S = 30.0
"""How long a teacher has to end by itself when its students have."""
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR2)


@contextlib.contextmanager
def teacher_beside(run: RunFile, plan: Path, ends: Sequence[RingEnd], share: Share) -> Iterator[None]:
    """A teacher's process for the block, with the writers' ends of some rings; they are closed here.

    share: of the machine, that is its alone
    """
    environment = dict(os.environ)
    share.settle(environment)
    cores = "" if share.cores is None else ",".join(map(str, share.cores.numbers))
    process = subprocess.Popen(
        [sys.executable, "-m", __name__, run.model_dump_json(), str(plan), cores, *map(str, ends)],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=sys.stderr,
        pass_fds=[number for end in ends for number in end.fds],
        start_new_session=True,  # a Ctrl-C is the student's, which finishes its step with rows from here
    )
    for end in ends:
        end.close()
    try:
        yield
    finally:
        try:
            process.wait(END_S)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def end_with(rings: Sequence[RingWriter]) -> None:
    """End this process some seconds after a reader is gone that has not said that it is done.

    Between two requests the rings themselves say so, with its error; while a large model is loaded nobody looks.
    """

    def watch() -> None:
        poll, watched = select.poll(), {ring.fileno(): ring for ring in rings}
        for number in watched:
            poll.register(number, select.POLLHUP)
        while watched:
            gone = [number for number, _ in poll.poll()]
            time.sleep(GRACE_S)
            for number in gone:
                poll.unregister(number)
                if not watched.pop(number).ended:
                    os._exit(TemporaryError.exit_code)

    threading.Thread(target=watch, daemon=True).start()


class Notes(Silent):
    """Its notes alone are shown: the progress line is the student's."""

    def note(self, text: str) -> None:
        print(f"teacher: {text}", file=sys.stderr, flush=True)


def main(arguments: Sequence[str]) -> int:
    """Serve until nobody asks for more; the exit code. An error is left to the students, one of which says it."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    text, plan, cores, *ends = arguments
    if cores:
        os.sched_setaffinity(0, {int(core) for core in cores.split(",")})
    rings = [RingWriter(RingEnd.of(end)) for end in ends]
    end_with(rings)
    try:
        from kdpipe.stages.extract import ExtractSpec  # torch takes seconds: an error before it is said at once
        from kdpipe.stages.live.serve import serve_plan

        run = RunFile.model_validate_json(text)
        spec = ExtractSpec.of(run)
        assert run.train.output is not None, "the command has asked for it"
        serve_plan(spec, Cache.open(Path(plan)), rings, Notes(), tee=run.live.tee, output=run.train.output)
    except Exception as err:
        # The boundary of the process: nobody above could say it.
        said = answered(err) or kept(crash_of(err))
        for ring in rings:
            ring.fail(said)
        return said.exit_code
    finally:
        for ring in rings:
            ring.close()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
