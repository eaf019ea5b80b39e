"""Writes docs/configuration.md (the fields of r1s_jax/config.py) and docs/recipes.md.

Run it after a change of those: `python docs/make_configuration.py`.
"""

import ast
import dataclasses
import json
import os
import typing
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from msgspec import Meta

from r1s_jax import config, presets, recipes
from r1s_jax.io.fields import declared, number

PAGE = Path(__file__).with_name("configuration.md")
RECIPES = PAGE.with_name("recipes.md")
HEAD = """# Every field of a recipe

A recipe sets fields by section; the command line changes one with `section.field=value`, several
values separated by commas. [training.md](training.md) says what to choose. Numbers are at most
2**31 - 1 where the table names no upper bound.

This page is made by `python docs/make_configuration.py` from `r1s_jax/config.py` and
`r1s_jax/presets.py`; do not edit it.
"""
IN_USE = """## A policy in use

`r1s eval run`, `r1s data select`, `r1s serve` and `r1s ask` take `rollout.field=value` and
`search.field=value` of the sections above, `seed=`, and the `protocol` section below. Their presets
differ from the defaults above in these fields of `rollout`; lengths follow `rollout.max_length` and
what the model reads.
"""
RECIPES_HEAD = """# What each recipe sets

The fields of each recipe in `configs/` that differ from the defaults in
[configuration.md](configuration.md). `r1s configs --copy NAME my_recipe.py` copies a recipe, and
`section.field=value` changes a field on the command line.

This page is made by `python docs/make_configuration.py`; do not edit it.
"""
COLUMNS = """| field | type | default | bounds | meaning |
| --- | --- | --- | --- | --- |"""
SETS = """| field | value |
| --- | --- |"""
IN_USE_SECTION = (presets.PromptingConfig, ["protocol"])
TYPES = {int: "whole number", float: "number", str: "text", bool: "true or false"}


def page() -> str:
    """The text of docs/configuration.md."""
    paths: dict[type, list[str]] = {}
    for path, cls in _sections():
        paths.setdefault(cls, []).append(path)
    sections = [_section(cls, names) for cls, names in paths.items()]
    return "\n".join([HEAD, *sections, IN_USE, _presets(), _section(*IN_USE_SECTION)])


def _presets() -> str:
    """The fields of `rollout` in which a preset differs from the default."""
    shown = ("evaluation", "selection", "serving", "asking")
    rollouts = [getattr(presets, name)().rollout for name in shown]
    rows = [f"| field | default | {' | '.join(shown)} |", "| --- | --- |" + " --- |" * len(shown)]
    for field in dataclasses.fields(config.RolloutConfig):
        values = [field.default, *(getattr(rollout, field.name) for rollout in rollouts)]
        if len(set(values)) > 1:
            rows.append(f"| `{field.name}` | {' | '.join(map(json.dumps, values))} |")
    return "\n".join([*rows, ""])


def recipes_page() -> str:
    """The text of docs/recipes.md."""
    sections = [RECIPES_HEAD]
    for name, title in recipes.titles().items():
        rows = [f"| `{path}` | {_shown(value)} |" for path, value in _changes(name)]
        sections.append("\n".join([f"## {name}", "", title, "", SETS, *rows, ""]))
    return "\n".join(sections)


def _changes(name: str) -> list[tuple[str, Any]]:
    """The fields of a recipe, by path, whose values are not the defaults."""

    def walk(node: Any, path: str) -> Iterator[tuple[str, Any]]:
        for field in dataclasses.fields(node):
            value, inner = getattr(node, field.name), f"{path}{field.name}"
            if dataclasses.is_dataclass(value):
                yield from walk(value, f"{inner}.")
            elif value != _plain_default(field) and inner != "name":
                yield inner, value

    return list(walk(recipes.load_recipe(name, []), ""))


