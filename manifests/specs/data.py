"""[data]: the data files and how they become samples."""

from typing import Annotated, Literal

from pydantic import Field

from kdpipe.manifests.specs.base import Count, Flag, Fraction, Paths, Spec


class DataSpec(Spec):
    """How data files become samples."""

    max_length: Count = 4096
    """Longest sample in tokens, prompt and answer together."""
    overlong: Literal["truncate", "drop"] = "truncate"
    """What happens to a longer sample: its tail is cut off, or it is left out; both are counted."""
    supervise: Literal["assistant", "last", "completion", "all"] = "assistant"
    """Which tokens are targets: every assistant turn, the last one, the completion, or every token."""
    heldout_fraction: Fraction = 0.05
    """Share of the samples kept out of training for evaluation, chosen by each sample's content."""
    subset: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Share of the training samples to train on, chosen by each sample's content: those of 0.1 are among those of 0.5.
    The held-out ones stay the same."""
    bad_records: Literal["stop", "skip"] = "stop"
    """A record that cannot be read ends the command, which shows the first ten, or is left out, counted and listed in
    prepare.jsonl, in CACHE/runs or OUTPUT."""
    max_bad: Fraction = 0.01
    """Share of the records that may be left out as bad; more of them is an error."""
    where: dict[str, str] = {}  # noqa: RUF012 - pydantic copies it
    """Only records whose column has this value become samples: domain=math. A record that lacks the column is a bad
    one. Teachers of their own for parts of the data: docs/mixtures.md"""
    strict: bool = False
    """A sample whose text is not what its record says (the chat template dropped or changed something, nothing ends an
    answer) is an error, not a count."""


class DataTable(DataSpec):
    """[data]: the data files and how they become samples."""

    paths: Annotated[Paths, Flag("--data", "FILE...")] = ()
    """Data files or folders: jsonl, json, parquet, Arrow. Takes several values, and may be repeated."""
    workers: Annotated[Count | None, Flag("--prepare-workers")] = None
    """Processes that tokenise the data; as many as it is worth, up to one a core, when not given."""
