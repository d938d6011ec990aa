"""Worker: a process of the pool, from its first byte to its last. python -m kdpipe.stages.prepare.worker DESCRIPTOR

The link brings a class, such as Preparing, and its arguments, then batches for one of it; each is answered with what
became of it, or with the exception that it caused. Batches are read by a thread of their own, so that the pool never
waits for a batch to be taken.
Invariant: the process ends when the link does.
"""

import gc
import pickle
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from queue import SimpleQueue

from kdpipe.stages.prepare.pool import Connection, open_link
from kdpipe.stages.prepare.sources import RawRecord
from kdpipe.stages.prepare.work import Worked


def main(descriptor: int) -> None:
    link = open_link(descriptor)
    tasks: SimpleQueue[bytes | None] = SimpleQueue()
    threading.Thread(target=_read, args=(link, tasks), daemon=True).start()
    with suppress(BrokenPipeError, ConnectionResetError):
        if (setup := tasks.get()) is not None:
            make, *arguments = pickle.loads(setup)
            preparing = make(*arguments)
            gc.freeze()  # looking through libraries again and again for what is not needed took a tenth of the time
            gc.set_threshold(100_000)
            while (task := tasks.get()) is not None:
                link.send_bytes(_answer(preparing, task))


def _read(link: Connection, tasks: "SimpleQueue[bytes | None]") -> None:
    with suppress(EOFError, OSError):
        while True:
            tasks.put(link.recv_bytes())
    tasks.put(None)


def _answer(preparing: Callable[[Sequence[RawRecord]], Worked], task: bytes) -> bytes:
    try:
        return pickle.dumps(preparing(pickle.loads(task)), protocol=pickle.HIGHEST_PROTOCOL)
    except Exception as err:
        err.add_note("".join(traceback.format_exception(err)))
        return pickle.dumps(err)


if __name__ == "__main__":
    main(int(sys.argv[1]))
