"""[student] and [eval]: the model that learns, and how one is measured."""

from pathlib import Path
from typing import Annotated

from kdpipe.manifests.specs.base import CodeDigest, Count, DeviceChoice, DtypeChoice, Flag, Fraction, Spec


class StudentSpec(Spec):
    """[student]: the model that learns."""

    path: Annotated[Path | None, Flag("--student", "FOLDER")] = None
    """Student in Hugging Face format."""
    trust_remote_code: Annotated[CodeDigest | None, Flag(takes="DIGEST")] = None
    """Run the Python code that the student's folder brings (auto_map in its configs), if its sha256 is this one, or
    starts with it (12 digits or more). Without it such a model is refused and nothing of it runs; the message names
    the files to read and their digest. Code of another repository is never fetched."""


class EvalSpec(Spec):
    """[eval]: how a student is measured on held-out rows."""

    student: Annotated[Path | None, Flag(takes="FOLDER")] = None
    """Student in Hugging Face format; train.output of the run file when not given, else its student.path."""
    heldout_fraction: Fraction | None = None
    """Share of the samples to measure on, chosen by content; when not given the student's, else the cache's."""
    device: DeviceChoice = "auto"
    """Where the student runs; auto takes GPUs where there are any."""
    dtype: DtypeChoice = "auto"
    """Precision of the student; auto is the one its weights are stored in."""
    batch_tokens: Count | None = None
    """Tokens of a forward pass; train.batch_tokens of the run file when not given, 16384."""
