"""kdpipe recipe: run files that do what other projects' examples do, to be edited."""

from importlib.resources import files
from pathlib import Path

import click

from kdpipe.manifests.durable import disk_error
from kdpipe.manifests.errors import ConfigError
from kdpipe.manifests.nearest import nearest
from kdpipe.pipeline.options import PATH, Command


def recipes() -> dict[str, str]:
    """The text of each by its name, in the order of their names."""
    found = (files("kdpipe.pipeline") / "recipes").iterdir()
    named = {each.name.removesuffix(".toml"): each.read_text("utf-8") for each in found if each.name.endswith(".toml")}
    return dict(sorted(named.items()))


@click.command("recipe", cls=Command)
@click.argument("name", required=False)
@click.option("--out", type=PATH, metavar="FILE", help="File to write, run.toml for example; one that exists is kept.")
def command(name: str | None, out: Path | None) -> None:
    """Write a ready run file that does what another project's example does, or list them.

    Each key says beside it what it is called there. Edit the paths, then run the commands at its top.

    \b
    kdpipe recipe
    kdpipe recipe torchtune-kd-lora --out run.toml
    """
    known = recipes()
    if name is None:
        if out is not None:
            raise ConfigError("name the recipe that is to be written: kdpipe recipe NAME --out FILE", where="--out")
        for each, text in known.items():
            click.echo(f"{each:23}{text.splitlines()[0].removeprefix('# ')}")
        return
    if name not in known:
        raise ConfigError(f"no such recipe, known: {', '.join(known)}{nearest(name, known)}", where=name)
    if out is None:
        click.echo(known[name], nl=False)
        return
    try:
        with open(out, "x", encoding="utf-8") as file:
            file.write(known[name])
    except FileExistsError:
        raise ConfigError("it exists already, and may have been edited; give another name", where=out) from None
    except OSError as err:
        raise disk_error(err, out) from err
    click.echo(f"{out} written; edit its paths, then run the commands at its top", err=True)
