"""The run file: its tables joined, read from TOML, `--set` and options, with every error at the key that is wrong."""

import copy
import inspect
import itertools
import json
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from pydantic import JsonValue, PrivateAttr, ValidationError, model_validator
from pydantic.fields import FieldInfo

from kdpipe.manifests.errors import ConfigError
from kdpipe.manifests.nearest import OTHER_NAMES, near, nearest
from kdpipe.manifests.record import in_words
from kdpipe.manifests.specs.base import Flag, Spec
from kdpipe.manifests.specs.cache import CacheSpec
from kdpipe.manifests.specs.data import DataSpec, DataTable
from kdpipe.manifests.specs.live import LiveSpec
from kdpipe.manifests.specs.loss import LOSS_OPTIONS, LossSpec
from kdpipe.manifests.specs.slurm import SlurmSpec
from kdpipe.manifests.specs.student import EvalSpec, StudentSpec, StudentTable
from kdpipe.manifests.specs.sweep import SweepSpec
from kdpipe.manifests.specs.teacher import EngineSpec, TeacherSpec
from kdpipe.manifests.specs.train import TrainSpec, TrainTable

S = TypeVar("S", bound=Spec)
KINDS = ("bool", "int", "float", "str", "list", "dict")
"""What pydantic writes after the key of a value that may be of several."""


class RunSpec(Spec):
    """What of a run file decides how a student is trained."""

    data: DataSpec = DataSpec()
    student: StudentSpec = StudentSpec()
    loss: LossSpec = LossSpec()
    train: TrainSpec = TrainSpec()

    def without_teacher(self) -> "RunSpec":
        """The same with a loss that needs none, if its base is no teacher. Raises ConfigError for one that does."""
        if self.student.lora_teacher:
            return self
        return self.model_copy(update={"loss": self.loss.without_teacher()})


class RunFile(Spec):
    """A whole run file."""

    teacher: TeacherSpec = TeacherSpec()
    engine: EngineSpec = EngineSpec()
    data: DataTable = DataTable()
    cache: CacheSpec = CacheSpec()
    student: StudentTable = StudentTable()
    loss: LossSpec = LossSpec()
    train: TrainTable = TrainTable()
    eval: EvalSpec = EvalSpec()
    live: LiveSpec = LiveSpec()
    sweep: SweepSpec = SweepSpec()
    slurm: SlurmSpec = SlurmSpec()
    _given: dict[str, Any] = PrivateAttr(default_factory=dict)

    @model_validator(mode="wrap")
    @classmethod
    def _keep_given(cls, given: Any, read: Callable[[Any], "RunFile"]) -> "RunFile":
        """What was said, before presets and defaults, for `with_keys`."""
        run = read(given)
        if isinstance(given, dict):
            run._given = {
                table: keys.model_dump(exclude_unset=True) if isinstance(keys, Spec) else keys
                for table, keys in given.items()
            }
        return run

    def training(self) -> RunSpec:
        """The part that decides how a student is trained, without the places."""
        return RunSpec(
            data=_part(self.data, DataSpec),
            student=_part(self.student, StudentSpec),
            loss=self.loss,
            train=_part(self.train, TrainSpec),
        )

    def samples(self) -> DataSpec:
        """How data become samples, without the places."""
        return _part(self.data, DataSpec)


def _part(table: Spec, kind: type[S]) -> S:
    """The fields of a table's base; what was not given there is not given here."""
    return kind.model_construct(
        table.model_fields_set & kind.model_fields.keys(), **{name: getattr(table, name) for name in kind.model_fields}
    )


@cache
def fields() -> dict[str, FieldInfo]:
    """Every key of the run file, whole: "train.lr" -> its field, in the order of the tables."""

    def walk(kind: type[Spec], prefix: str) -> Iterator[tuple[str, FieldInfo]]:
        for name, entry in kind.model_fields.items():
            if inspect.isclass(entry.annotation) and issubclass(entry.annotation, Spec):
                yield from walk(entry.annotation, f"{prefix}{name}.")
            else:
                yield prefix + name, entry

    return dict(walk(RunFile, ""))


def flag_of(key: str) -> Flag:
    """How the option of a key looks, with its name; of a key inside a table such as engine.args, the table's."""
    if key not in fields():
        return flag_of(key.rpartition(".")[0])
    own = next((note for note in fields()[key].metadata if isinstance(note, Flag)), Flag())
    return Flag(own.name or f"--{key.rpartition('.')[2].replace('_', '-')}", own.takes)