def _plain_default(field: dataclasses.Field) -> Any:
    made = field.default_factory
    return field.default if made is dataclasses.MISSING else made()


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        value = ",".join(map(str, value))
    if isinstance(value, str):  # hotpot_smollm2 names files by absolute paths
        folder = Path(os.environ.get("R1S_DATA", "data")).resolve()
        value = value.replace(str(folder), "$R1S_DATA")
    return f"`{value if isinstance(value, str) else json.dumps(value)}`"


def undocumented() -> list[str]:
    """The fields that have no sentence below them, as Class.field."""
    return [
        f"{cls.__name__}.{name}"
        for _, cls in _sections()
        for name, (kind, _) in declared(cls).items()
        if not _classes_of(kind) and name not in _meanings(cls)
    ]


def _sections(cls: type = config.Config, path: str = "") -> Iterator[tuple[str, type]]:
    """The path and class of each section; a section of two classes comes twice."""
    yield path, cls
    for name, (kind, _) in declared(cls).items():
        for inner in _classes_of(kind):
            yield from _sections(inner, f"{path}.{name}".lstrip("."))


def _section(cls: type, paths: list[str]) -> str:
    """Heading, sentence and table of the sections that are of one class."""
    title = " and ".join(f"`{path}`" for path in paths if path) or "Fields without a section"
    others = [path for path, known in _sections() if known is not cls]
    if paths[0] and paths[0] in others:
        title += f" ({cls.__name__})"
    meanings, rows = _meanings(cls), []
    for field in dataclasses.fields(cls):
        kind, bounds = declared(cls)[field.name]
        if field.name in meanings:
            cells = _type(kind), _default(field), _bounds(bounds), meanings[field.name]
            rows.append(f"| `{field.name}` | {' | '.join(cells)} |")
    return "\n".join([f"## {title}\n\n{_summary(cls)}\n\n{COLUMNS}", *rows, ""])


def _classes_of(kind: Any) -> list[type]:
    """The sections that a field of this type may hold."""
    return [one for one in typing.get_args(kind) or (kind,) if dataclasses.is_dataclass(one)]


def _type(kind: Any) -> str:
    inner = typing.get_args(kind)
    if typing.get_origin(kind) is Literal:
        return ", ".join(f"`{one}`" if one else "empty" for one in inner)
    if typing.get_origin(kind) is tuple:
        return f"{TYPES[inner[0]]}s"
    return TYPES.get(kind, "section")


def _default(field: dataclasses.Field) -> str:
    value = field.default
    if value is dataclasses.MISSING:
        return "required"
    if value is None or value in ("", ()):
        return "none" if value is None else "empty"
    return f"`{value if isinstance(value, str) else json.dumps(value)}`"


def _bounds(bounds: Meta | None) -> str:
    if bounds is None:
        return ""
    if bounds.description:
        return bounds.description
    most = None if bounds.le == 2**31 - 1 else bounds.le
    sides = [("at least", bounds.ge), ("above", bounds.gt), ("at most", most), ("below", bounds.lt)]
    return ", ".join(f"{words} {number(side)}" for words, side in sides if side is not None)


@cache
def _source() -> dict[str, ast.ClassDef]:
    files = (Path(str(module.__file__)) for module in (config, presets))
    nodes = [node for file in files for node in ast.parse(file.read_text("utf-8")).body]
    return {node.name: node for node in nodes if isinstance(node, ast.ClassDef)}


def _summary(cls: type) -> str:
    return (ast.get_docstring(_source()[cls.__name__]) or "").partition("\n")[0]


def _meanings(cls: type) -> dict[str, str]:
    """What the text on the line below each field says."""
    body, found = _source()[cls.__name__].body, {}
    for field, below in pairwise(body):
        match field, below:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(ast.Constant(str(text))):
                found[name] = " ".join(text.split()).replace("|", "\\|")
    return found


if __name__ == "__main__":
    PAGE.write_text(page(), "utf-8")
    RECIPES.write_text(recipes_page(), "utf-8")
