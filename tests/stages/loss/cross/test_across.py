"""Every method across tokenizers, fused, against its dense definition in fp64: values and gradients."""

from typing import Any

import pytest
import torch
from tests.stages.loss.cross.cases import Case, errors, make_case, outcome

from kdpipe.stages.loss.cross import METHODS, distill_across
from kdpipe.stages.loss.cross.reference import reference_across

EXACT = 3e-6
"""Relative, of fp32 against fp64."""


def assert_right(case: Case, method: str, *, allowed: float = EXACT, **spec: Any) -> None:
    right = outcome(reference_across, case.to(torch.float64), method, **spec)
    chunked = spec.pop("chunk_tokens", None)
    found = outcome(distill_across, case, method, chunk_tokens=chunked, **spec)
    off = errors(found, right)
    assert max(off.values()) < allowed, off


EVERYTHING: dict[str, Any] = {"temperature": 1.5, "scale_t2": True, "label_smoothing": 0.1, "z_loss": 1e-3}


@pytest.mark.parametrize("chunk_tokens", [None, 7])
@pytest.mark.parametrize("kd_weight", [1.0, 0.6])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_its_definition(method: str, kd_weight: float, chunk_tokens: int | None) -> None:
    assert_right(make_case(), method, kd_weight=kd_weight, chunk_tokens=chunk_tokens)
    case = make_case(padding=(5, 3))
    more = {"weights": torch.arange(float(len(case.labels))) % 5 / 2, "loss_scale": 0.37}
    assert_right(case, method, kd_weight=kd_weight, chunk_tokens=chunk_tokens, more=more, **EVERYTHING)
