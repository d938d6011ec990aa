"""The command line: `kdpipe COMMAND ...`, one module a command, imported when that command runs.

Invariant: `--help`, `--version` and the commands that only read records load no torch. Whatever goes wrong that a
person can answer is one line on stderr and the exit code of its error; a traceback is a bug of ours and goes to a file.
"""

import errno
import importlib
import os
import signal
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NoReturn

import click

from kdpipe.manifests.bus_errors import explain_bus_errors
from kdpipe.manifests.cores import settle_threads
from kdpipe.manifests.errors import ConfigError, InternalError, SpaceError
from kdpipe.manifests.nearest import nearest
from kdpipe.manifests.specs import full_keys, misspelt_keys
from kdpipe.pipeline.endings import Terminated, ending
from kdpipe.pipeline.last_net import crash_of, kept
from kdpipe.pipeline.reads import READS, readers
from kdpipe.pipeline.streams import lasting_streams

# name -> what `kdpipe --help` says of it; the command is the object `command` in kdpipe.pipeline.commands.NAME.
COMMANDS = {
    "recipe": "Write a ready run file that does what another project's example does.",
    "plan": "Forecast a cache: samples, tokens, bytes, disk, and from how many students on it pays.",
    "extract": "Run a teacher once over the data and keep its hidden states in a cache.",
    "train": "Train a student from one or more caches.",
    "sweep": "Train all students of a run file, a run for each combination of values.",
    "submit": "Send what is left to do of a run file to a Slurm cluster.",
    "cancel": "Cancel the jobs that submit has sent for a run file.",
    "stream": "Train a student beside its teacher, its rows through shared memory.",
    "onpolicy": "Train a student on answers that it writes itself, scored by its teacher.",
    "generate": "Have a model write answers to prompts, as data for extract.",
    "eval": "Measure a student on the held-out rows of a cache.",
    "report": "Compare runs: a page with curves, table and cost; also CSV and PNG.",
    "status": "Show how the steps of a run, a sweep or a submission stand.",
    "cache": "Look at a cache or check every byte of it.",
}


