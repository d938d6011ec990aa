"""The probe: whether an engine computes with the weights that the trainer thinks it has.

A fixed text is scored by both after every update. Their gap is k3 = exp(d) - 1 - d, d = log p_trainer - log p_engine,
in the mean over its tokens: an estimate of their KL divergence that is never negative (J. Schulman, "Approximating KL
divergence", 2020), about d^2 / 2 where d is small.
The trainer's scores of earlier versions are kept: an engine that still has old weights is recognised by them.
"""

# Shapes: n tokens of the probe.

from collections import deque

import numpy as np

from kdpipe.manifests.errors import CheckFailed
from kdpipe.manifests.specs import Dtype

BOUNDS: dict[Dtype, float] = {"float32": 1e-8, "bfloat16": 2e-2, "float16": 3e-4}
"""Largest gap that passes. Rounding alone makes 1e-14 in float32 on tiny models, 5e-11 on SmolLM2-135M (30 layers), and
2.4e-3 there in bfloat16, on a CPU; float16, whose roundings are an eighth of bfloat16's, has a 64th of its bound."""
REMEMBERED = 8


def gap(engine_logprobs: np.ndarray, trainer_logprobs: np.ndarray) -> float:
    """Mean k3 of two float32 [n-1]; infinite where one is not a number."""
    d = trainer_logprobs.astype(np.float64) - engine_logprobs.astype(np.float64)
    return float((np.expm1(d) - d).mean()) if np.isfinite(d).all() else np.inf


class Probe:
    """Compares engine and trainer on one text after each update.

    bound: largest gap that passes
    """

    def __init__(self, dtype: Dtype, bound: float | None = None) -> None:
        self._bound = BOUNDS[dtype] if bound is None else bound
        self._said: deque[tuple[int, np.ndarray]] = deque(maxlen=REMEMBERED)

    def check(self, version: int, engine_logprobs: np.ndarray, trainer_logprobs: np.ndarray) -> float:
        """The gap at a version of the weights. Raises CheckFailed over the bound, with the version it resembles."""
        found = gap(engine_logprobs, trainer_logprobs)
        earlier = {number: gap(engine_logprobs, said) for number, said in self._said}
        self._said.append((version, trainer_logprobs))
        if found <= self._bound:
            return found
        raise CheckFailed(
            f"engine and trainer are {found:.1e} apart on the probe, allowed are {self._bound:.1e}; "
            f"{_resembles(earlier, self._bound)}; run the same command again, it goes on from the last checkpoint",
            where=f"version {version} of the weights",
        )


def _resembles(earlier: dict[int, float], bound: float) -> str:
    nearest = min(earlier, key=earlier.__getitem__, default=None)
    if nearest is not None and earlier[nearest] <= bound:
        return f"the engine answers as version {nearest} did: the update was skipped"
    return "the engine answers as no version that is remembered: the update was partial, or corrupted"
