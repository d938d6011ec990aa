"""How a command ends: each cause has its exit code, its line and its last event."""

import errno
import os
import signal
import sys
from collections.abc import Callable

import pytest
import torch
from tests.conftest import Main

from kdpipe.manifests.errors import DataError
from kdpipe.pipeline import cli
from kdpipe.pipeline.endings import Terminated, ending


def out_of_memory() -> RuntimeError:
    """What torch itself raises on a CPU for more than there can be."""
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 59, dtype=torch.uint8)
    return caught.value


@pytest.mark.parametrize(
    ("err", "kind", "exit_code", "said"),
    [
        (DataError("not JSON", where="d:3"), "failed", 4, "E-DATA d:3: not JSON"),
        (PermissionError(errno.EACCES, "x", "d"), "failed", 4, "E-INPUT d: permission denied; get the right to it"),
        (NotADirectoryError(errno.ENOTDIR, "x", "d/e"), "failed", 4, "E-INPUT d/e: not a directory; get the right"),
        (OSError(errno.ENOSPC, "x", "d"), "failed", 4, "E-SPACE d: no space left on device; free some room"),
        (OSError(errno.EDQUOT, "x", "d"), "failed", 4, "E-SPACE d: disk quota exceeded; free some room"),
        (OSError(errno.EIO, "x", "d"), "crashed", 70, "OSError"),
        (MemoryError(), "failed", 4, "E-SPACE: memory ran out (MemoryError); lower train.batch_tokens"),
        (out_of_memory(), "failed", 4, "E-SPACE: memory ran out ("),
        (torch.OutOfMemoryError("CUDA out of memory.\nTried"), "failed", 4, "E-SPACE: memory ran out (CUDA out of"),
        (RuntimeError("secret"), "crashed", 70, "RuntimeError"),
        (KeyboardInterrupt(), "interrupted", 130, "E-INTERRUPTED c: stopped by SIGINT; 3 shards are kept; run the"),
        (Terminated("SIGUSR2"), "terminated", 75, "E-TEMPORARY c: stopped by SIGUSR2; 3 shards are kept; run the"),
    ],
)
def test_each_cause_ends_in_its_own_way(err: BaseException, kind: str, exit_code: int, said: str) -> None:
    found = ending(err, kept="3 shards are kept", where="c")
    assert (found.kind, found.exit_code) == (kind, exit_code)
    assert found.error.startswith(said)
    assert "\n" not in found.error
    assert "secret" not in found.error


def test_a_signal_that_comes_when_all_is_said_changes_nothing(main: Main, monkeypatch: pytest.MonkeyPatch) -> None:
    def late(run: Callable[[], object]) -> int:
        """A launcher passes on to its ranks what they have heard themselves: while they flush their output."""
        code, flush = guard(run), sys.stdout.flush

        def flushed() -> None:
            os.kill(os.getpid(), signal.SIGUSR2)
            flush()

        monkeypatch.setattr(sys.stdout, "flush", flushed)
        return code

    guard = cli.guard
    monkeypatch.setattr(cli, "guard", late)
    code, _, err = main("cache", "info", "nowhere")
    assert (code, err.count("\n")) == (4, 1)
