"""Records: what kdpipe writes of itself as JSON, each a pydantic model, and how one is read back.

Invariant: nothing but a regular file of a bounded size is read, and an unknown or missing key is an error.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from kdpipe.manifests.durable import read_small
from kdpipe.manifests.errors import LayoutError

MAX_RECORD_BYTES = 16 << 20
"""A record names files and settings: 100,000 files are some 10 MiB."""

EXPECTED = {
    "path_type": "expected a path",
    "model_type": "expected a table of keys",
    "dict_type": "expected a table",
    "tuple_type": "expected a list",
}
"""Of pydantic's findings, by type, those that it says in words of Python."""


class Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


R = TypeVar("R", bound=Record)


def read_record(path: Path, kind: type[R]) -> R | None:
    """The record at `path`, None where there is none. Raises LayoutError for another kind of file."""
    try:
        data = read_small(path, MAX_RECORD_BYTES)
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        return kind.model_validate_json(data)
    except ValidationError as err:
        raise LayoutError(first_problem(err), where=path) from None


def first_problem(err: ValidationError) -> str:
    """The first of pydantic's findings: "'inputs.spec.train.lr': expected a valid number"."""
    first = err.errors()[0]
    place = ".".join(str(part) for part in first["loc"])
    return f"'{place}': {in_words(first)}" if place else in_words(first)


def in_words(problem: Mapping[str, Any]) -> str:
    """One of pydantic's findings as our errors say it."""
    said = str(problem["msg"]).removeprefix("Value error, ").replace("Tuple should", "a list should")
    return EXPECTED.get(problem["type"]) or said.replace("Input should be", "expected")
