"""Exchange: a cache's distributions cut to their likeliest tokens, as other programs read them.

topk      rows -> the likeliest tokens and their log-probabilities
columns   a sample as the columns of a project's own format
export    all samples of a cache into a folder of parquet files, or a dataset that load_from_disk opens
"""

from kdpipe.stages.exchange.export import export_cache

__all__ = ["export_cache"]
