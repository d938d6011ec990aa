"""The process that SGLang lives in, as this process sees it: started, asked, listened to, ended.

    SglangProcess --messages--> host (host.py)          what is asked of it is not known here
                  <--answers---

Invariant: a silent, dead or confused engine is an error that says who waits for it, never a wait without end; after
`end` nothing of it is left.
Cost: about 15 s to start on a CPU.
"""

import itertools
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from kdpipe.manifests.engine import EngineOptions
from kdpipe.manifests.errors import CheckFailed, ConfigError, EngineError, KdpipeError, TeacherError
from kdpipe.manifests.specs import Device
from kdpipe.stages.sglang.arguments import host_environment
from kdpipe.stages.sglang.host import Failed, Message, Ready
from kdpipe.stages.sglang.session import Session

START_TIMEOUT_S = 1800.0
"""A large teacher is read from a network disk in this time."""

HOST = "from kdpipe.stages.sglang.host import main; import sys; main(int(sys.argv[1]))"


class SglangProcess:
    """One SGLang engine in a session of its own, started by the first use.

    model: the folder it runs, for messages
    arguments: SGLang's own
    advice: what an error says of the work that was done, and what to do
    """

    def __init__(self, model: Path, arguments: dict[str, Any], device: Device, options: EngineOptions) -> None:
        self._model, self._arguments, self._device, self._options = model, arguments, device, options
        self.session: Session | None = None
        self._link: Connection | None = None
        self._folder: Path | None = None
        self._ready = False
        self.advice = "nothing was written"
        self._numbers = itertools.count(1)

    @property
    def folder(self) -> Path:
        """Goes with the process: for scratch files that both sides see."""
        assert self._folder is not None, "launch it first"
        return self._folder

    def launch(self) -> None:
        """Start the host, unless it runs; `start` waits for it."""
        if self.session is not None:
            return
        self._folder = Path(tempfile.mkdtemp(prefix="kdpipe-sglang-"))
        ours, theirs = socket.socketpair()
        with theirs:
            self.session = Session(
                [sys.executable, "-c", HOST, str(theirs.fileno())],
                env=host_environment(self._folder, self._device, self._options),
                folder=self._folder,
                pass_fds=[theirs.fileno()],
            )
        self._link = Connection(ours.detach())
        self._ready = False
        self._link.send(self._arguments)

    def start(self) -> None:
        """SGLang, up and waiting. Raises ConfigError for arguments it refuses, TeacherError where it does not start."""
        self.launch()
        if self._ready:
            return
        try:
            message = self.receive(START_TIMEOUT_S, lambda: str(self._model))
        except EngineError as err:
            raise self.never_ran("while it started", err) from None
        if isinstance(message, Failed):
            if message.option:
                raise ConfigError(message.message, where=message.option)
            raise TeacherError(f"SGLang cannot run it{self._given()}{self._log_kept()}", where=self._model)
        assert isinstance(message, Ready)
        self._ready = True

    def send(self, messages: Sequence[Message], who: str) -> None:
        """Ask something; who: what an error names. Raises EngineError where it is gone."""
        assert self._link is not None
        if messages:
            try:
                self._link.send(list(messages))
            except OSError:
                raise self._gone(who) from None

    def receive(self, timeout_s: float, who: Callable[[], str]) -> Any:
        """The next message of the host. Raises EngineError where it is gone, or silent for too long."""
        assert self._link is not None
        until = time.monotonic() + timeout_s
        try:
            while not self._link.poll(1.0):
                if time.monotonic() > until:
                    raise EngineError(
                        f"SGLang gave no sign for {timeout_s:g} s{self._log_kept()}; {self.advice}, with a longer "
                        "--engine-timeout if it was only slow",
                        where=who(),
                    )
            return self._link.recv()
        except (EOFError, OSError):
            raise self._gone(who()) from None

    def next_number(self) -> int:
        """Of an exchange."""
        return next(self._numbers)

    def exchange(self, messages: Sequence[Message], timeout_s: float, who: str) -> Iterator[Any]:
        """Ask, and yield the answers as they come; those of exchanges that were given up are passed over.

        messages: of one number, which no other exchange has
        Raises EngineError where it is gone or silent, CheckFailed for a message that it could not answer.
        """
        self.start()
        self.send(messages, who)
        left = len(messages)
        while left:
            answer = self.receive(timeout_s, lambda: who)
            if answer.number != messages[0].number:
                continue
            if isinstance(answer, Failed):
                raise CheckFailed(f"SGLang refused it: {answer.message}", where=who)
            left -= 1
            yield answer

    def end(self) -> None:
        """End SGLang and everything it started."""
        if self._link is not None:
            self._link.close()
        if self.session is not None:
            self.session.end()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
        self._link = self.session = self._folder = None

    def never_ran(self, when: str, err: EngineError) -> TeacherError:
        """The error for an engine that failed before the first sample: trying again would not help."""
        return TeacherError(
            f"{when}, {err.args[0]}{self._given()}; --engine transformers may run it", where=self._model
        )

    def _gone(self, who: str) -> KdpipeError:
        """The error for a host that is no longer there."""
        return EngineError(f"SGLang died{self._log_kept()}; {self.advice}", where=who)

    def _given(self) -> str:
        """The options that may be at fault, for a message."""
        given = ", ".join(f"{name} = {value}" for name, value in self._options.identity().items())
        return f" with {given}" if given else ""

    def _log_kept(self) -> str:
        """The last telling line of SGLang's output, and where all of it is kept; "" where there is none."""
        log = self.folder / "log"
        if not log.exists() or not log.stat().st_size:
            return ""
        with tempfile.NamedTemporaryFile(prefix="kdpipe-sglang-", suffix=".log", delete=False) as kept:
            kept.write(log.read_bytes())
        lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
        telling = [line for line in lines if line.partition(":")[0].endswith(("Error", "Exception", "Interrupt"))]
        return f" ({(telling or lines)[-1][:400]}; all it said: {kept.name})"
