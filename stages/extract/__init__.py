"""Extract: one pass of the teacher over the data, its rows committed shard by shard.

spec      what is asked
reading   data -> samples.arrow, shards.arrow, and what was left out
forecast  what it will make, from the same reading
probe     how fast the teacher is: some samples, run for real
planning  the plan: all that is decided, checked or refused before the teacher runs
staging   plan, samples, head and tokenizer made beside the cache and put in place at once
present   which samples of the data a cache holds already, where it grows
shards    plan -> engine -> gate -> commit, for the shards that are not there yet
calibrate the teacher on some samples first, where the cache's codec is fitted to its rows
convert   a raw cache once more, its rows coded
recompute the teacher again on some samples, beside what the cache holds
"""

from kdpipe.stages.extract.forecast import Forecast, forecast
from kdpipe.stages.extract.shards import extract
from kdpipe.stages.extract.spec import ExtractSpec

__all__ = ["ExtractSpec", "Forecast", "extract", "forecast"]
