"""Router: the load-balancing loss of a mixture of experts, by the model's own formula.

    backbone(..., output_router_logits=True) -> logits of every router [tokens, experts] -> load_balancing_loss_func

num_experts * sum over experts of (share of the tokens sent there) * (mean probability of it), over all layers: as small
as it can be, the number of experts a token has, where all are used alike (Switch Transformer, arXiv 2101.03961, eq. 4).
It is of a batch and no sum over tokens: how a step is cut into batches changes it, here as in transformers.
"""

import sys
from typing import Any

import torch
from torch import nn

FUNCTION = "load_balancing_loss_func"
"""In the modelling file of each family that has such a loss."""
TOP_K = "num_experts_per_tok"


def router_weight(model: nn.Module, asked: float | None) -> float:
    """How much the loss counts: as asked, else as the model's config says; 0 for a model that has none."""
    config: Any = model.config
    own = getattr(config.get_text_config(), "router_aux_loss_coef", None)
    recorded = getattr(model, "_can_record_outputs", None) or {}
    if own is None or "router_logits" not in recorded or not hasattr(sys.modules[type(model).__module__], FUNCTION):
        return 0.0
    return float(own if asked is None else asked)


def router_loss(model: nn.Module, logits: tuple[torch.Tensor, ...], mask: torch.Tensor | None) -> torch.Tensor:
    """Of the router logits of one batch, each [tokens, experts], a scalar; mask: [S, L], tokens that do not pad it."""
    config: Any = model.config
    formula = getattr(sys.modules[type(model).__module__], FUNCTION)
    found: torch.Tensor = formula(logits, logits[0].shape[-1], getattr(config.get_text_config(), TOP_K), mask)
    return found
