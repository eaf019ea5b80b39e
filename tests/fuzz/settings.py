"""Settings of the command line, and users' recipes."""

import json
import sys
from pathlib import Path
from typing import Any

from tests.fuzz.reader import MOST_CHARACTERS, Reader


def _overrides(folder: Path) -> None:
    texts = ["seed=3", "stage2.steps=4", "rollout.temperature=0.5", "algorithm.clip=0.2"]
    (folder / "overrides.json").write_text(json.dumps(texts))


def _override(folder: Path) -> Any:
    from r1s_jax.io.json import parse
    from r1s_jax.recipes import load_recipe

    texts = parse((folder / "overrides.json").read_bytes(), "overrides.json")
    if not isinstance(texts, list):
        return None
    changed = [text for text in texts if isinstance(text, str)]
    try:
        return load_recipe("tiny_world", changed)
    except ValueError as error:
        if hasattr(error, "add_note") and type(error).__name__ == "ConfigError":
            raise type(error)(f"overrides.json: {error}"[:MOST_CHARACTERS]) from error
        raise


def _fields(node: Any, path: str = "") -> dict[str, Any]:
    """The values of all fields of a configuration that are no sections, by path."""
    import dataclasses

    values = {}
    for field in dataclasses.fields(node):
        value = getattr(node, field.name)
        inner = dataclasses.is_dataclass(value)
        values |= _fields(value, f"{path}{field.name}.") if inner else {path + field.name: value}
    return values


def _settings(folder: Path) -> None:
    from r1s_jax.configs import tiny_world

    (folder / "settings.json").write_text(json.dumps(_fields(tiny_world.config())))


def _set(folder: Path) -> Any:
    """Sets each field by a text of the command line."""
    from r1s_jax.io.errors import ConfigError
    from r1s_jax.io.json import parse_object
    from r1s_jax.recipes import load_recipe

    damaged = parse_object((folder / "settings.json").read_bytes(), "settings.json")
    values = {p: v for p, v in damaged.items() if v is not None and p not in ("policy.model",)}
    try:
        return load_recipe("tiny_world", [f"{path}={value}" for path, value in values.items()])
    except ConfigError as error:
        raise ConfigError(f"settings.json: {error}"[:MOST_CHARACTERS]) from error


_RECIPE = """
import json
from dataclasses import fields, is_dataclass, replace
from pathlib import Path

from r1s_jax.configs import tiny_world

VALUES = json.loads(Path(__file__).with_name("values.json").read_text())


def config():
    mine = tiny_world.config()
    for path, value in VALUES.items():
        section, _, name = path.rpartition(".")
        if section.count("."):
            continue
        if not section:
            mine = replace(mine, **{name: value})
        else:
            mine = replace(mine, **{section: replace(getattr(mine, section), **{name: value})})
    return mine
"""


def _recipe(folder: Path) -> None:
    from r1s_jax.configs import tiny_world

    values = {p: v for p, v in _fields(tiny_world.config()).items() if p.count(".") < 2}
    (folder / "values.json").write_text(json.dumps(values))
    (folder / "mine.py").write_text(_RECIPE)


def _read_recipe(folder: Path) -> Any:
    from r1s_jax.recipes import load_recipe

    sys.dont_write_bytecode = True  # the fuzzer must not read cached bytecode
    return load_recipe(str(folder / "mine.py"))


READERS = {
    "settings": Reader(_settings, _set, weight=20),
    "recipe": Reader(_recipe, _read_recipe, weight=20),
    "overrides": Reader(_overrides, _override, weight=4),
}
