"""Prepared: what is known of samples when their data files have been read, whoever is to learn from them.

    FOLDER/{PREPARED.json, samples.arrow, shards.arrow}      for a student without a teacher
    CACHE/{PLAN.json, samples.arrow, shards.arrow, ...}      a Plan: the same, and all about the teacher that reads them

Invariant: written once, after the two tables it has digests of. It holds no time, host, pid or path.
"""

import contextlib
import hashlib
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self

from pydantic import ConfigDict, Field

from kdpipe.manifests.durable import canonical
from kdpipe.manifests.errors import KdpipeError
from kdpipe.manifests.record import Record, read_record
from kdpipe.manifests.shard_table import NO_SHARDS, SHARDS_FILE, ShardTable, read_shards
from kdpipe.manifests.specs import MAX_SHARD_TOKENS

PREPARED_FILE = "PREPARED.json"

Count = Annotated[int, Field(ge=0)]
ShardCount = Annotated[int, Field(ge=0, lt=1 << 31)]
"""Numbers of shards are int32 in samples.arrow."""


class SamplesFingerprint(Record):
    """What samples were made of, each part a digest."""

    tokenizer: str
    """sha256 of the tokenizer's definition."""
    template: str
    """sha256 of the chat template."""
    data: str
    """sha256 over every sample's id, number of tokens, token ids and mask, in order."""

    def overall(self) -> str:
        return hashlib.sha256(canonical(self.model_dump())).hexdigest()


class SamplesSettings(Record):
    """The choices that decide which samples there are."""

    max_length: int
    overlong: str
    supervise: str
    shard_tokens: Annotated[int, Field(ge=1, le=MAX_SHARD_TOKENS)]
    """Tokens a shard holds at most; a longer sample has one of its own."""


class Ancestor(Record):
    """An earlier plan of a cache that grew: its shards are the first ones and carry its digest."""

    plan: str
    samples_digest: str
    shards_digest: str
    num_shards: ShardCount
    """Shards it has, those of the plans before it too."""


class Prepared(Record):
    """PREPARED.json, and the shards' bounds, which lie beside it; a shard is a stretch of samples.arrow."""

    model_config = ConfigDict(arbitrary_types_allowed=True)
    FILE: ClassVar[str] = PREPARED_FILE

    fingerprint: SamplesFingerprint
    settings: SamplesSettings
    num_samples: Count
    num_tokens: Count
    num_rows: Count
    heldout_fraction: float
    counts: dict[str, int]
    """What prepare did: samples read, kept, truncated, dropped and why."""
    samples_digest: str
    """sha256 of samples.arrow."""
    shards_digest: str
    """sha256 of shards.arrow."""
    num_shards: ShardCount
    """Shards of the whole, those of the plans before this one too."""
    vocabulary_digest: str
    """sha256 of the tokenizer's id-to-token table: what a student's tokenizer must agree with."""
    grown_from: tuple[Ancestor, ...]
    """The plans before this one, oldest first; none where nothing ever grew."""
    shards: ShardTable = Field(default_factory=lambda: NO_SHARDS, exclude=True)
    """Of the whole; not in the record but in the shards.arrow of every generation."""

    def to_bytes(self) -> bytes:
        return canonical(self.model_dump(mode="json"))

    def changed(self, **changes: Any) -> Self:
        """This record with other fields. Unlike model_copy it does not keep the digest of the old ones."""
        kind = type(self)
        return kind.model_validate({name: getattr(self, name) for name in kind.model_fields} | changes)

    @property
    def generation(self) -> int:
        """How often it grew."""
        return len(self.grown_from)

    def brought(self) -> list[range]:
        """Numbers of the shards that each generation brought."""
        edges = [0, *(before.num_shards for before in self.grown_from), self.num_shards]
        return [range(*pair) for pair in pairwise(edges)]


def read_prepared(folder: Path) -> Prepared | None:
    """The record in a folder of samples for a student; None where there is none, or what there is cannot be read."""
    with contextlib.suppress(KdpipeError, OSError):
        record = read_record(folder / PREPARED_FILE, Prepared)
        if record is not None:
            table = read_shards(
                folder / SHARDS_FILE,
                digest=record.shards_digest,
                num_shards=record.num_shards,
                plan=Path(PREPARED_FILE),
            )
            return record.changed(shards=table)
    return None
