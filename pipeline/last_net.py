"""The last net: an exception that nobody answered becomes a file with its traceback, and one line that names the file.

Invariant: no traceback is printed. The file is for its owner alone: data may stand in an exception's text.
"""

import contextlib
import os
import shlex
import sys
import tempfile
import traceback
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from kdpipe.manifests.errors import InternalError

ROOT = Path(__file__).parent.parent
ROOMS = ("manifests", "stages", "pipeline")
LIBRARIES = ("kdpipe", "torch", "transformers", "tokenizers", "safetensors", "pyarrow", "numpy", "sglang")
SUMMARY_LENGTH = 200
"""Characters of an exception's own words on the terminal."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Crash:
    """An exception as text: `summary` for the terminal, `report` for the file."""

    summary: str
    report: str


def crash_of(err: BaseException) -> Crash:
    """What is to be said of an exception."""
    text = "".join(traceback.format_exception_only(err)).encode("utf-8", "backslashreplace").decode()
    words = " ".join(text.split())[:SUMMARY_LENGTH]
    places = [place for frame in traceback.extract_tb(err.__traceback__) if (place := _place(frame))]
    at = f" at {places[-1]}" if places else ""
    made_of = [f"python {sys.version.split()[0]}", *(f"{name} {_version(name)}" for name in LIBRARIES)]
    head = f"{shlex.join(sys.argv)}\n{', '.join(made_of)}\n\n"
    return Crash(summary=words + at, report=head + "".join(traceback.format_exception(err)))


def _place(frame: traceback.FrameSummary) -> str:
    """pipeline/cli.py:17 of kdpipe's own code, "" of any other."""
    path = Path(frame.filename)
    ours = any(path.is_relative_to(ROOT / room) for room in ROOMS)
    return f"{path.relative_to(ROOT)}:{frame.lineno}" if ours else ""


def kept(crash: Crash) -> InternalError:
    """Write the report into a file of its own; the error that names it, or says why there is none."""
    try:
        where = f"the traceback is in {_write(crash.report)}, please report it"
    except (OSError, MemoryError) as lost:
        reason = os.strerror(lost.errno or 0).lower() if isinstance(lost, OSError) else "no memory left"
        where = f"the traceback could not be written ({reason})"
    return InternalError(
        f"{crash.summary}: a fault of kdpipe, not of your input; {where}; "
        "finished shards and checkpoints are kept, the same command goes on from them"
    )


def _write(text: str) -> str:
    descriptor, path = tempfile.mkstemp(prefix="kdpipe-crash-", suffix=".txt")  # mode 0600
    try:
        with open(descriptor, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(path)
        raise
    return path


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "-"
