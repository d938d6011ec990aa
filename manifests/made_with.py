"""Made with: the command that made a cache or a student, so that it can be run again a week later.

Invariant: a hint for people. It is no part of a plan, a fingerprint or any comparison, and holds the user's own
arguments and the places they named, nothing of the data. A cache has it in the "run" events of runs/, a student in its
kdpipe.json.
"""

import json
import os
import re
import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from pydantic import ValidationError

from kdpipe.manifests.durable import open_regular
from kdpipe.manifests.errors import LayoutError
from kdpipe.manifests.record import Record

RUNS = "runs"
LOG_NAME = re.compile(r"\d{8}T\d{6}Z-\d+\.jsonl")
"""Logs of extractions; their names sort by time."""
MAKERS = ("extract", "cache derive", "cache convert")
"""Commands that make shards, and make them again where they are missing."""
MAX_EVENT_BYTES = 1 << 20
MAX_LOGS = 32
"""The newest ones that are looked at."""


class MadeWith(Record):
    """A command as it was typed, and where."""

    argv: tuple[str, ...]
    folder: str
    """The working folder."""
    paths: dict[str, tuple[str, ...]]
    """What the arguments named, resolved: {"teacher": ["/models/large"], "data": [...]}."""

    def command(self, *, cache: Path | None = None) -> str:
        """The command for a shell in the working folder of now; cache: where the cache lies by now."""
        argv, before = list(self.argv), self.paths.get("cache", ("",))
        if cache is not None and before != (str(cache.absolute()),):
            moved = str(cache.absolute())
            if {"derive", "convert"} & set(argv[:3]):  # there the cache has no option
                argv = [
                    moved if os.path.abspath(os.path.join(self.folder, word)) == before[0] else word for word in argv
                ]
            else:
                argv = [*_without("--cache", argv), "--cache", moved]
        text = shlex.join(_without("--part", argv))  # one writer's share would not finish it
        return text if self.folder == os.getcwd() else f"cd {shlex.quote(self.folder)} && {text}"


def made_with(argv: tuple[str, ...], **named: Path | tuple[Path, ...] | None) -> MadeWith:
    """The command line of this process and what it names, by option."""
    paths = {
        name: tuple(str(path.absolute()) for path in ((given,) if isinstance(given, Path) else given))
        for name, given in named.items()
        if given is not None
    }
    return MadeWith(argv=argv, folder=os.getcwd(), paths=paths)


def last_extraction(cache: Path) -> MadeWith | None:
    """The command of the last extraction into a cache; None where it is not known."""
    return next(_extractions(cache), None)


def extract_again(cache: Path) -> str:
    """What to do where a cache lacks something: the command that made it, where that is known."""
    made = last_extraction(cache)
    return "run the same kdpipe extract again" if made is None else f"run again: {made.command(cache=cache)}"


def repair(cache: Path) -> str:
    """What to do where a part of a cache is damaged that an extraction can make again."""
    return f"put it aside with: kdpipe cache repair {shlex.quote(str(cache))} ; then {extract_again(cache)}"


@contextmanager
def repairable(cache: Path) -> Iterator[None]:
    """Of a file that an extraction can make again: what lies in its place and is none is told with the way out."""
    try:
        yield
    except LayoutError as err:
        raise LayoutError(err.fact, where=err.where, hint=repair(cache)) from None


def _extractions(cache: Path) -> Iterator[MadeWith]:
    """The commands in a cache's logs, the last one first."""
    try:
        names = sorted(filter(LOG_NAME.fullmatch, os.listdir(cache / RUNS)), reverse=True)
    except OSError:
        return
    for name in names[:MAX_LOGS]:
        try:
            with open(open_regular(cache / RUNS / name), "rb") as file:
                event = json.loads(file.readline(MAX_EVENT_BYTES))
            if isinstance(event, Mapping) and event.get("command") in MAKERS:
                yield MadeWith.model_validate(event.get("made_with"))
        except (OSError, ValueError, ValidationError, LayoutError):
            continue  # torn, of an older version, or not ours


def _without(option: str, argv: list[str]) -> list[str]:
    """Arguments without an option that takes one value."""
    kept = [word for word in argv if not word.startswith(f"{option}=")]
    return [word for at, word in enumerate(kept) if option not in (word, kept[at - 1] if at else "")]
