"""[sweep]: one run file, many students: which keys vary, over which values, and where the students go."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, JsonValue, field_validator

from kdpipe.manifests.specs.base import Count, Flag, Spec

NAME = "name"
"""Of a table of sweep.runs: what its run is called."""


class SweepSpec(Spec):
    """[sweep]: the students that one run file describes, a run each."""

    command: Literal["train", "stream", "onpolicy"] = "train"
    """What makes each student: kdpipe train, stream or onpolicy."""
    output: Annotated[Path | None, Flag(takes="FOLDER")] = None
    """Where the students go, each in a folder of its run's name; train.output when not given."""
    jobs: Count = 1
    """Runs at a time on this machine; each has its share of the cores, or its own GPUs."""
    grid: dict[str, Annotated[tuple[JsonValue, ...], Field(min_length=1)]] = {}  # noqa: RUF012 - pydantic copies it
    """Keys of the run file and the values that each takes: every combination is a run."""
    runs: tuple[dict[str, JsonValue], ...] = ()
    """Runs one by one, each a table of keys, with a name if you like; with a grid, each is combined with all of it."""
    report: bool = True
    """End with a page that compares the students: OUTPUT/report.html."""

    @field_validator("grid", mode="before")
    @classmethod
    def _whole_keys_of_grid(cls, given: Any) -> Any:
        if not isinstance(given, Mapping):
            return given
        keys = whole_keys(given)
        for key, values in keys.items():
            if not isinstance(values, list | tuple):
                raise ValueError(f"{key} takes a list of values")
            if not values:
                raise ValueError(f"{key} has no value")
        return keys

    @field_validator("runs", mode="before")
    @classmethod
    def _whole_keys_of_runs(cls, given: Any) -> Any:
        if not isinstance(given, list | tuple):
            raise ValueError("expected a list of tables ([[sweep.runs]])")
        runs = [whole_keys(run) if isinstance(run, Mapping) else run for run in given]
        for run in runs:
            if isinstance(run, Mapping) and NAME in run and not (isinstance(run[NAME], str) and run[NAME]):
                raise ValueError(f"a name is a text, got {run[NAME]!r}; leave it out for one of what varies")
        return runs


def whole_keys(table: Mapping[str, Any]) -> dict[str, Any]:
    """Tables within tables as whole keys, however they were written: {"train": {"lr": [1]}} -> {"train.lr": [1]}.

    Raises ValueError for a key that is given in two ways, or has an empty part.
    """
    found: dict[str, Any] = {}
    for key, value in _leaves(table, ()):
        if not all(key):
            raise ValueError(f"'{'.'.join(key)}' is not of the form table.key")
        if (name := ".".join(key)) in found:
            raise ValueError(f"'{name}' is given twice")
        found[name] = value
    return found


def _leaves(table: Mapping[str, Any], above: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    for name, value in table.items():
        key = (*above, *(part.strip() for part in str(name).split(".")))
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, key)
        else:
            yield key, value
