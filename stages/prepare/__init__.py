"""Prepare: data files -> a stream of tokenised samples, with every cut or dropped record reported."""

from kdpipe.stages.prepare.samples import prepare

__all__ = ["prepare"]
