"""Exchange: a cache's distributions cut to a few tokens, as other programs read and write them, and as side-cars.

topk       rows -> the likeliest tokens and their log-probabilities
columns    a sample as the columns of a project's own format
export     all samples of a cache into a folder of parquet files, or a dataset that load_from_disk opens
reading    the columns of such files -> samples with their rows, checked
importing  those as a cache, which says that it is biased
deriving   a cache of a few numbers of each distribution
kept       which numbers: likeliest tokens, drawn ones, the text's own
"""

from kdpipe.stages.exchange.deriving import Derived, derive
from kdpipe.stages.exchange.export import export_cache
from kdpipe.stages.exchange.importing import import_rows
from kdpipe.stages.exchange.kept import Asked

__all__ = ["Asked", "Derived", "derive", "export_cache", "import_rows"]
