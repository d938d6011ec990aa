"""The router loss of a mixture of experts: which models have one, and that it is the model's own."""

from pathlib import Path

import pytest
import torch
from tests.families import make_family
from tests.models import make_model
from tests.opened import load_student

from kdpipe.stages.models.router import router_loss, router_weight

CPU = torch.device("cpu")


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "olmoe"])
def test_it_is_what_the_model_adds_to_its_own_loss(family: str, tmp_path: Path) -> None:
    """Padding left out, as the model does it with a mask."""
    model = load_student(make_family(family, tmp_path), torch.float32, CPU)
    ids, mask = torch.arange(3, 51).view(2, 24), torch.ones(2, 24, dtype=torch.int64)
    mask[1, 10:] = 0
    with torch.no_grad():
        own = model(input_ids=ids, attention_mask=mask, output_router_logits=True)
        assert router_loss(model, own.router_logits, mask) == pytest.approx(float(own.aux_loss), rel=1e-6)
        assert float(own.aux_loss) > 0.0
    assert router_weight(model, None) == model.config.router_aux_loss_coef
    assert router_weight(model, 0.25) == 0.25
    assert router_weight(model, 0.0) == 0.0


def test_a_model_without_routers_has_none(tmp_path: Path) -> None:
    model = load_student(make_model("llama", tmp_path), torch.float32, CPU)
    assert router_weight(model, None) == router_weight(model, 1.0) == 0.0
