"""Members: the runs of a sweep, each a name, the keys in which it differs, and the whole run file that it comes to.

    run file with [sweep] -> members_of -> Member(name "lr-0.0003_seed-1", overrides, run), ...

Invariant: every member is valid before any of them runs; no two have one name, and no two are the same run. Pure but
for links in paths: one run file always gives the same members in the same order, the last key of the grid fastest.
"""

import itertools
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import JsonValue

from kdpipe.manifests.durable import canonical
from kdpipe.manifests.errors import ConfigError
from kdpipe.manifests.specs.run import RunFile, fields, override, with_keys
from kdpipe.manifests.specs.sweep import NAME

MOST_RUNS = 10_000
LONGEST_NAME = 200
"""A name is a folder's, which has 255 bytes at most."""
UNSAFE = re.compile(r"[^A-Za-z0-9._+-]+")
FILES = ("report.html", "events.jsonl", "kdpipe.json", "log.txt", "prepare.jsonl", "answers.jsonl")
TAKEN = (*FILES, "submit", "checkpoints", "teachers", "tensorboard", "wandb", "aligned")
"""What else lies in the output of a sweep or of a run, by which a folder is known for one."""
BASE = "base"
"""Name of a run that differs in nothing from the run file."""

Keys = dict[str, JsonValue]


@dataclass(frozen=True, kw_only=True, slots=True)
class Member:
    """One run of a sweep.

    overrides: the keys in which it differs from the run file: {"train.lr": 0.0003}
    run: the run file with them, train.output its own folder, without [sweep]
    """

    name: str
    overrides: Keys
    run: RunFile

    @property
    def output(self) -> Path:
        """The folder its student is written to."""
        assert self.run.train.output is not None, "members_of has put it there"
        return self.run.train.output


def members_of(run: RunFile) -> tuple[Member, ...]:
    """The runs that a run file describes; without a grid or a list of runs the one that it is, in its own output.

    Raises ConfigError naming the run and the key that is wrong in it.
    """
    output = sweep_output(run)
    if not run.sweep.grid and not run.sweep.runs:
        return (_member(run, safe(output.absolute().name), {}, output),)
    named = _named(run)
    members = tuple(_member(run, name, keys, output / name) for name, keys in named)
    if same := same_run(members):
        raise ConfigError(f"runs {same[0].name} and {same[1].name} are the same; keep one", where="sweep")
    for name, times in Counter(member.name for member in members).items():
        if times > 1:
            raise ConfigError(f"two runs are named '{name}'; name them apart in sweep.runs", where="sweep")
    return members


def sweep_output(run: RunFile) -> Path:
    """The folder that all of a sweep's runs write to. Raises ConfigError where the run file names none."""
    output = run.sweep.output or run.train.output
    if output is None:
        raise ConfigError("no folder is named for the students: give it, or train.output", where="sweep.output")
    return output


def safe(text: str) -> str:
    """A text as a part of a file's name: "a b/c" -> "a-b-c"."""
    return UNSAFE.sub("-", text).strip("-").lstrip(".") or "none"


def _named(run: RunFile) -> list[tuple[str, Keys]]:
    """(name, keys) of each run: those of the list, each with every combination of the grid."""
    grid, listed = run.sweep.grid, run.sweep.runs or ({},)
    size = len(listed) * math.prod(map(len, grid.values()))
    if size > MOST_RUNS:
        raise ConfigError(f"{size:,} runs; {MOST_RUNS:,} are the most of one sweep", where="sweep")
    for key, values in grid.items():
        contents = list(map(canonical, values))
        for content, times in Counter(contents).items():
            if times > 1:
                again = override(key, values[contents.index(content)])
                raise ConfigError(f"the value {again} is given twice; leave one out", where="sweep.grid")
    for entry in listed:
        for key, other in itertools.product(entry.keys() - {NAME}, grid):
            if f"{key}.".startswith(f"{other}.") or f"{other}.".startswith(f"{key}."):
                raise ConfigError(
                    f"'{key}' varies in sweep.grid ('{other}') and in sweep.runs; keep one", where="sweep"
                )
    unnamed = [key for entry in listed if NAME not in entry for key in entry]
    label = _labels([*grid, *unnamed])
    texts = {key: _texts(key, values) for key, values in grid.items()}
    found = []
    for entry in listed:
        own = {key: value for key, value in entry.items() if key != NAME}
        first = str(entry[NAME]) if NAME in entry else _joined((label[key], _text(key, own[key])) for key in own)
        for places in itertools.product(*(range(len(values)) for values in grid.values())):
            at = dict(zip(grid, places, strict=True))
            rest = _joined((label[key], texts[key][place]) for key, place in at.items())
            name = "_".join(filter(None, (first, rest))) or BASE
            _require_name(name)
            found.append((name, own | {key: grid[key][place] for key, place in at.items()}))
    return found


