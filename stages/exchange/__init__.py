"""Exchange: a cache's distributions cut to their likeliest tokens, as other programs read and write them.

topk       rows -> the likeliest tokens and their log-probabilities
columns    a sample as the columns of a project's own format
export     all samples of a cache into a folder of parquet files, or a dataset that load_from_disk opens
reading    the columns of such files -> samples with their rows, checked
importing  those as a cache, which says that it is biased
"""

from kdpipe.stages.exchange.export import export_cache
from kdpipe.stages.exchange.importing import import_rows

__all__ = ["export_cache", "import_rows"]
