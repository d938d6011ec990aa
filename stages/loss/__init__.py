"""Losses of distillation: the dense reference, the fused twin, and the metrics of evaluation."""

from kdpipe.stages.loss.divergences import DIVERGENCES
from kdpipe.stages.loss.divergences import find as find_divergence
from kdpipe.stages.loss.fused import distill, fused_distill_loss
from kdpipe.stages.loss.head import LowRank, Side
from kdpipe.stages.loss.importance import Importance
from kdpipe.stages.loss.metrics import TokenMetrics, token_metrics
from kdpipe.stages.loss.problem import DistillLoss, Problem, pose
from kdpipe.stages.loss.reference import reference_distill_loss
from kdpipe.stages.loss.sparse import DrawnSide, TokenSide, TopKSide
from kdpipe.stages.models.head import Head

__all__ = [
    "DIVERGENCES",
    "DistillLoss",
    "DrawnSide",
    "Head",
    "Importance",
    "LowRank",
    "Problem",
    "Side",
    "TokenMetrics",
    "TokenSide",
    "TopKSide",
    "distill",
    "find_divergence",
    "fused_distill_loss",
    "pose",
    "reference_distill_loss",
    "token_metrics",
]
