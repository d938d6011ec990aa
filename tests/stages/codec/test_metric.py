"""The metric: a head's Fisher information is what a small error of a row costs, whatever becomes of its logits."""

import pytest
import torch
from tests.stages.codec.rows import HEADS, drawn

from kdpipe.stages.codec.metric import Lens
from kdpipe.stages.models.head import Head


def lens_and_rows(**kind: object) -> tuple[Lens, torch.Tensor, Head, int]:
    found = drawn(dtype="float32", num_rows=40, width=11, vocab_size=31, **kind)  # type: ignore[arg-type]
    return Lens.of(found.head, found.vocab_size, torch.device("cpu")), torch.from_numpy(found.rows), found.head, 31


def by_hand(head: Head, rows: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """The mean of J' (diag(p) - p p') J, J by autograd."""
    total = torch.zeros(rows.shape[1], rows.shape[1], dtype=torch.float64)
    double = Head(head.weight.double(), None if head.bias is None else head.bias.double(), head.softcap, head.scale)
    for row in rows.double():
        slope = torch.autograd.functional.jacobian(lambda one: double.logits(one[None], vocab_size)[0], row)
        p = double.logits(row[None], vocab_size)[0].softmax(-1)
        total += slope.T @ (torch.diag(p) - p[:, None] * p) @ slope
    return total / len(rows)


@pytest.mark.parametrize("kind", HEADS)
def test_information_is_that_of_the_finished_logits_within_the_vocabulary(kind: str) -> None:
    lens, rows, head, vocab_size = lens_and_rows(**HEADS[kind])
    wanted = by_hand(head, rows, vocab_size)
    assert torch.allclose(lens.information(rows), wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))


@pytest.mark.parametrize("kind", HEADS)
def test_divergences_are_those_of_the_heads_own_logits(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lens, rows, head, vocab_size = lens_and_rows(**HEADS[kind])
    other = rows + 0.05 * torch.randn(rows.shape, generator=torch.Generator().manual_seed(1))
    wanted, got = (head.logits(each, vocab_size).double().log_softmax(-1) for each in (rows, other))
    monkeypatch.setattr("kdpipe.stages.codec.metric.LOGITS_AT_ONCE", 7 * 31)
    found = lens.compare(rows, other)
    assert torch.allclose(found.kl, (wanted.exp() * (wanted - got)).sum(-1), atol=1e-6)
    assert torch.equal(found.same_top, wanted.argmax(-1) == got.argmax(-1))
    assert lens.compare(rows, rows).mean == 0.0
