"""The commands and targets of links in the documentation exist."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer

from benchmarks.__main__ import app as benchmarks
from r1s_jax import cli
from r1s_jax.recipes import load_recipe

ROOT = Path(__file__).parents[1]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
_BLOCK = re.compile(r"```bash\n(.*?)```", re.S)


def commands(page: Path) -> list[list[str]]:
    """The words of every command in the bash blocks of a page."""
    text = "\n".join(_BLOCK.findall(page.read_text()))
    lines = text.replace("\\\n", " ").splitlines()
    return [shlex.split(line.strip(), comments=True) for line in lines if line.strip()]


COMMANDS = [(page.name, words) for page in PAGES for words in commands(page)]
PROGRAMS = {("r1s",): cli.app, ("python", "-m", "benchmarks"): benchmarks}
TYPED = [
    (words, start)
    for _, words in COMMANDS
    for start in PROGRAMS
    if tuple(words[: len(start)]) == start
]


@pytest.mark.parametrize(("words", "start"), TYPED, ids=lambda x: " ".join(x)[:60])
def test_every_documented_command_exists(words, start):
    command, arguments = typer.main.get_command(PROGRAMS[start]), words[len(start) :]
    while hasattr(command, "commands"):  # a group
        assert arguments and arguments[0] in command.commands, words
        command = command.commands[arguments.pop(0)]
    context = command.make_context(command.name, arguments)
    recipe = context.params.get("config")
    if recipe and not recipe.endswith(".py"):  # a file of the reader
        load_recipe(recipe, context.params["overrides"] or [])


def test_every_documented_make_target_exists():
    targets = set(re.findall(r"^([\w./-]+):", (ROOT / "Makefile").read_text(), re.M))
    named = [words[1] for _, words in COMMANDS if words[:1] == ["make"]]
    assert named and set(named) <= targets


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_targets_of_links_exist(page):
    links = re.findall(r"\]\(([^)#]+)\)", page.read_text())
    missing = [x for x in links if "://" not in x and not (page.parent / x).exists()]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_a_page_names_exist(page):
    """The lists of files in AGENTS.md and CONTRIBUTING.md must not name a file that moved."""
    starts = ("r1s_jax/", "kernels/", "retrieval/", "eval/", "configs/", "benchmarks/", "tests/")
    named = [n for n in re.findall(r"`([\w./-]+)`", page.read_text()) if n.startswith(starts)]
    named += re.findall(r"\b(?:tests|r1s_jax|kernels|benchmarks)/[\w/]+\.py\b", page.read_text())
    assert page.name != "AGENTS.md" or len(named) > 40
    assert not [name for name in named if not (ROOT / name).exists()]


def test_agents_page_says_where_ten_changes_go():
    table = (ROOT / "AGENTS.md").read_text().partition("## Where ten changes go")[2]
    rows = re.findall(r"^\| (an? [^|]+) \| (.+) \|$", table, re.M)
    assert len(rows) == 10
    for change, files in rows:
        assert re.findall(r"`([\w./]+\.py)`", files), change


def names(app: typer.Typer, start: str) -> list[str]:
    """Every command of a program, as users type it."""

    def inner(command: Any, words: str) -> list[str]:
        subcommands = getattr(command, "commands", {})
        return [n for w, c in subcommands.items() for n in inner(c, f"{words} {w}")] or [words]

    return inner(typer.main.get_command(app), start)


def test_every_command_is_documented():
    text = " ".join(" ".join(page.read_text("utf-8").split()) for page in PAGES)
    commands = [*names(cli.app, "r1s"), *names(benchmarks, "python -m benchmarks")]
    assert len(commands) > 30
    assert not [command for command in commands if command not in text]


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text("utf-8").splitlines()) <= 170


def test_every_page_is_in_the_site():
    contents = (ROOT / "docs" / "index.md").read_text("utf-8")
    listed = {
        name
        for block in re.findall(r"```{toctree}(.*?)```", contents, re.S)
        for name in re.findall(r"^(\w+)$", block, re.M)
    }
    assert listed == {page.stem for page in (ROOT / "docs").glob("*.md")} - {"index"}
