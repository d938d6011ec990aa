"""Teachers' heads and rows as codecs meet them: correlated, heavy-tailed, some channels forty times the others."""

# Shapes: R rows, E teacher width, V vocabulary.

from dataclasses import dataclass

import ml_dtypes
import numpy as np
import torch

from kdpipe.stages.models.head import Head

DTYPES = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16, "float32": np.float32}
HEADS = {
    "plain": {},
    "bias": {"bias": True},
    "softcap": {"softcap": 4.0},
    "scale": {"scale": 0.4},
    "all": {"bias": True, "softcap": 6.0, "scale": 1.7},
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Drawn:
    """rows [R, E] of one teacher, its head, and the part of its vocabulary that counts."""

    rows: np.ndarray
    head: Head
    vocab_size: int


def drawn(
    *,
    dtype: str = "bfloat16",
    outliers: bool = False,
    num_rows: int = 5000,
    width: int = 37,
    vocab_size: int = 151,
    seed: int = 0,
    bias: bool = False,
    softcap: float | None = None,
    scale: float = 1.0,
) -> Drawn:
    """Rows near a few directions of the head, as a teacher's are that is sure of some tokens; the head is padded."""
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal((vocab_size + 9, width)) * np.exp(rng.standard_normal(width))
    likely = weight[rng.integers(0, vocab_size, num_rows)] / (weight**2).sum(1).mean()
    rows = likely * rng.gamma(2.0, 2.0, (num_rows, 1)) + rng.standard_normal((num_rows, width)) * 0.3 + 0.5
    if outliers:
        some = rng.permutation(width)[:3]
        rows[:, some] *= 40
        weight[:, some] /= 40
    tensor = torch.from_numpy(weight).to(getattr(torch, dtype))
    return Drawn(
        rows=rows.astype(DTYPES[dtype]),
        head=Head(
            tensor,
            bias=torch.from_numpy(rng.standard_normal(len(weight))).to(tensor.dtype) if bias else None,
            softcap=softcap,
            scale=scale,
        ),
        vocab_size=vocab_size,
    )
