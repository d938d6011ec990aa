"""What the ranks of test_launch.py run; a module, because spawned processes import it by name. Run as a program it
launches `sleep` behind the command line's guard."""

import os
import signal
import sys
import time
from pathlib import Path

from kdpipe.manifests.errors import DataError, TemporaryError, stopped


def rank() -> int:
    return int(os.environ["RANK"])


def sign_in(folder: str) -> None:
    """Leave this rank's pid and wait for the other's."""
    half = Path(folder, f"{rank()}.half")
    half.write_text(str(os.getpid()))
    half.rename(half.with_suffix(".pid"))
    while not Path(folder, f"{1 - rank()}.pid").exists():
        time.sleep(0.01)


def read_what_shrank(folder: str) -> None:
    """Rank 1 reads a mapped file that was cut."""
    import mmap

    sign_in(folder)
    if rank() == 1:
        path = Path(folder, "rows")
        path.write_bytes(bytes(1 << 16))
        with open(path, "rb") as file:
            there = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
        os.truncate(path, 0)
        print(there[9000])
    time.sleep(60)


def meet(folder: str) -> str:
    """Every rank writes its file and waits for the other, then rank 0 sums over gloo."""
    import torch
    import torch.distributed

    sign_in(folder)
    torch.distributed.init_process_group("gloo")
    total = torch.ones(1)
    torch.distributed.all_reduce(total)
    torch.distributed.destroy_process_group()
    return (
        f"rank {rank()} of {os.environ['WORLD_SIZE']}, sum {total.item():.0f}, {os.environ['OMP_NUM_THREADS']} threads"
    )


def refuse(folder: str) -> None:
    """Rank 1 finds bad data; rank 0 has lost it, raises at once and would be the first seen."""
    sign_in(folder)
    if rank() == 1:
        time.sleep(0.2)
        raise DataError("expected a list of messages, got 7", where="chat.jsonl:3")
    raise TemporaryError("a peer is gone")


def die(folder: str) -> None:
    """Rank 1 is killed; rank 0 raises because of it and would be the first seen."""
    sign_in(folder)
    if rank() == 1:
        time.sleep(1.0)
        os.kill(os.getpid(), signal.SIGKILL)
    raise RuntimeError("connection closed by peer")


def bug(folder: str) -> None:
    """Rank 0 has a bug while rank 1 waits for it."""
    sign_in(folder)
    if rank() == 0:
        raise ZeroDivisionError("the loss of nothing")
    time.sleep(60)


def sleep(folder: str) -> None:
    sign_in(folder)
    time.sleep(60)


def save_when_asked(folder: str) -> None:
    """Each rank ends by itself when it is asked to stop, and says what it kept."""
    asked: list[int] = []
    signal.signal(signal.SIGINT, lambda number, _: asked.append(number))
    signal.signal(signal.SIGTERM, lambda number, _: asked.append(number))
    signal.signal(signal.SIGHUP, lambda number, _: asked.append(number))
    sign_in(folder)
    while not asked:
        time.sleep(0.01)
    time.sleep(0.5)
    raise stopped(signal.Signals(asked[0]).name, where=folder, kept="its state after step 6 is saved")


def stay(folder: str) -> None:
    """The ranks are asked to stop and do not."""
    signal.signal(signal.SIGINT, lambda number, _: Path(folder, f"{rank()}.asked").touch())
    sign_in(folder)
    while True:
        time.sleep(1)


if __name__ == "__main__":
    import rank_functions  # the ranks import this module by this name

    from kdpipe.pipeline.cli import guard
    from kdpipe.pipeline.launch import launch

    function, folder = getattr(rank_functions, sys.argv[2]), sys.argv[1]
    sys.exit(guard(lambda: launch(function, folder, nproc=2, where=folder, kept=lambda: "step 3 is kept")))
