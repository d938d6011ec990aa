"""What README and docs say is true: links lead somewhere, commands and keys exist, the run-file page is current."""

import importlib
import re
import shlex
from pathlib import Path

import click
import pytest
from tools import house_doc, loss_doc, recipe_doc, run_file_doc, scale_doc

from kdpipe.manifests.specs import load
from kdpipe.pipeline import cli
from kdpipe.pipeline.options import Command
from kdpipe.stages.prepare import columns

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "manifests" / "FORMAT.md"]


def commands() -> list[str]:
    """Every kdpipe command in a code block of the README."""
    blocks = re.findall(r"^```\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line.startswith("kdpipe ")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
        assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_named_in_backticks_exist(page: Path) -> None:
    for name in re.findall(r"`((?:tests|tools|stages|pipeline|manifests|docs)/[\w/.*-]+)`", page.read_text()):
        assert list(ROOT.glob(name)), name


@pytest.mark.parametrize("line", commands())
def test_readme_commands_parse(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("run.toml").touch()
    name, *words = shlex.split(line)[1:]
    command: click.Command = importlib.import_module(f"kdpipe.pipeline.commands.{name}").command
    if isinstance(command, click.Group):
        assert words[0] in command.commands
        command, words = command.commands[words[0]], words[1:]
    context = command.make_context(name, list(words))
    if isinstance(command, Command) and "sets" in context.params:
        load(None, tuple(context.params["sets"]))


def test_readme_names_the_commands_there_are() -> None:
    assert {line.split()[1] for line in commands()} == set(cli.COMMANDS)


def test_run_file_page_is_made_from_the_specs() -> None:
    assert (ROOT / "docs" / "run-file.md").read_text() == run_file_doc.page()


def test_readme_has_a_line_for_every_module_and_the_page_of_the_house_is_its_tools() -> None:
    assert (ROOT / "docs" / "house.md").read_text() == house_doc.page()
    text = (ROOT / "README.md").read_text()
    assert text == house_doc.readme(text)
    for path in (path for room in house_doc.ROOMS for path in (ROOT / room).rglob("*.py") if path.read_text().strip()):
        assert f"`{path.relative_to(ROOT)}`" in text


def test_the_page_of_recipes_is_made_from_them() -> None:
    assert (ROOT / "docs" / "recipes.md").read_text() == recipe_doc.page()


def test_the_page_of_the_losses_is_what_their_table_says() -> None:
    assert (ROOT / "docs" / "losses.md").read_text() == loss_doc.page()
    assert loss_doc.methods() in (ROOT / "docs" / "cross-losses.md").read_text()


def test_the_page_of_large_plans_is_what_their_arithmetic_says() -> None:
    assert (ROOT / "docs" / "scale.md").read_text() == scale_doc.page()


def test_the_page_of_data_names_every_column_and_key_that_has_a_fate() -> None:
    names = set(re.findall(r"`(\w+)`", (ROOT / "docs" / "data.md").read_text()))
    assert {*columns.RECORD_COLUMNS, *columns.MESSAGE_KEYS, *columns.PART_KEYS} - names == set()
