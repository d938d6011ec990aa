"""The record a training run leaves beside its student: what it was made from and what came out.

`kdpipe.json` is written last, so a folder that has it holds a finished student.
"""

import hashlib
from pathlib import Path

from pydantic import ValidationError

from kdpipe.manifests.durable import canonical
from kdpipe.manifests.errors import LayoutError
from kdpipe.manifests.plan import Record
from kdpipe.manifests.specs import RunSpec

RUN_FILE = "kdpipe.json"


class RunInputs(Record):
    """Everything a run's result depends on."""

    student: str
    """sha256 over the student's weight files and config."""
    caches: tuple[str, ...]
    """Fingerprint of every cache trained on."""
    heldout_fraction: float
    spec: RunSpec

    def digest(self) -> str:
        return hashlib.sha256(canonical(self.model_dump(mode="json"))).hexdigest()


class RunRecord(Record):
    """kdpipe.json"""

    inputs: RunInputs
    num_steps: int
    num_tokens: int
    metrics: dict[str, int | float]


def read_run(folder: Path) -> RunRecord | None:
    """The record of the run whose student is in `folder`; None where it is not a student of ours."""
    path = folder / RUN_FILE
    if not path.is_file():
        return None
    try:
        return RunRecord.model_validate_json(path.read_bytes())
    except ValidationError as err:
        first = err.errors()[0]
        raise LayoutError(f"'{'.'.join(map(str, first['loc']))}': {first['msg']}", where=path) from None
