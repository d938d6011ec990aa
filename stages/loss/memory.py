"""Memory for the large buffers of a step: on Linux CPUs anonymous mappings that ask for huge pages.

A step touches some 200 MiB of fresh memory. In pages of 4 KiB that is 50,000 page faults, 8-12 % of a whole loss step
where they were measured; in pages of 2 MiB it is a hundred. In a virtual machine that takes free memory back each of
them is dear: 64 MiB took 7 to 140 ms. So what only lives within a step is kept for the next one (`scratch`), and what
a step gives away (`zeros`: gradients) is kept, up to IDLE_BYTES, when its last view is gone. Other devices have torch's
caching allocator.
Invariant: no memory is handed out again while a view of it lives.
"""

import math
import mmap
import threading
import weakref
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

HUGE_PAGE_BYTES = 2 << 20
LARGEST_KEPT_BYTES = 31 << 20
IDLE_BYTES = 64 << 20


def zeros(shape: Sequence[int], *, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A contiguous tensor of zeros on the device of `like`, in its dtype unless another is given."""
    dtype = dtype or like.dtype
    num_bytes = math.prod(shape) * dtype.itemsize
    if like.device.type != "cpu" or not worth_mapping(num_bytes):
        return like.new_zeros(shape, dtype=dtype)
    idle = _idle.take(num_bytes)
    mapping = new_mapping(num_bytes) if idle is None else idle
    view = memoryview(mapping)  # what the storage holds, and ends with it
    weakref.finalize(view, _idle.put, mapping).atexit = False
    buffer = torch.frombuffer(view, dtype=dtype).view(shape)
    return buffer if idle is None else buffer.zero_()


def worth_mapping(num_bytes: int) -> bool:
    """Whether a buffer of the size gets a mapping of its own."""
    return num_bytes >= HUGE_PAGE_BYTES and hasattr(mmap, "MADV_HUGEPAGE")


def new_mapping(num_bytes: int) -> mmap.mmap:
    """Zeros, in huge pages where the kernel has them."""
    mapping = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    mapping.madvise(mmap.MADV_HUGEPAGE)
    return mapping


class _Idle:
    """Mappings no tensor uses any more. Tensors end in whichever thread drops them, hence the lock."""

    def __init__(self) -> None:
        self._mappings: list[mmap.mmap] = []
        self._lock = threading.RLock()  # a collection of garbage within `put` may end a tensor

    def take(self, num_bytes: int) -> mmap.mmap | None:
        """One of that very size, if there is one; whatever it holds."""
        with self._lock:
            sizes = [len(mapping) for mapping in self._mappings]
            return self._mappings.pop(sizes.index(num_bytes)) if num_bytes in sizes else None

    def put(self, mapping: mmap.mmap) -> None:
        """Keep it, and give the oldest back to the system where that makes too much."""
        if len(mapping) > IDLE_BYTES:
            return
        with self._lock:
            self._mappings.append(mapping)
            while sum(map(len, self._mappings)) > IDLE_BYTES:
                del self._mappings[0]

    def clear(self) -> None:
        with self._lock:
            self._mappings.clear()


_idle = _Idle()


class _Kept(threading.local):
    """Of each thread: the buffer of every name."""

    def __init__(self) -> None:
        self.buffers: dict[str, Tensor] = {}


_kept = _Kept()


def scratch(name: str, shape: Sequence[int], *, like: Tensor) -> Tensor:
    """A contiguous tensor in the dtype and on the device of `like`, its contents whatever they are.

    On a CPU it is this thread's buffer of that name, valid until the next call with the name; it grows and is kept.
    """
    if like.device.type != "cpu":
        return like.new_empty(shape)
    num_bytes = math.prod(shape) * like.dtype.itemsize
    if name not in _kept.buffers or _kept.buffers[name].numel() < num_bytes:
        _kept.buffers.pop(name, None)
        # Not of `zeros`: released, it is to go back to the system with its last view.
        if worth_mapping(num_bytes):
            _kept.buffers[name] = torch.frombuffer(new_mapping(num_bytes), dtype=torch.uint8)
        else:
            _kept.buffers[name] = torch.zeros(num_bytes, dtype=torch.uint8)
    return _kept.buffers[name][:num_bytes].view(like.dtype).view(shape)


def release_scratch() -> None:
    """Give this thread's kept buffers and all idle memory back."""
    _kept.buffers.clear()
    _idle.clear()


@cache
def keep_heap() -> None:
    """Have the allocator keep what a block frees, for the next block; called once, on a CPU.

    glibc returns freed memory to the system above a threshold that starts at 128 KiB and rises to the largest chunk
    freed so far, 32 MiB at most. Passes that keep some arrays [R, V] between them took up to half as long again.
    """
    torch.empty(LARGEST_KEPT_BYTES, dtype=torch.uint8)  # freed at once
