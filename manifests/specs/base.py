"""What every spec is made of: kinds of values, and a base that refuses unknown keys.

Invariant: a field's docstring is its description, on the command line (pipeline/options.py) and in docs/run-file.md.
"""

import string
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator

from kdpipe.manifests.provenance import SHORTEST_DIGEST

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Count = Annotated[int, Field(ge=1)]
Dtype = Literal["bfloat16", "float16", "float32", "uint8"]
"""Of rows and of what makes logits of them; uint8 is that of drawn tokens alone (sidecar.py)."""
DtypeChoice = Literal["auto", "bfloat16", "float16", "float32"]
Device = Literal["cpu", "cuda"]
DeviceChoice = Literal["auto", "cpu", "cuda"]
RowsChoice = Literal["supervised", "all"]
Unmatched = Literal["refuse", "leave_out"]
Io = Literal["mmap", "pread"]
"""How a cache's files are read: mapped, or with pread."""


@dataclass(frozen=True, slots=True)
class Flag:
    """How a field's option looks, where it is not `--the-field TYPE`.

    takes: what stands for its value in --help
    """

    name: str | None = None
    takes: str | None = None


def several(given: Any) -> Any:
    """One value as a list of it."""
    return (given,) if isinstance(given, str | Path) else given


def _code_digest(text: str) -> str:
    lower = text.lower()
    if not (SHORTEST_DIGEST <= len(lower) <= 64 and set(lower) <= set(string.hexdigits)):
        raise ValueError(
            f"not a digest of code, {SHORTEST_DIGEST} to 64 hexadecimal digits; without it the error names the model's"
        )
    return lower


Paths = Annotated[tuple[Path, ...], BeforeValidator(several)]
"""One path or several."""
CodeDigest = Annotated[str, AfterValidator(_code_digest)]
"""The sha256 of a model's own code in hexadecimal, or the start of it."""


class Spec(BaseModel):
    """Base of every spec: immutable, unknown keys refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_for_numbers(cls, value: Any, info: ValidationInfo) -> Any:
        wanted = cls.model_fields[info.field_name or ""].annotation
        values: Any = (value,)
        if get_origin(wanted) is dict and isinstance(value, dict):
            wanted, values = get_args(wanted)[1], value.values()
        if bool not in (wanted, *get_args(wanted)) and any(isinstance(each, bool) for each in values):
            raise ValueError("expected a number, got true or false")
        return value
