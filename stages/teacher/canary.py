"""Does kdpipe know everything between a row and the teacher's logits? Asked of the model itself, once, at the start.

Logits recomputed from rows and head by the formula of manifests/teacher.py are compared with the model's own. An
architecture with a step that HeadRecord has no word for (another scale, a projection, a soft cap under a new name)
is refused here, before a row is stored.
"""

# Shapes: V' rows of the head, E teacher width.

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from kdpipe.manifests.compare import TOLERANCE
from kdpipe.manifests.errors import TeacherError
from kdpipe.stages.models.head import Head


class ShowsLogits(Protocol):
    @property
    def architecture(self) -> str:
        """Class name of the model."""
        ...

    def rows_and_logits(self, token_ids: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """The head's input [n, E] and the model's own logits [n, V'] for one sample."""
        ...


def check_head(engine: ShowsLogits, head: Head, samples: Sequence[np.ndarray], *, path: Path) -> float:
    """Compare the head's formula with the model's own logits on a few samples (int32 [n] each); the measured error.

    The error is root mean square of the differences over that of the logits. Allowed: fp32 summation, or the rounding
    of each logit to the model's dtype. Raises TeacherError beyond it.
    """
    allowed = head.allowed_error
    errors = []
    for token_ids in samples:
        rows, logits = engine.rows_and_logits(token_ids)
        if not bool(torch.isfinite(rows).all() and torch.isfinite(logits).all()):
            raise TeacherError(
                f"its hidden states or logits are not finite in {head.dtype}; "
                "are the weights whole? Try another --dtype",
                where=path,
            )
        errors.append(head.error(rows, logits))
    worst = float(np.max(errors, initial=0.0))  # a NaN among them is the maximum
    if not worst <= allowed:
        raise TeacherError(
            f"logits from rows and lm_head differ from the model's own by {worst:.1e} (allowed {allowed:.1e}): "
            f"{engine.architecture} does something between hidden state and logits that kdpipe does not know",
            where=path,
        )
    return worst


def compare_rows(
    rows: Sequence[torch.Tensor], reference: Sequence[torch.Tensor], *, dtype: str, exact: bool, path: Path
) -> float:
    """rms(rows - reference) / rms(reference) of the worst sample, [n, E] each. Raises TeacherError beyond TOLERANCE.

    exact: whether they come of the same weights; quantised ones are measured and not judged, short of NaN.
    """
    allowed = TOLERANCE[dtype] if exact else float("inf")
    errors = [
        float((ours.double() - own.double()).norm() / own.double().norm())
        for ours, own in zip(rows, reference, strict=True)
    ]
    worst = float(np.max(errors, initial=0.0))  # a NaN among them is the maximum
    if not worst <= allowed or np.isnan(worst):
        raise TeacherError(
            f"the engine's rows differ from transformers' own by {worst:.1e} (allowed {allowed:.1e}): "
            "it runs this model otherwise; use --engine transformers",
            where=path,
        )
    return worst
