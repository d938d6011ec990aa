"""Child: a command of kdpipe that another process of kdpipe leads; it ends with its leader, however that went.

    python -m kdpipe.pipeline.child LEADER WORD...      LEADER: pid of the process that starts it, WORD: after `kdpipe`

Invariant: a leader that is gone, even by SIGKILL, is a SIGTERM to its children: they save what they have, and end.
"""

import ctypes
import os
import signal
import sys
from collections.abc import Sequence

from kdpipe.manifests.errors import TemporaryError
from kdpipe.manifests.running import LED
from kdpipe.pipeline import cli

PR_SET_PDEATHSIG = 1
"""From linux/prctl.h: the signal that this process gets when the thread that started it ends."""


def command_of(words: Sequence[str]) -> list[str]:
    """What the leader runs for a command: the words after `kdpipe`."""
    return [sys.executable, "-m", __name__, str(os.getpid()), *words]


def main(arguments: Sequence[str]) -> None:
    """Run a command that ends with its leader."""
    leader, *words = arguments
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != int(leader):  # it was gone before that
        sys.exit(TemporaryError.exit_code)
    os.environ[LED] = leader
    cli.main(words)


if __name__ == "__main__":
    main(sys.argv[1:])
