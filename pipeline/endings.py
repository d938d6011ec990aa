"""Endings: how a command can end other than well, and what is said of it: exit code, one line, last event."""

import os
from dataclasses import dataclass

from kdpipe.manifests.errors import InputError, KdpipeError, stopped

CRASHED = 70


class Terminated(KeyboardInterrupt):
    """SIGTERM or its like, as a scheduler sends it before it kills: what an interrupt cleans up is cleaned up."""

    def __init__(self, signal_name: str = "SIGTERM") -> None:
        super().__init__(signal_name)
        self.signal_name = signal_name


@dataclass(frozen=True, kw_only=True, slots=True)
class Ending:
    """kind: of the last event: "failed", "terminated", "interrupted" or "crashed"; error: what was wrong, one line."""

    kind: str
    exit_code: int
    error: str


def ending(err: BaseException, *, kept: str = "", where: object = None) -> Ending:
    """How `err` ends a command. kept, where: what of its work is kept, for a signal"""
    if isinstance(err, KeyboardInterrupt):
        err = stopped(getattr(err, "signal_name", "SIGINT"), kept=kept, where=where)
    if isinstance(err, PermissionError | NotADirectoryError):
        reason = os.strerror(err.errno or 0).lower()
        err = InputError(f"{reason}; get the right to it (chmod, chown) or name another place", where=err.filename)
    if isinstance(err, KdpipeError):
        return Ending(kind=err.ending, exit_code=err.exit_code, error=str(err))
    return Ending(kind="crashed", exit_code=CRASHED, error=type(err).__name__)
