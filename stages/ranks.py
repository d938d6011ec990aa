"""Ranks: the processes of one run, and what they must agree on.

    with joined(device) as ranks: ranks.rank, ranks.world_size, ranks.from_first(find), ranks.largest([..])

Every method is collective: all ranks call it, in the same order.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from kdpipe.manifests.errors import PeerError

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Ranks:
    """This process among those of its run; alone, it is rank 0 of one."""

    rank: int
    world_size: int
    device: torch.device

    def mesh(self, shard_size: int | None = None) -> DeviceMesh:
        """All ranks in one row; with shard_size in rows of so many, each to hold a copy of what is sharded."""
        size = shard_size or self.world_size
        if size == self.world_size:
            return init_device_mesh(self.device.type, (size,))
        return init_device_mesh(self.device.type, (self.world_size // size, size), mesh_dim_names=("copies", "parts"))

    def from_first(self, find: Callable[[], T]) -> T:
        """What rank 0 finds, on every rank: two clients of a network file system may not see the same."""
        found = [find() if self.rank == 0 else None]
        dist.broadcast_object_list(found, src=0)
        return found[0]  # type: ignore[return-value]

    def together(self, work: Callable[[], T]) -> T:
        """What this rank's `work` returns, which waits for no other. Where one rank fails all do: none waits for it.

        Raises what `work` raises, PeerError where it is another rank's that failed.
        """
        try:
            found, problem = [work()], None
        except Exception as err:
            found, problem = [], err
        (failed,) = self.largest([float(problem is not None)])
        if problem is not None:
            raise problem
        if failed:
            raise PeerError("another rank failed, which says why; run it again")
        return found[0]

    def largest(self, values: Sequence[float]) -> list[float]:
        """Each value's largest over all ranks."""
        found = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return [float(value) for value in found.tolist()]

    def sums(self, values: torch.Tensor) -> list[float]:
        """Each value's sum over all ranks; `values` is changed."""
        dist.all_reduce(values)
        return [float(value) for value in values.tolist()]

    def each(self, value: T) -> list[T]:
        """What every rank has, in the order of the ranks."""
        found: list[T | None] = [None] * self.world_size
        dist.all_gather_object(found, value)
        return found  # type: ignore[return-value]

    def agree(self, digest: str) -> bool:
        """Whether every rank has the same digest, in hexadecimal."""
        numbers = [float(byte) for byte in bytes.fromhex(digest)]
        largest = self.largest([*numbers, *(-number for number in numbers)])
        return all(high == -low for high, low in zip(largest[: len(numbers)], largest[len(numbers) :], strict=True))

    def barrier(self) -> None:
        dist.barrier()


@contextmanager
def joined(device: torch.device, *, cpu_tensors: bool = False) -> Iterator[Ranks]:
    """torch.distributed, up for as long as the block lasts: RANK, WORLD_SIZE of the environment; alone without.

    cpu_tensors: what is kept on the CPU is summed over the ranks of GPUs too
    """
    backend = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl" if cpu_tensors else "nccl"}[device.type]
    if "RANK" in os.environ:
        if device.type == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield Ranks(rank=dist.get_rank(), world_size=dist.get_world_size(), device=device)
    finally:
        dist.destroy_process_group()
