"""Every error kdpipe raises for a person to read.

    KdpipeError                      exit code
      CheckFailed                        1   a verification said no
        GateError      E-GATE            1   the teacher's rows are not what the plan asked for
        LayoutError    E-LAYOUT          1   a file's header or size contradicts the plan
        CorruptError   E-CORRUPT         1   bytes do not match their checksum
      IncompleteError  E-INCOMPLETE      2   a cache or run is not finished yet
      DriftError       E-DRIFT           3   a second answer differs from the first
      InputError                         4   usage or bad input
        DataError      E-DATA            4   a data file or a sample in it
        ConfigError    E-CONFIG          4   a run file, an option, a key
        TeacherError   E-TEACHER         4   a teacher folder, or rows that are not finite
        StudentError   E-STUDENT         4   a student folder
        CacheError     E-CACHE           4   a cache that belongs to something else
        SpaceError     E-SPACE           4   no room on the disk or in memory
        RefusedError   E-SLURM           4   Slurm said no, for a reason of its own
      InternalError    E-INTERNAL       70   a fault of kdpipe itself; its traceback is in a file
      TemporaryError   E-TEMPORARY      75   preempted, peer gone: run it again
        BusyError      E-BUSY           75   another run is at work in the output
        PeerError      E-PEER           75   another rank failed, and its error is the one to show
        EngineError    E-ENGINE         75   the teacher's engine died or fell silent; finished shards are kept
        NoAnswerError  E-NOANSWER       75   Slurm did not say: what it was asked to do may be done
      StoppedError     E-INTERRUPTED   130   Ctrl-C: run it again

A message is one line: where, what was expected, what was found, what to do.
"""

from collections.abc import Mapping
from typing import Any


class KdpipeError(Exception):
    """An error for a person: `code: where: message`, one line, with the exit code of its class."""

    code = "E-KDPIPE"
    exit_code = 1
    ending = "failed"
    """Kind of the last event of a run that it ended."""

    def __init__(self, message: str, *, where: object = None, hint: str = "") -> None:
        """hint: what to do, where several errors that are shown together share it"""
        self.where = None if where is None else str(where)
        self.fact = " ".join(message.split())
        super().__init__(f"{self.fact}; {hint}" if hint else self.fact)

    def __str__(self) -> str:
        return self._line(self.args[0])

    def without_hint(self) -> str:
        """The line without what to do."""
        return self._line(self.fact)

    def _line(self, text: str) -> str:
        place = f" {self.where}:" if self.where else ":"
        return f"{self.code}{place} {text}"


class CheckFailed(KdpipeError):  # noqa: N818 - it reads as what happened
    code = "E-CHECK"


class GateError(CheckFailed):
    code = "E-GATE"


class LayoutError(CheckFailed):
    code = "E-LAYOUT"


class CorruptError(CheckFailed):
    code = "E-CORRUPT"


class IncompleteError(KdpipeError):
    code = "E-INCOMPLETE"
    exit_code = 2


class DriftError(KdpipeError):
    code = "E-DRIFT"
    exit_code = 3


class InputError(KdpipeError):
    code = "E-INPUT"
    exit_code = 4


class DataError(InputError):
    code = "E-DATA"


class ConfigError(InputError):
    code = "E-CONFIG"


class TeacherError(InputError):
    code = "E-TEACHER"


class StudentError(InputError):
    code = "E-STUDENT"


class CacheError(InputError):
    code = "E-CACHE"


class SpaceError(InputError):
    code = "E-SPACE"


class RefusedError(InputError):
    code = "E-SLURM"


class InternalError(KdpipeError):
    code = "E-INTERNAL"
    exit_code = 70
    ending = "crashed"


class TemporaryError(KdpipeError):
    code = "E-TEMPORARY"
    exit_code = 75


class BusyError(TemporaryError):
    code = "E-BUSY"


class PeerError(TemporaryError):
    code = "E-PEER"


class EngineError(TemporaryError):
    code = "E-ENGINE"


class NoAnswerError(TemporaryError):
    code = "E-NOANSWER"


class StoppedError(KdpipeError):
    code = "E-INTERRUPTED"
    exit_code = 130
    ending = "interrupted"


def stopped(signal_name: str, *, where: object = None, kept: str = "") -> KdpipeError:
    """The error for a command that a signal ended: SIGINT is a person's, the others are a scheduler's.

    kept: what is kept of the work, "3 of 12 shards are kept"
    """
    message = "; ".join(filter(None, (f"stopped by {signal_name}", kept, "run the same command again")))
    if signal_name == "SIGINT":
        return StoppedError(message, where=where)
    error = TemporaryError(message, where=where)
    error.ending = "terminated"
    return error


def is_lack_of_memory(err: BaseException) -> bool:
    """Python's or torch's, which has a class for GPUs alone."""
    if isinstance(err, RuntimeError):
        return type(err).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(err)
    return isinstance(err, MemoryError)


def is_of_others(err: BaseException) -> bool:
    """Whether a library's or a model's code is not to blame for what came out of it: an error of ours, no memory."""
    return isinstance(err, KdpipeError | KeyboardInterrupt) or is_lack_of_memory(err)


def fields_of(err: KdpipeError) -> dict[str, Any]:
    """An error as JSON values, for another process; see error_of."""
    return {
        "class": type(err).__name__,
        "code": err.code,
        "ending": err.ending,
        "where": err.where,
        "message": str(err.args[0]),
    }


def error_of(fields: Mapping[str, Any]) -> KdpipeError:
    """The error that another process left."""
    kind: Any = globals().get(fields["class"])
    if not (isinstance(kind, type) and issubclass(kind, KdpipeError)):
        kind = KdpipeError
    err: KdpipeError = kind(fields["message"], where=fields["where"])
    err.code, err.ending = fields["code"], fields["ending"]
    return err