def load(path: Path | None, overrides: tuple[str, ...] = (), options: Mapping[str, object] | None = None) -> RunFile:
    """The run file at `path` (TOML; None for all defaults), with `a.b=value` overrides applied in order, then options.

    options: values by their whole keys, {"data.max_length": "512"}; a text is read as what the key takes
    Raises ConfigError naming the file, the override or the option, the key and the nearest known key.
    """
    tree: dict[str, Any] = {}
    if path is not None:
        try:
            tree = tomllib.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ConfigError("there is no such run file", where=path) from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError, IsADirectoryError, PermissionError) as err:
            raise ConfigError(f"not a TOML file: {err}", where=path) from None
    for override in overrides:
        _apply(tree, override)
    for key, value in (options or {}).items():
        _put(tree, key, value, where=str(flag_of(key).name))
    try:
        return RunFile.model_validate(tree)
    except ValidationError as err:
        place = ".".join(str(part) for part in err.errors()[0]["loc"])
        given = next((key for key in options or () if _within(place, key)), None)
        if given is not None:
            raise ConfigError(_explain(err).removeprefix(f"'{given}' = "), where=str(flag_of(given).name)) from None
        keys = [override.partition("=")[0].strip() for override in overrides]
        overridden = any(_within(place, key) or _within(key, place) for key in keys)
        raise ConfigError(_explain(err), where="--set" if overridden else path) from None


def with_keys(run: RunFile, keys: Mapping[str, object], *, where: object, without: str = "") -> RunFile:
    """The run file with other keys, put in as `--set` does: {"train.lr": 0.001}.

    without: a table to leave out
    Raises ConfigError, at `where`, naming the key and the nearest known one.
    """
    tree = copy.deepcopy(run._given)
    tree.pop(without, None)
    for key, value in keys.items():
        _put(tree, key, value, where=where)
    try:
        return RunFile.model_validate(tree)
    except ValidationError as err:
        raise ConfigError(_explain(err), where=where) from None


def override(key: str, value: JsonValue) -> str:
    """What `--set` takes for a key's value: ("train.betas", [0.9, 0.95]) -> "train.betas=[0.9, 0.95]"."""
    if isinstance(value, str) and value == value.strip() and not _is_toml(value):
        return f"{key}={value}"
    return f"{key}={_toml(value)}"


def _is_toml(text: str) -> bool:
    try:
        tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return False
    return True


def _toml(value: JsonValue) -> str:
    """A value as TOML writes it."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_toml(str(key))} = {_toml(entry)}" for key, entry in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_toml, value)) + "]"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return repr(value).lower()


def _within(key: str, table: str) -> bool:
    return f"{key}.".startswith(f"{table}.")


def _apply(tree: dict[str, Any], override: str) -> None:
    """Put `a.b=value` into the tree; the value is read as TOML, and as a string where it is none."""
    key, equals, text = override.partition("=")
    if not equals or not all(part.strip() for part in key.split(".")):
        raise ConfigError(f"'{override}' is not of the form table.key=value", where="--set")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    _put(tree, key, value, where="--set")


def _put(tree: dict[str, Any], key: str, value: object, *, where: object) -> None:
    *tables, leaf = (part.strip() for part in key.split("."))
    for table in tables:
        tree = tree.setdefault(table, {})
        if not isinstance(tree, dict):
            raise ConfigError(f"'{key}': '{table}' is a value, not a table", where=where)
    tree[leaf] = value


def full_keys(word: str) -> list[str]:
    """The keys of the run file that a bare word may stand for, whole: "lr" -> ["train.lr"], "k" -> ["loss.options.k"].

    Exact words and their other names alone, not misspelt ones.
    """
    wanted = {word, *OTHER_NAMES.get(word, ())}
    return [key for key in _all_keys() if key.rpartition(".")[2] in wanted]


def misspelt_keys(word: str) -> list[str]:
    """As `full_keys`, for the key that is spelled most like the word."""
    names = near(word, [key.rpartition(".")[2] for key in _all_keys()])
    return full_keys(names[0]) if names else []


def _all_keys() -> list[str]:
    return [*fields(), *(f"loss.options.{name}" for name in LOSS_OPTIONS)]


def _explain(err: ValidationError) -> str:
    """The first of pydantic's findings as one line, with the nearest key or value for one that is unknown."""
    first = err.errors()[0]
    *tables, leaf = [str(part) for part in first["loc"]]
    key = ".".join([*tables, leaf])
    if first["type"] == "extra_forbidden":
        model: Any = RunFile
        for table in tables:
            model = model.model_fields[table].annotation
        known = sorted(model.model_fields)
        within = sorted(full_keys(leaf), key=lambda other: not _within(other, ".".join(tables)))
        meant = within or near(leaf, known) or misspelt_keys(leaf)
        hint = f"; did you mean '{meant[0]}'?" if meant else ""
        return f"unknown key '{key}'{hint} (known here: {', '.join(known)})"
    if first["type"] == "literal_error":
        choices = re.findall(r"'([^']*)'", first["ctx"]["expected"])
        return (
            f"'{key}' = {first['input']!r}: expected {first['ctx']['expected']}{nearest(str(first['input']), choices)}"
        )
    key = ".".join(itertools.takewhile(lambda part: part not in KINDS, [*tables, leaf]))
    return f"'{key}' = {first['input']!r}: {in_words(first)}"
