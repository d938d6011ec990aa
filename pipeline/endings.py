"""Endings: how a command can end other than well, and what is said of it: exit code, one line, last event."""

import errno
import os
from dataclasses import dataclass

from kdpipe.manifests.errors import InputError, InternalError, KdpipeError, SpaceError, is_lack_of_memory, stopped

NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


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
    if (ours := answered(err)) is not None:
        return Ending(kind=ours.ending, exit_code=ours.exit_code, error=str(ours))
    return Ending(kind=InternalError.ending, exit_code=InternalError.exit_code, error=type(err).__name__)


def answered(err: BaseException) -> KdpipeError | None:
    """`err` as an error that a person can answer; None for one that nobody foresaw."""
    if isinstance(err, KdpipeError):
        return err
    if isinstance(err, PermissionError | NotADirectoryError):
        reason = os.strerror(err.errno or 0).lower()
        return InputError(f"{reason}; get the right to it (chmod, chown) or name another place", where=err.filename)
    if isinstance(err, OSError) and err.errno in NO_ROOM:
        return SpaceError(
            f"{os.strerror(err.errno).lower()}; free some room, or set TMPDIR to another disk for files "
            "that last as long as the command",
            where=err.filename,
        )
    if is_lack_of_memory(err):
        return SpaceError(
            f"memory ran out ({str(err).partition(chr(10))[0] or type(err).__name__}); lower "
            "train.batch_tokens or --batch-tokens, or ask for more memory"
        )
    return None
