"""kdpipe report: runs and what they cost, as a page, a table or a picture."""

import importlib.util
import os
from collections.abc import Mapping
from pathlib import Path

import click

from kdpipe.manifests.durable import disk_error
from kdpipe.manifests.errors import ConfigError
from kdpipe.pipeline.options import PATH, Command, json_option
from kdpipe.pipeline.output import show
from kdpipe.pipeline.report.formats import csv_of, json_of, png_of
from kdpipe.pipeline.report.gather import gather
from kdpipe.pipeline.report.page import page

PAGE = Path("report.html")


@click.command("report", cls=Command)
@click.argument("runs", nargs=-1, required=True, type=PATH, metavar="RUN...")
@click.option("--out", type=PATH, metavar="FILE", help="The page.  [default: report.html, unless another is asked for]")
@click.option("--csv", "csv_file", type=PATH, metavar="FILE", help="A table of it: a row a run.")
@click.option("--png", "png_file", type=PATH, metavar="FILE", help="A picture: the sweep and the curves.")
@json_option
def command(
    runs: tuple[Path, ...], out: Path | None, csv_file: Path | None, png_file: Path | None, as_json: bool
) -> None:
    """Compare runs: which student is best, what varied, how it went, what teacher and students cost, how to repeat it.

    RUN is the output of a run, or a folder of such outputs (a sweep's); runs at work and failed ones are shown as they
    stand. The page is one file that needs no network. Page and picture need: pip install 'kdpipe[report]'; --csv and
    --json do not.

    \b
    kdpipe report runs/a runs/b --out report.html
    kdpipe report sweeps/lr --csv lr.csv --png lr.png
    """
    if out is None and csv_file is None and png_file is None and not as_json:
        out = PAGE
    _require_apart({"--out": out, "--csv": csv_file, "--png": png_file})
    if (drawn := out or png_file) is not None:
        _require_drawing(drawn)
    report = gather(runs)
    written: dict[str, object] = {}
    for name, file, make in (
        ("page", out, lambda: page(report, out=out or PAGE).encode("utf-8", "backslashreplace")),
        ("csv", csv_file, lambda: csv_of(report).encode("utf-8", "backslashreplace")),
        ("png", png_file, lambda: png_of(report)),
    ):
        if file is not None:
            _write(file, make())
            written[name] = file
    show(written | json_of(report) if as_json else written, as_json=as_json)


def _require_apart(files: Mapping[str, Path | None]) -> None:
    """Raises ConfigError where two options name one file."""
    named: dict[str, str] = {}
    for option, file in files.items():
        if file is not None and (other := named.setdefault(os.path.realpath(file), option)) != option:
            raise ConfigError(f"{other} and {option} name one file; give each its own", where=file)


def _require_drawing(file: Path) -> None:
    """Raises ConfigError where nothing here can draw."""
    if importlib.util.find_spec("vl_convert") is None:
        raise ConfigError(
            "it is drawn with vl-convert, which is not installed: pip install 'kdpipe[report]'; --csv and --json work "
            "without it",
            where=file,
        )


def _write(file: Path, data: bytes) -> None:
    """The whole file or what was there before."""
    scratch = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        file.absolute().parent.mkdir(parents=True, exist_ok=True)
        scratch.write_bytes(data)
        scratch.replace(file)
    except OSError as err:
        raise disk_error(err, file) from err
    finally:
        scratch.unlink(missing_ok=True)
