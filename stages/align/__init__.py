"""Align: samples of a student with a tokenizer of its own, beside those of the caches that it learns from.

joining   data -> the student's samples, each with its place in the caches and its spans
aligned   made once for some caches, and found again
crossing  the data set of such a student, and what is refused
retelling  an answer that it wrote itself, as its teacher reads it
"""

from kdpipe.stages.align.aligned import Aligned, align
from kdpipe.stages.align.crossing import Asked, Crossing, cross
from kdpipe.stages.align.joining import cache_tokenizer
from kdpipe.stages.align.retelling import Retelling, Retold

__all__ = ["Aligned", "Asked", "Crossing", "Retelling", "Retold", "align", "cache_tokenizer", "cross"]