class LazyGroup(click.Group):
    """A group whose commands are modules, named in COMMANDS and imported on use."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        return importlib.import_module(f"kdpipe.pipeline.commands.{cmd_name}").command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if name not in COMMANDS and not name.startswith("-"):
            ctx.fail(f"no such command '{name}'{nearest(name, COMMANDS)}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        # The stock method imports every command for its first line of help.
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


def _version() -> str:
    try:
        return version("kdpipe")
    except PackageNotFoundError:
        return "unknown (not installed)"


def _print_version(ctx: click.Context, _param: click.Parameter, wanted: bool) -> None:
    if wanted:
        click.echo(f"kdpipe {_version()}")
        ctx.exit()


@click.group(
    cls=LazyGroup,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "show_default": True, "max_content_width": 100},
)
@click.option(
    "--version", is_flag=True, is_eager=True, expose_value=False, callback=_print_version, help="Print the version."
)
@click.pass_context
def kdpipe(ctx: click.Context) -> None:
    """Distil one teacher into many students: one teacher pass, cached, for any number of students.

    \b
    kdpipe plan    --teacher T --data D.jsonl
    kdpipe extract --teacher T --data D.jsonl --cache C
    kdpipe train   --student S --cache C --output O
    kdpipe eval    --student O --cache C
    kdpipe report  O... --out report.html

    Exit codes: 0 ok, 1 failed check, 2 incomplete, 3 drift, 4 usage or bad input, 70 a fault of kdpipe, 75 temporary,
    130 interrupted.
    """
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


def guard(run: Callable[[], object]) -> int:
    """The exit code of `run`: its error, if it raised one a person can answer, is one line on stderr."""
    try:
        run()
    except click.exceptions.Exit as done:
        return done.exit_code
    except SystemExit:
        raise
    except BaseException as err:  # the last net: a panic in a library's Rust code is none of Exception
        end = ending(KeyboardInterrupt() if isinstance(err, click.Abort) else err)
        unforeseen = end.exit_code == InternalError.exit_code and not isinstance(err, InternalError)
        _say(str(kept(crash_of(err))) if unforeseen else end.error)
        return end.exit_code
    return 0


def _say(text: str) -> None:
    # A rank that was ended in the middle of its progress line has left the cursor there.
    print(f"\r\x1b[K{text}" if sys.stderr.isatty() else text, file=sys.stderr)


def _on_signals(handler: Callable[[int, Any], object]) -> None:
    """Have the signals that ask a command to stop handled; one that is ignored stays so."""
    for number in (signal.SIGTERM, signal.SIGUSR2, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handler)


def _terminate(number: int, frame: object) -> NoReturn:
    raise Terminated(signal.Signals(number).name)


def _invoke(args: list[str]) -> None:
    # Slurm sends the first or the second before it kills, a closed terminal the last; nohup has it ignored.
    _on_signals(_terminate)
    # Not kdpipe.main(): it prints usage over several lines, exits with 2 and swallows KeyboardInterrupt.
    try:
        with kdpipe.make_context("kdpipe", args, obj=("kdpipe", *args)) as ctx:
            kdpipe.invoke(ctx)
    except click.NoSuchOption as err:
        place = err.ctx.command_path if err.ctx else "kdpipe"
        raise ConfigError(f"{_unknown_option(err, args)}; see: {place} --help", where=place) from None
    except click.UsageError as err:
        place = err.ctx.command_path if err.ctx else "kdpipe"
        message = err.format_message().rstrip(".")
        raise ConfigError(f"{message}; see: {place} --help", where=place) from None
    except click.ClickException as err:
        raise ConfigError(err.format_message()) from None


def _unknown_option(err: click.NoSuchOption, args: list[str]) -> str:
    """What is said of an option that is not there: which key of the run file it is, else the nearest option."""
    word = err.option_name.lstrip("-").replace("-", "_")
    meant = [name for name in err.possibilities or () if name != "--help"]  # click's cutoff lets it through
    command = err.ctx.command.name if err.ctx is not None else None
    reads = READS.get(command or "")
    keys = (full_keys(word) or ([] if meant else misspelt_keys(word))) if reads is not None else []
    read = [key for key in keys if reads is not None and reads.includes(key)]
    if not read:
        near = f"; did you mean '{meant[0]}'?" if meant else ""
        other = f": it is a key of the run file for {readers(keys[0])}" if keys else near
        return f"no option '{err.option_name}'{other}"
    after = " ".join(args).partition(err.option_name)[2][1:].split()
    value = after[0] if after and not after[0].startswith("--") else "VALUE"
    return f"no option '{err.option_name}': it is a key of the run file, use --set {read[0]}={value}"


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line and exit."""
    # transformers draws bars beside ours, and tells over many lines what our errors say in one.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    settle_threads(os.environ)
    os.umask(os.umask(0o777) | 0o077)  # prompts and answers can be told from what is written: for its owner alone
    explain_bus_errors(lambda err: _say(str(err)))
    with lasting_streams() as lost:
        code = guard(lambda: _invoke(list(sys.argv[1:] if args is None else args)))
        _on_signals(lambda number, frame: None)  # what a launcher passes on when all is said changes nothing
        sys.stdout.flush()
        if (err := lost("stdout")) is not None and err.errno != errno.EPIPE:  # a reader (head, less) may leave
            what = "the result could not be written" if code == 0 else "what was printed could not all be written"
            reason = os.strerror(err.errno or 0).lower()
            full = SpaceError(
                f"{what}: {reason}; the work is done, free some room and ask for it again", where="stdout"
            )
            _say(str(full))
            code = code or full.exit_code
    sys.exit(code)


if __name__ == "__main__":
    main()
