"""Options shared by several commands, the class of their commands, and what of the run file each of them reads."""

import grp
import json
import math
import os
import string
from collections.abc import Callable
from itertools import zip_longest
from pathlib import Path
from typing import Any

import click

from kdpipe.manifests.errors import ConfigError
from kdpipe.manifests.made_with import MadeWith, made_with
from kdpipe.manifests.nearest import nearest
from kdpipe.manifests.provenance import SHORTEST_DIGEST
from kdpipe.manifests.specs import DataSpec, RunSpec, load

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]
PATH = click.Path(path_type=Path)
USUAL = DataSpec()
"""Its values are what holds where neither a flag nor a run file says otherwise."""


class Command(click.Command):
    """A command of kdpipe: an option that lacks its value is named, as click would take the next option for the value.

    Its repeatable options also take several values: `--data a b` is `--data a --data b`.
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


class OneOf(click.Choice[str]):
    """One of a few words; the error offers the one that was meant."""

    def get_invalid_choice_message(self, value: Any, ctx: click.Context | None) -> str:
        names = ", ".join(f"'{name}'" for name in self.choices)
        return f"'{value}' is not one of {names}{nearest(str(value), self.choices)}"


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


GROUP_READS = 0o2050
"""Of a folder's mode, where it was made for a group: what is made in it is the group's too."""


class UnixGroup(click.ParamType):
    """A group by name; its number. From then on what this process writes can be read by its folder's group."""

    name = "group"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        try:
            number = grp.getgrnam(str(value)).gr_gid
        except KeyError:
            self.fail(f"there is no group '{value}' on this machine", param, ctx)
        _open_to_group()
        return number


def kept_group(given: int | None, folder: Path) -> int | None:
    """The group asked for; else the one that a folder was made for, which is to read what is added there too."""
    if given is None and folder.is_dir() and folder.stat().st_mode & GROUP_READS == GROUP_READS:
        _open_to_group()
        return folder.stat().st_gid
    return given


def _open_to_group() -> None:
    os.umask(os.umask(0o777) & ~0o050)


class Finite(click.FloatRange):
    """A number in a range; `nan` and `inf`, which compare as nobody expects, are in none."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number = float(super().convert(value, param, ctx))
        if not math.isfinite(number):
            self.fail(f"'{value}' is not a number", param, ctx)
        return number


class CodeDigest(click.ParamType):
    """The sha256 of a model's own code in hexadecimal, or the start of it."""

    name = "DIGEST"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        text = str(value).lower()
        if not (SHORTEST_DIGEST <= len(text) <= 64 and set(text) <= set(string.hexdigits)):
            self.fail(
                f"'{value}' is not a digest of code: {SHORTEST_DIGEST} to 64 hexadecimal digits; without the option "
                "the error names the model's",
                param,
                ctx,
            )
        return text


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


def require_not_swapped(student: Path, caches: tuple[Path, ...]) -> None:
    """A cache given as the student, and a model as a cache, are one mistake. Raises ConfigError."""
    from kdpipe.manifests.plan import PLAN_FILE  # pyarrow takes a moment: not for --help

    if (student / PLAN_FILE).exists() and not all((cache / PLAN_FILE).exists() for cache in caches):
        raise ConfigError(f"{student} is a cache, the student is another folder: are they swapped?", where="--student")


def this_command(**named: Path | tuple[Path, ...] | None) -> MadeWith:
    """The command line as it was typed, and what it names, by option."""
    return made_with(click.get_current_context().find_root().obj or (), **named)


