"""Weights of rows that an older student wrote."""

import pytest
import torch
from tests.stages.loss.cases import make_inputs

from kdpipe.stages.loss import Head, Importance, Side, importance

CPU = torch.device("cpu")


@pytest.mark.parametrize("head", [{}, {"softcap": 3.0, "scale": 0.5}], ids=["plain", "softcap"])
def test_weights_are_ratios_of_dense_probabilities_up_to_the_cap(
    head: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Among the shared vocabulary, at the temperature, whatever the number of rows at a time; 1 for other rows."""
    inputs, size, temperature = make_inputs(student_rows=260), 251, 0.7
    side = Side(inputs.student_hidden, Head(inputs.student_head, inputs.student_bias, **head))
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(size, (507,), generator=generator)
    rows = torch.randperm(507, generator=generator)[:101]
    now = (dense_logits(side, size) / temperature).log_softmax(-1)[rows].gather(1, tokens[rows, None])[:, 0].detach()
    written = (now + torch.randn(101, generator=generator)).float()
    monkeypatch.setattr(importance, "CHUNK_LOGITS", 10 * size + 3)
    made = Importance(1.5, temperature)
    found = made.weights(side, tokens, rows, written, size)
    ratios = (now - written).exp()
    wanted = torch.ones(507, dtype=torch.float64)
    wanted[rows] = ratios.clamp_max(1.5)
    assert found.dtype == torch.float32
    assert not found.requires_grad
    assert torch.allclose(found.double(), wanted, rtol=1e-5, atol=0.0)
    made.weights(side, tokens, rows[:7], written[:7], size)
    sums, largest = made.take(CPU)
    both = torch.cat([ratios, ratios[:7]])
    assert sums.tolist() == pytest.approx([108, float(both.clamp_max(1.5).sum()), int((both > 1.5).sum())], rel=1e-5)
    assert largest == 1.5
    assert [made.take(CPU)[0].tolist(), made.take(CPU)[1]] == [[0.0, 0.0, 0.0], 0.0], "told once"


def dense_logits(side: Side, size: int) -> torch.Tensor:
    head = side.head
    assert head.bias is not None
    logits = side.hidden.double() @ head.weight[:size].double().T + head.bias[:size].double()
    return logits if head.softcap is None else head.softcap * torch.tanh(logits * head.scale / head.softcap)


def test_logits_that_are_not_numbers_are_left_for_the_step_to_notice() -> None:
    """The loss of such a row is not a number whatever its weight; a weight may not be refused before."""
    side = Side(torch.full((3, 4), float("nan")), Head(torch.ones(5, 4)))
    rows = torch.arange(3)
    assert Importance(2.0, 1.0).weights(side, rows, rows, torch.zeros(3), 5).tolist() == [1.0, 1.0, 1.0]
