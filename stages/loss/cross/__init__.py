"""Losses between models of other tokenizers: the methods, their dense reference and the fused twin."""

from kdpipe.stages.loss.cross.across import check_loss, distill_across, extra_of
from kdpipe.stages.loss.cross.methods import METHODS, Method, find_method
from kdpipe.stages.loss.cross.projection import Projection

__all__ = ["METHODS", "Method", "Projection", "check_loss", "distill_across", "extra_of", "find_method"]