def stack(*decorators: Decorator) -> Decorator:
    """Several option decorators as one, in the order they show in --help."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return decorate


json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout instead of a list.")
run_options = stack(
    click.option("--config", type=PATH, help="Run file (TOML) with the tables [data], [loss], [train]."),
    click.option(
        "--set", "sets", multiple=True, metavar="TABLE.KEY=VALUE", help="Override a key of the run file; repeatable."
    ),
)
data_options = stack(
    click.option(
        "--teacher", type=PATH, required=True, metavar="FOLDER", help="Teacher in Hugging Face format, with tokenizer."
    ),
    click.option(
        "--data",
        type=PATH,
        multiple=True,
        required=True,
        metavar="FILE...",
        help="Data files or folders: jsonl, json, parquet, Arrow. Takes several values, and may be repeated.",
    ),
    click.option(
        "--max-length", type=click.IntRange(min=1), help=f"Longest sample in tokens.  [default: {USUAL.max_length}]"
    ),
    click.option(
        "--overlong",
        type=OneOf(["truncate", "drop"]),
        help=f"A longer sample loses its tail, or is left out.  [default: {USUAL.overlong}]",
    ),
    click.option(
        "--supervise",
        type=OneOf(["assistant", "last", "completion", "all"]),
        help="Which tokens students learn from: every assistant turn, the last one, the completion, or every "
        f"token.  [default: {USUAL.supervise}]",
    ),
    click.option(
        "--heldout-fraction",
        type=Finite(0, 1),
        help=f"Share of the samples kept for evaluation, chosen by content.  [default: {USUAL.heldout_fraction}]",
    ),
    click.option(
        "--bad-records",
        type=OneOf(["stop", "skip"]),
        help="A record that cannot be read ends the command, which shows the first ten, or is left out, counted and "
        f"listed in CACHE/runs/prepare.jsonl.  [default: {USUAL.bad_records}]",
    ),
    click.option(
        "--max-bad",
        type=Finite(0, 1),
        help=f"Share of the records that may be left out as bad.  [default: {USUAL.max_bad}]",
    ),
    click.option(
        "--strict/--no-strict",
        default=None,
        help="A sample whose text is not what its record says (the chat template dropped or changed something, nothing "
        "ends an answer) is an error, not a count.",
    ),
    click.option(
        "--rows",
        type=OneOf(["supervised", "all"]),
        default="supervised",
        help="Keep the rows of supervised tokens only, or of every token.",
    ),
    click.option(
        "--dtype",
        type=OneOf(["auto", "bfloat16", "float16", "float32"]),
        default="auto",
        help="Precision of the teacher and of the stored rows; auto is that of its checkpoint.",
    ),
)
engine_options = stack(
    click.option(
        "--engine",
        type=OneOf(["auto", "transformers", "sglang"]),
        default="auto",
        help="What runs the teacher; auto takes sglang on a GPU where version and architecture were tried, else "
        "transformers; it says why.",
    ),
    click.option("--tp", type=click.IntRange(min=1), default=1, help="sglang: GPUs that share each layer."),
    click.option("--dp", type=click.IntRange(min=1), default=1, help="sglang: copies of the teacher."),
    click.option("--pp", type=click.IntRange(min=1), default=1, help="sglang: pipeline stages."),
    click.option("--ep", type=click.IntRange(min=1), default=1, help="sglang: GPUs that share the experts."),
    click.option("--quantization", metavar="NAME", help="sglang: run the weights quantised, fp8 for example."),
    click.option(
        "--mem-fraction",
        type=Finite(0, 1, min_open=True, max_open=True),
        help="sglang: share of a GPU's memory for weights and KV cache.  [default: sglang's choice]",
    ),
    click.option(
        "--deterministic", is_flag=True, help="sglang: its deterministic mode, where the attention backend has one."
    ),
    click.option(
        "--engine-arg",
        "engine_args",
        type=NameValue(),
        multiple=True,
        help="sglang: any further field of its ServerArgs, chunked_prefill_size=8192 for example; repeatable.",
    ),
    click.option(
        "--engine-timeout",
        type=Finite(min=1),
        default=600,
        metavar="SECONDS",
        help="sglang: longest silence before it is given up.",
    ),
)
io_option = click.option(
    "--io",
    type=OneOf(["mmap", "pread"]),
    default="mmap",
    help="How the cache is read: mapped, or with pread, which suits network file systems.",
)
group_option = click.option(
    "--group",
    type=UnixGroup(),
    metavar="NAME",
    help="Unix group that may read what is written, and what is added there later; otherwise only you can (files "
    "0600, folders 0700).",
)
device_option = click.option(
    "--device",
    type=OneOf(["auto", "cpu", "cuda"]),
    default="auto",
    help="Where models run; auto takes GPUs where there are any.",
)


trust_option = click.option(
    "--trust-remote-code",
    "trust",
    type=CodeDigest(),
    help="Run the Python code that the model's folder brings (auto_map in its configs), if its sha256 is this one, or "
    "starts with it (12 digits or more). Without it such a model is refused and nothing of it runs; the message names "
    "the files to read and their digest. Code of another repository is never fetched.",
)


READ_KEYS = {
    "plan": ("data", "train.epochs", "train.dtype"),
    "extract": ("data",),
    "train": ("data.heldout_fraction", "data.max_length", "data.overlong", "data.supervise", "loss", "train"),
    "eval": ("data.heldout_fraction", "train.batch_tokens"),
}
"""Tables and keys of the run file that each command reads; a run file may hold the others, for other commands."""


def is_read(key: str, command: str) -> bool:
    """Whether a command reads a key of the run file, or some of a table."""
    return any(f"{key}.".startswith(f"{read}.") or read.startswith(f"{key}.") for read in READ_KEYS[command])


def readers(key: str) -> str:
    """The commands that read a key: "kdpipe train"."""
    return " or ".join(f"kdpipe {name}" for name in READ_KEYS if is_read(key, name))


def run_spec(config: Path | None, sets: tuple[str, ...], **data: object) -> RunSpec:
    """The run file with `--set` and then the command line's own [data] flags (those given) applied.

    Raises ConfigError, also for a key of `--set` that this command does not read.
    """
    flags = tuple(f"data.{key}={json.dumps(value)}" for key, value in data.items() if value is not None)
    run = load(config, sets + flags)
    command = click.get_current_context().command
    for key in (given.partition("=")[0].strip() for given in sets):
        if not is_read(key, command.name or ""):
            leaf = f"--{key.rpartition('.')[2].replace('_', '-')}"
            own = any(leaf in param.opts for param in command.params)
            way = f"give {leaf} instead" if own else f"leave it out; it is for {readers(key)}"
            raise ConfigError(f"{command.name} does not read '{key}'; {way}", where="--set")
    return run
