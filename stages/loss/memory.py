"""Memory for the large buffers of a step: on Linux CPUs anonymous mappings that ask for huge pages.

A step touches some 200 MiB of fresh memory. In pages of 4 KiB that is 50,000 page faults, 8-12 % of a whole loss step
where they were measured; in pages of 2 MiB it is a hundred. Other devices have torch's caching allocator.
Invariant: the tensor owns its mapping and the memory goes back with the last view of it.
"""

import math
import mmap
from collections.abc import Sequence

import torch
from torch import Tensor

HUGE_PAGE_BYTES = 2 << 20


def zeros(shape: Sequence[int], *, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A contiguous tensor of zeros on the device of `like`, in its dtype unless another is given."""
    dtype = dtype or like.dtype
    num_bytes = math.prod(shape) * dtype.itemsize
    if like.device.type != "cpu" or num_bytes < HUGE_PAGE_BYTES or not hasattr(mmap, "MADV_HUGEPAGE"):
        return like.new_zeros(shape, dtype=dtype)
    mapping = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    mapping.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(mapping, dtype=dtype).view(shape)
