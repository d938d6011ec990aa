"""Draws: numbers that look random and are functions of their counters alone.

No generator, so no state to save: the same seed and keys give the same numbers on any device, in any order, on any
number of ranks, with any version of torch or numpy.
"""

# Shapes: T keys, K numbers of each.

import torch
from torch import Tensor

MASK = 2**64 - 1
BITS = 48
"""Of a uniform number: few enough that it times a sum in fp64 never rounds up to that sum."""


def mixed(value: Tensor) -> Tensor:
    """splitmix64 (Steele, Lea, Flood 2014) of each int64, taken as 64 bits."""
    value = value + _signed(0x9E3779B97F4A7C15)
    value = (value ^ _shifted(value, 30)) * _signed(0xBF58476D1CE4E5B9)
    value = (value ^ _shifted(value, 27)) * _signed(0x94D049BB133111EB)
    return value ^ _shifted(value, 31)


def mixed_seed(*parts: int) -> int:
    """One seed, an int64, from several whole numbers."""
    value = torch.zeros((), dtype=torch.int64)
    for part in parts:
        value = mixed(value ^ _signed(part & MASK))
    return int(value)


def uniform(keys: Tensor, count: int, seed: int) -> Tensor:
    """[T, K] numbers in (0, 1), fp64: row t a function of seed and keys[t] (int64 [T])."""
    rows = mixed(keys ^ mixed_seed(seed))
    columns = torch.arange(count, device=keys.device)
    return (_shifted(mixed(rows[:, None] + columns), 64 - BITS).double() + 0.5) * 2.0**-BITS


def _shifted(value: Tensor, bits: int) -> Tensor:
    """To the right, zeros coming in: torch's own shift repeats the sign."""
    return (value >> bits) & (MASK >> bits)


def _signed(value: int) -> int:
    """The int64 of these 64 bits."""
    return value - 2**64 if value >= 2**63 else value
