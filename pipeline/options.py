"""Options: made from the run file's fields, so that their names, choices, defaults and help are written once.

A command of the class RunCommand has the options of the keys that it reads (`reads`), --config and --set, and is given
the whole as `run`.
"""

import grp
import math
import os
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import click

from kdpipe.manifests.errors import ConfigError
from kdpipe.manifests.made_with import MadeWith, made_with
from kdpipe.manifests.specs import RunFile, fields, flag_of, load
from kdpipe.pipeline.reads import READS, readers

PATH = click.Path(path_type=Path)


class Command(click.Command):
    """A command of kdpipe: an option that lacks its value is named, as click would take the next option for the value.

    Its repeatable options also take several values: `--data a b` is `--data a --data b`. Those of the run file's keys
    take a list as the file writes it, too (`_listed`).
    """

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        options = [param for param in self.get_params(ctx) if isinstance(param, click.Option)]
        known = {flag for option in options for flag in (*option.opts, *option.secondary_opts)}
        valued = {flag for option in options if not (option.is_flag or option.count) for flag in option.opts}
        for flag, following in zip_longest(args, args[1:]):
            if flag in valued and (following is None or following.partition("=")[0] in known):
                raise click.BadOptionUsage(flag, f"option '{flag}' lacks its value", ctx)
        many = {flag for option in options if option.multiple and not option.is_flag for flag in option.opts}
        return super().parse_args(ctx, spread(args, many))


def spread(args: list[str], flags: set[str]) -> list[str]:
    """Repeat each of `flags` before the values that follow it.

    [--data a b --json] -> [--data a --data b --json]
    """
    out: list[str] = []
    flag, has_value = None, True
    for arg in args:
        if arg.startswith("-"):
            name, equals, _ = arg.partition("=")
            flag, has_value = (name if name in flags else None), bool(equals)
            out.append(arg)
        else:
            out += [flag, arg] if flag and has_value else [arg]
            has_value = True
    return out


class KeyOption(click.Option):
    """The option of a key of the run file; the key is its name, so that no two tables' keys are mixed up.

    Its value stays a text: what the key takes is said once, in its spec, which reads and refuses it.
    """

    def __init__(self, key: str, name: str | None = None) -> None:
        entry, flag = fields()[key], flag_of(key)
        kinds = [kind for kind in _alternatives(entry.annotation) if kind is not type(None)]
        choices = [str(choice) for kind in kinds if get_origin(kind) is Literal for choice in get_args(kind)]
        name, shown = name or str(flag.name), entry.get_default(call_default_factory=True)
        default = f"  [default: {shown}]" if isinstance(shown, str | int | float) and kinds != [bool] else ""
        super().__init__(
            [f"{name}/--no-{name[2:]}" if kinds == [bool] else name],
            type=NameValue() if get_origin(kinds[0]) is dict else None if kinds == [bool] else str,
            multiple=get_origin(kinds[0]) in (tuple, dict),
            default=None,
            metavar=flag.takes or (f"[{'|'.join(choices)}]" if choices else TAKES.get(kinds[0])),
            help=" ".join((entry.description or "").split()) + default,
        )
        self.name = key


TAKES = {int: "INTEGER", float: "NUMBER"}
"""What stands in --help for a value, where the field's flag does not say it."""


def _alternatives(annotation: Any) -> tuple[Any, ...]:
    """str | None -> (str, NoneType); list[int] -> (list[int],)"""
    kinds = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    return tuple(get_args(kind)[0] if get_origin(kind) is Annotated else kind for kind in kinds)


