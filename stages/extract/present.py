"""Growing: what a cache holds already, and what of the data is new.

A sample is the same where its text's id, its token ids and its mask are; it is new as often as the data has it more
often than the cache.
"""

import hashlib
from collections import Counter
from pathlib import Path

import xxhash

from kdpipe.manifests.cache import Cache
from kdpipe.manifests.errors import CacheError
from kdpipe.manifests.plan import Ancestor, Plan, read_plan
from kdpipe.manifests.progress import Progress
from kdpipe.manifests.sample import Sample
from kdpipe.manifests.samples import identity


class Present:
    """What a cache holds before an extraction: its samples are left out, each as often as it is there.

    Cost: about 100 bytes of memory a sample; every token id is read twice. Raises CorruptError where they are damaged.
    """

    def __init__(self, cache: Path) -> None:
        opened = Cache.open(cache)
        self.plan, self.samples = opened.plan, opened.samples
        self.samples.verify()
        self._left = Counter(xxhash.xxh3_128_digest(each) for each in self.samples.identities())
        self.num_found = 0
        self._asked = hashlib.sha256()

    def take(self, sample: Sample) -> bool:
        """Whether the cache holds the sample, one more time than it was asked for before."""
        bits = identity(sample.content_id, sample.token_ids, sample.supervised)
        self._asked.update(bits)
        key = xxhash.xxh3_128_digest(bits)
        found = self._left[key] > 0
        if found:
            self._left[key] -= 1
            self.num_found += 1
        return found

    def ancestors(self) -> tuple[Ancestor, ...]:
        """What a plan that follows says it grew from."""
        plan = self.plan
        return (*plan.grown_from, plan.as_ancestor())

    def require_all(self, cache: Path) -> None:
        """The data must have all that the cache holds, or be all that it held before it grew. Raises CacheError."""
        missing = self.plan.num_samples - self.num_found
        earlier = (read_plan(cache, generation) for generation in range(self.plan.generation))
        if missing and self._asked.hexdigest() not in {plan.fingerprint.data for plan in earlier}:
            raise CacheError(
                f"its fingerprint.data is {self.plan.fingerprint.data[:12]}: {missing} of its {self.plan.num_samples} "
                "samples are not in this data; name all its data and the new, or add this to it with --grow, or choose "
                "another --cache",
                where=cache,
            )

    def report(self, plan: Plan, progress: Progress) -> None:
        """Say what the data adds to the cache."""
        if added := plan.num_samples - self.plan.num_samples:
            shards = len(plan.shards) - len(self.plan.shards)
            progress.note(
                f"the cache grows: {added} new samples in {shards} new shards, {self.num_found} of the data's are there"
            )
