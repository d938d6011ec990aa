"""[cache]: where a teacher's rows are kept, which, and how they are read."""

from pathlib import Path
from typing import Annotated

from pydantic import Field, ValidationInfo, field_validator

from kdpipe.manifests.specs.base import Count, Flag, Io, Paths, RowsChoice, Spec, Unmatched

SHARD_TOKENS = 65536
"""Tokens a shard holds at most, unless another size is asked for, and so the teacher's work that a kill can lose."""
MAX_SHARD_TOKENS = 1 << 30
"""Places of tokens in a shard are int32 in samples.arrow."""


class CacheSpec(Spec):
    """[cache]: where a teacher's rows are kept, which, and how they are read."""

    path: Annotated[Paths, Flag("--cache", "FOLDER")] = ()
    """The cache, or several to train on: of one teacher, or of more where loss.teacher_mix says how. Texts that two
    caches of one teacher have are trained on twice, which is said; one whose texts are all in another is refused."""
    weights: tuple[Annotated[float, Field(gt=0.0)], ...] = ()
    """Share of each cache in the supervised tokens of an epoch, one a cache, divided by their sum: docs/mixtures.md.
    Every sample once an epoch when not given."""
    unmatched: Unmatched = "refuse"
    """What becomes of samples that not all of several teachers have rows for, where all are to teach the same ones:
    an error, or left out and counted."""
    rows: RowsChoice = "supervised"
    """Keep the rows of supervised tokens only, or of every token."""
    codec: str = "raw"
    """How rows are stored: raw is as they come; int8 takes half of bfloat16's bytes; fisher a third to a fifth, as
    codec_kl or codec_bytes says; one of your own by its name."""
    codec_kl: Annotated[float | None, Field(gt=0.0, le=1.0), Flag(takes="NATS")] = None
    """What fisher may lose: mean KL divergence between the teacher's distribution and that of a stored row, in nats.
    0.01 when neither this nor codec_bytes is given; two engines' bfloat16 rows of one teacher differ by 0.001."""
    codec_bytes: Annotated[float | None, Field(gt=0.0, lt=1.0), Flag(takes="SHARE")] = None
    """What fisher may take, in place of codec_kl: bytes of a stored row over those of a raw one."""
    max_codec_kl: Annotated[float | None, Field(ge=0.0), Flag(takes="NATS")] = None
    """Refuse a cache whose codec loses more than this, in nats: the mean KL divergence that was measured when it was
    made. 0 takes raw rows alone. Any cache is taken when not given."""
    shard_tokens: Annotated[int, Field(ge=1, le=MAX_SHARD_TOKENS)] = SHARD_TOKENS
    """Tokens a shard holds at most, and so the teacher's work that a kill can lose; more for a very large cache."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Chooses the rows that are checked twice."""
    group: Annotated[str | None, Flag(takes="NAME")] = None
    """Unix group that may read what is written, and what is added there later; otherwise only you can (files 0600,
    folders 0700)."""
    stage_dir: Annotated[Path | None, Flag(takes="FOLDER")] = None
    """Folder on this machine's own disk to which the cache is copied before a student trains from it, once for all
    runs of the machine; the copy is verified. Variables of the shell are filled in."""
    stage_max_bytes: Count | None = None
    """Bytes that the copies in stage_dir may take: those not used for the longest are removed, never one in use. Its
    disk is the limit when not given."""
    io: Io = "mmap"
    """How the cache is read: mapped, or with pread, which suits network file systems."""

    @field_validator("weights")
    @classmethod
    def _one_a_cache(cls, weights: tuple[float, ...], info: ValidationInfo) -> tuple[float, ...]:
        paths = info.data.get("path", ())
        if weights and paths and len(weights) != len(paths):
            raise ValueError(f"{len(weights)} weights for {len(paths)} caches; give one each")
        return weights
