"""Generate: answers that a model writes to prompts, as a data file that `kdpipe extract` and others read.

run      prompts -> batches -> writer -> lines, window by window; what is there already is kept
answers  an answer as a record, and whether reading it again gives the ids that were written
file     the file of records: whole windows, flushed, one run at a time
"""

from kdpipe.stages.generate.run import GenerateSpec, generate

__all__ = ["GenerateSpec", "generate"]