def _member(run: RunFile, name: str, keys: Keys, output: Path) -> Member:
    where = f"run {name}"
    for key in keys:
        if key.partition(".")[0] == "sweep" or key == "train.output":
            raise ConfigError(f"'{key}' cannot vary: it is the whole sweep's", where=where)
    own = with_keys(run, {**keys, "train.output": str(output)}, where=where, without="sweep")
    return Member(name=name, overrides=keys, run=own)


def _joined(parts: Iterable[tuple[str, str]]) -> str:
    return "_".join(f"{label}-{text}" for label, text in parts)


def _labels(keys: Sequence[str]) -> dict[str, str]:
    """What each key is called in a name: its last part, or its table for a path; whole where two would be called so.

    train.lr -> lr, student.path -> student, loss.temperature beside live.temperature -> loss.temperature
    """
    short = {}
    for key in dict.fromkeys(keys):
        above, _, leaf = key.rpartition(".")
        short[key] = above if leaf in ("path", "paths") else leaf
    times = Counter(short.values())
    return {key: safe(label if times[label] == 1 else key) for key, label in short.items()}


def _texts(key: str, values: Sequence[JsonValue]) -> list[str]:
    """What each of a key's values is called in a name: a path by its last part where no other ends so."""
    texts = [_text(key, value) for value in values]
    return texts if len(set(texts)) == len(texts) else [safe(_plain(value)) for value in values]


def _text(key: str, value: JsonValue) -> str:
    is_path = key in fields() and "Path" in str(fields()[key].annotation)
    return safe(_plain(value, of_text=(lambda text: Path(text).name) if is_path else str))


def _plain(value: JsonValue, of_text: Callable[[str], str] = str) -> str:
    """0.0003 -> "0.0003", true -> "true", [0.9, 0.95] -> "0.9+0.95", {"k": 64} -> "k-64"."""
    if isinstance(value, Mapping):
        return "+".join(f"{key}-{_plain(entry, of_text)}" for key, entry in value.items())
    if isinstance(value, list | tuple):
        return "+".join(_plain(entry, of_text) for entry in value)
    if isinstance(value, bool):
        return str(value).lower()
    return of_text(value) if isinstance(value, str) else str(value)


def _require_name(name: str) -> None:
    if name in TAKEN:
        raise ConfigError(f"'{name}' cannot be a run's name: kdpipe's own files in an output have it", where="sweep")
    if safe(name) != name:
        expected = "letters, digits and . _ + -, not a dot or a dash first"
        raise ConfigError(f"'{name}' cannot be a run's name: {expected}", where="sweep")
    if len(name) > LONGEST_NAME:
        raise ConfigError(
            f"the name of a run is {len(name)} characters long, {name[:40]}...; name the runs in sweep.runs",
            where="sweep",
        )


def same_run(members: Sequence[Member], *, but: str = "sweep") -> tuple[Member, Member] | None:
    """The first two that would train one student twice: a value may be written in two ways (1 and 1.0, s and x/../s).

    but: a table that makes no other run
    """
    real = cache(os.path.realpath)
    seen: dict[bytes, Member] = {}
    for member in members:
        content = canonical(_with_paths(member.run.model_dump(exclude={"train": {"output"}, but: True}), real))
        if (other := seen.setdefault(content, member)) is not member:
            return other, member
    return None


def _with_paths(value: Any, real: Callable[[Path], str]) -> Any:
    """A dump as JSON holds it, each path as the disk has it."""
    if isinstance(value, Mapping):
        return {key: _with_paths(entry, real) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_with_paths(entry, real) for entry in value]
    return real(value) if isinstance(value, Path) else value