class RunCommand(Command):
    """A command that reads the run file, as READS says under its name; its function is given `run`, a RunFile.

    within: name of the group that it is a command of
    """

    def __init__(self, name: str, *, params: Sequence[click.Parameter] = (), within: str = "", **rest: Any) -> None:
        self.title = f"{within} {name}".lstrip()
        self.reads = READS[self.title]
        super().__init__(
            name,
            params=[*(KeyOption(key, self.reads.flag(key)) for key in self.reads.of_options()), *params, CONFIG, SETS],
            **rest,
        )

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        left = super().parse_args(ctx, args)
        if not ctx.resilient_parsing:
            given = dict(_given({key: ctx.params.pop(key) for key in self.reads.of_options()}))
            config, sets = self._config(ctx), ctx.params.pop("sets")
            ctx.meta[TYPED] = Typed(config=config, sets=sets, keys=(*given, *map(key_of, sets)))
            ctx.params["run"] = self._read(ctx, config, sets, given)
        return left

    def _config(self, ctx: click.Context) -> Path | None:
        """The run file, which a command may take as an argument too. Raises UsageError for two."""
        named, config = ctx.params.pop("run_file", None), ctx.params.pop("config")
        if named is not None and config is not None:
            raise click.UsageError(f"two run files: {named} and --config {config}; name one", ctx)
        return named or config

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The options, those of a section after the others."""
        rows: dict[str, list[tuple[str, str]]] = {"Options": []}
        for param in self.get_params(ctx):
            table, _, leaf = str(param.name).partition(".")
            title = self.reads.sections.get(table, "Options") if leaf != "paths" else "Options"
            if isinstance(param, click.Option) and (record := param.get_help_record(ctx)) is not None:
                rows.setdefault(title, []).append(record)
        for title, records in rows.items():
            with formatter.section(title):
                formatter.write_dl(records)

    def _read(self, ctx: click.Context, config: Path | None, sets: tuple[str, ...], given: dict[str, Any]) -> RunFile:
        """Raises ConfigError, also for a key of --set that this command does not read; UsageError for one it needs."""
        run = load(config, sets, given)
        for key in map(key_of, sets):
            if not self.reads.includes(key):
                leaf = str(flag_of(key).name) if key in fields() else f"--{key}"
                own = any(leaf in param.opts for param in self.params)
                way = f"give {leaf} instead" if own else f"leave it out; it is for {readers(key)}"
                raise ConfigError(f"{self.title} does not read '{key}'; {way}", where="--set")
        for key in self.reads.needs:
            table, _, leaf = key.partition(".")
            if not getattr(getattr(run, table), leaf):
                raise click.UsageError(f"option '{self.reads.flag(key)}' is missing, or {key} of a run file", ctx)
        return run


def key_of(override: str) -> str:
    """The key of a --set."""
    return override.partition("=")[0].strip()


def _given(values: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """The options that were given, as keys; NAME=VALUE is a key in the table of its option."""
    for key, value in values.items():
        if value is None or value == ():
            continue
        if isinstance(value, tuple) and isinstance(value[0], tuple):
            yield from ((f"{key}.{name}", text) for name, text in value)
        elif isinstance(value, tuple):
            yield key, tuple(each for text in value for each in _listed(text))
        else:
            yield key, value


def _listed(text: str) -> list[Any]:
    """What is in a list as the run file writes it, else the text itself: '["a", "b"]' -> ["a", "b"]."""
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return [text]
    return value if isinstance(value, list) else [text]


TYPED = f"{__name__}.typed"


@dataclass(frozen=True, kw_only=True, slots=True)
class Typed:
    """What a command line says of the run file.

    config: where it is; sets: each --set as it is typed; keys: those given by an option or by --set
    """

    config: Path | None
    sets: tuple[str, ...]
    keys: tuple[str, ...]


def typed() -> Typed:
    """What this command line says of the run file."""
    return click.get_current_context().meta[TYPED]


class Part(click.ParamType):
    """`i/n` with 1 <= i <= n."""

    name = "i/n"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        index, slash, count = str(value).partition("/")
        if not (slash and index.isdecimal() and count.isdecimal() and 1 <= int(index) <= int(count)):
            self.fail(
                f"'{value}' is not i/n with 1 <= i <= n: the first of four parts is 1/4, the last 4/4", param, ctx
            )
        return int(index), int(count)


class Finite(click.FloatRange):
    """A number in a range; `nan` and `inf`, which compare as nobody expects, are in none."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        try:
            float(value)
        except ValueError:
            self.fail(f"'{value}' is not a number", param, ctx)
        number = float(super().convert(value, param, ctx))
        if not math.isfinite(number):
            self.fail(f"'{value}' is not a number", param, ctx)
        return number


class NameValue(click.ParamType):
    """`NAME=VALUE`; a dash in the name is an underscore."""

    name = "NAME=VALUE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, str]:
        if isinstance(value, tuple):
            return value
        name, equals, text = str(value).partition("=")
        if not (name and equals):
            self.fail(f"'{value}' is not NAME=VALUE", param, ctx)
        return name.replace("-", "_"), text


GROUP_READS = 0o2050
"""Of a folder's mode, where it was made for a group: what is made in it is the group's too."""


def group_for(name: str | None, folder: Path) -> int | None:
    """The number of the group asked for; else of the one that a folder was made for, which is to read what is added.

    From then on what this process writes can be read by its folder's group. Raises ConfigError.
    """
    number = None
    if name is not None:
        try:
            number = grp.getgrnam(name).gr_gid
        except KeyError:
            raise ConfigError(f"there is no group '{name}' on this machine", where="--group") from None
    elif folder.is_dir() and folder.stat().st_mode & GROUP_READS == GROUP_READS:
        number = folder.stat().st_gid
    if number is not None:
        os.umask(os.umask(0o777) & ~0o050)
    return number


def only(caches: tuple[Path, ...]) -> Path:
    """The cache, for a command that takes one. Raises ConfigError."""
    if len(caches) > 1:
        raise ConfigError(
            f"one is taken here, {len(caches)} were named: {', '.join(map(str, caches))}", where="--cache"
        )
    return caches[0]


def require_not_swapped(student: Path, caches: tuple[Path, ...]) -> None:
    """A cache given as the student, and a model as a cache, are one mistake. Raises ConfigError."""
    from kdpipe.manifests.plan import PLAN_FILE  # pyarrow takes a moment: not for --help

    if (student / PLAN_FILE).exists() and not all((cache / PLAN_FILE).exists() for cache in caches):
        raise ConfigError(f"{student} is a cache, the student is another folder: are they swapped?", where="--student")


def this_command(**named: Path | tuple[Path, ...] | None) -> MadeWith:
    """The command line as it was typed, and what it names, by option."""
    return made_with(click.get_current_context().find_root().obj or (), **named)


resume_option = click.option(
    "--resume",
    default="auto",
    metavar="auto|never|PATH",
    help="What an interrupted run does: go on from the newest good checkpoint in OUTPUT, start again, or go on from "
    "the checkpoint at PATH.",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout instead of a list.")
cache_argument = click.argument("cache", type=PATH, metavar="CACHE")
CONFIG = click.Option(
    ["--config"], type=PATH, metavar="FILE", help="Run file (TOML), the same for all commands: docs/run-file.md."
)
run_file_argument = click.argument("run_file", required=False, type=PATH, metavar="RUN.toml")
SETS = click.Option(
    ["--set", "sets"],
    multiple=True,
    metavar="TABLE.KEY=VALUE",
    help="Override a key of the run file; repeatable. Options win over it.",
)
