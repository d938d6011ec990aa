"""Pool: processes that prepare batches of records, whose results come in the order of the batches.

    batches -> dealt round, IN_FLIGHT ahead for each process -> Preparing, once in every process -> taken round

Each process is Python started anew (worker.py), not a fork: this one may have threads of torch, tokenizers and Arrow by
now, whose locks a fork would copy as they are, and a program that calls us need not be importable. It loads the
tokenizer and no torch: about a second and 110 MB. Tokenizers run one thread there, as there is a process for each core.
Invariant: results are those of one process, in the same order. At most IN_FLIGHT batches a process are on their way.
However this ends, the processes do: they end when their link does, by themselves if this one is killed. They are a
group of their own each, so that Ctrl-C is this process's affair.
"""

import os
import pickle
import signal
import socket
import struct
import subprocess
import sys
import tempfile
from collections.abc import Generator, Iterable, Sequence
from contextlib import ExitStack
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING

from kdpipe.manifests.cores import num_cores
from kdpipe.manifests.errors import DataError, TemporaryError
from kdpipe.stages.prepare.sources import RawRecord
from kdpipe.stages.prepare.work import Worked

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

WORKER_BYTES = 16 << 20
"""Of data files for each process: some ten seconds of work, against one to start it."""
IN_FLIGHT = 2
SILENCE_S = 600.0
"""Longest that a batch may take; it takes a fraction of a second."""
SILENT = "takes and gives nothing any more"
ENVIRONMENT = {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}


def num_processes(asked: int | None, files: Sequence[Path], tokenizer: "PreTrainedTokenizerBase") -> int:
    """How many processes to work in, 1 for this one alone; one for each core that was given, with enough data.

    A tokenizer whose class is not of transformers works here: other processes do not have its code.
    """
    if not type(tokenizer).__module__.startswith("transformers."):
        return 1
    if asked is not None:
        return max(asked, 1)
    return max(1, min(num_cores(), sum(file.stat().st_size for file in files) // WORKER_BYTES))


def in_processes(
    count: int, batches: Iterable[list[RawRecord]], setup: tuple[object, ...]
) -> Generator[Worked, None, None]:
    """What becomes of each batch, in order. Raises TemporaryError for a process that died.

    setup: a class that makes Worked of batches, and its arguments
    """
    with ExitStack() as running:
        data = pickle.dumps(setup)
        workers = [running.enter_context(_Worker()) for _ in range(count)]
        for worker in workers:
            worker.send(data)
        sent = received = 0
        failure: DataError | None = None
        source = iter(batches)
        while True:
            try:
                batch = next(source, None) if failure is None else None
            except DataError as err:  # of the file: what was read before comes first
                batch, failure = None, err
            if received < sent and (batch is None or sent - received == IN_FLIGHT * count):
                yield workers[received % count].receive()
                received += 1
            if batch is not None:
                workers[sent % count].send(pickle.dumps(batch), where=batch[0].place)
                sent += 1
            elif received == sent:
                break
        if failure is not None:
            raise failure


class _Worker:
    """One process, and the link to it."""

    def __init__(self) -> None:
        self._link, theirs = Pipe()
        with socket.socket(fileno=os.dup(self._link.fileno())) as ours:
            ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", int(SILENCE_S), 0))
        self._places: list[str] = []
        """Where the batches begin that are on their way."""
        self._said = tempfile.TemporaryFile()  # noqa: SIM115 - closed in __exit__
        """Its stderr: why it ended, where it does so by itself."""
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "kdpipe.stages.prepare.worker", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=self._said,
                process_group=0,
                env={**os.environ, **ENVIRONMENT, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            )
        except OSError as err:
            raise TemporaryError(f"no process can be started to prepare data: {err.strerror}") from None
        finally:
            theirs.close()

    def __enter__(self) -> "_Worker":
        return self

    def __exit__(self, *_: object) -> None:
        """The process ends with its link, or is killed at its work."""
        self._link.close()
        self._process.kill()
        self._process.wait()
        self._said.close()

    def send(self, data: bytes, where: str = "") -> None:
        if where:
            self._places.append(where)
        try:
            self._link.send_bytes(data)
        except BlockingIOError:
            raise self._gone(SILENT) from None
        except OSError:
            raise self._gone() from None

    def receive(self) -> Worked:
        """What became of the oldest batch on its way."""
        try:
            if not self._link.poll(SILENCE_S):
                raise self._gone(SILENT)
            result = pickle.loads(self._link.recv_bytes())
        except (EOFError, OSError):
            raise self._gone() from None
        self._places.pop(0)
        if isinstance(result, Exception):
            raise result
        assert isinstance(result, Worked), "a worker sends what became of a batch, or why nothing did"
        return result

    def _gone(self, how: str = "") -> TemporaryError:
        """The error of a process that is no more, or how it is of no use."""
        if not how:
            code = self._process.wait()
            how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
            self._said.seek(0)
            said = self._said.read().decode(errors="replace").strip()
            how += f" ({said.splitlines()[-1]})" if said else ""
        return TemporaryError(
            f"a process that prepares the records from here on {how}; out of memory? run it again, with fewer "
            "processes if need be",
            where=self._places[0] if self._places else None,
        )


def open_link(descriptor: int) -> Connection:
    """The worker's end of a link."""
    return Connection(descriptor)
