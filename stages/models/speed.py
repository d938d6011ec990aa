"""Speed: what a matrix product reaches here, for estimates of time.

python -m kdpipe.stages.models.speed bfloat16 auto      of all devices together, by a process that loads no torch
"""

import sys
import time

import torch

from kdpipe.stages.models.device import pick_device

SIZE = 512
TIMED_S = 0.2


def matmul_flops(dtype: torch.dtype, device: torch.device) -> float:
    """Floating-point operations a second of [512, 512] matrix products; takes a fraction of a second."""
    square = torch.ones(SIZE, SIZE, dtype=dtype, device=device)
    result, count = square @ square, 0  # the first one is slow
    _wait(result)
    began = time.perf_counter()
    while (passed := time.perf_counter() - began) < TIMED_S:
        _wait(square @ square)
        count += 1
    return 2 * SIZE**3 * count / passed


def _wait(result: torch.Tensor) -> None:
    if result.device.type == "cuda":
        torch.cuda.synchronize()


def machine_flops(dtype: torch.dtype, device: torch.device) -> float:
    """As `matmul_flops`, of all GPUs where it is one."""
    return matmul_flops(dtype, device) * (torch.cuda.device_count() if device.type == "cuda" else 1)


if __name__ == "__main__":
    print(machine_flops(getattr(torch, sys.argv[1]), pick_device(sys.argv[2])))
