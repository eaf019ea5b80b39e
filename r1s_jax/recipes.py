"""Recipes: whole configurations by name, with single fields changed."""

import ast
import importlib
import importlib.util
import pkgutil
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import r1s_jax.configs as package
from r1s_jax.config import Config, override
from r1s_jax.io.errors import ConfigError, reading
from r1s_jax.io.renamed import FIELDS, retired


def titles() -> dict[str, str]:
    """The recipes by name, with a line about each."""
    return {name: _title(Path(str(module.__file__))) for name, module in _modules().items()}


def load_recipe(name: str, overrides: Sequence[str] = ()) -> Config:
    """The recipe of that name or in that file, changed by `section.field=value` texts.

    A user's file ends in .py and has a function `config()`, like the files of `configs/`. Raises
    ConfigError for an unknown name, for a file that raises, and as `config.override` does.
    """
    if name.endswith(".py"):
        return override(_from_file(Path(name)), overrides)
    modules = _modules()
    if name not in modules:
        raise ConfigError(
            f"no recipe {name!r}; there are: {', '.join(modules)}; a file of your own ends in .py"
        )
    return override(modules[name].config(), overrides)


def recipe_name(name: str) -> str:
    """A recipe's name without its folder; for a user's file, the file's name without .py."""
    return Path(name).stem


def copy_recipe(name: str, file: Path) -> Path:
    """Copies a recipe's source to a new file of the user.

    Raises ConfigError for an unknown name, and for a file that exists.
    """
    modules = _modules()
    if name not in modules:
        raise ConfigError(f"no recipe {name!r}; there are: {', '.join(modules)}")
    if file.suffix != ".py":
        raise ConfigError(f"{file}: the file of a recipe ends in .py")
    if file.exists():
        raise ConfigError(f"{file} exists: choose another name, or remove it")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(Path(str(modules[name].__file__)).read_text("utf-8"), "utf-8")
    return file


def _title(file: Path) -> str:
    """The first line of a recipe's docstring, read from the source: Python drops it with -OO."""
    return (ast.get_docstring(ast.parse(file.read_text("utf-8"))) or "").partition("\n")[0]


def _from_file(file: Path) -> Config:
    """The Config that `config()` of a user's file returns; every error names the file."""
    if not file.is_file():
        raise ConfigError(f"{file}: there is no such file (looked for {file.absolute()})")
    spec = importlib.util.spec_from_file_location(f"r1s_recipe_{file.stem}", file)
    assert spec is not None and spec.loader is not None  # the suffix is .py
    module = importlib.util.module_from_spec(spec)
    with _naming(file), reading(file, ConfigError):
        spec.loader.exec_module(module)
    if not callable(getattr(module, "config", None)):
        raise ConfigError(f"{file} has no function config() that returns the Config of a run")
    with _naming(file), reading(f"{file}: config()", ConfigError):
        config = module.config()
    if not isinstance(config, Config):
        raise ConfigError(f"{file}: config() returned a {type(config).__name__}, not a Config")
    return config


@contextmanager
def _naming(file: Path) -> Iterator[None]:
    """Adds the user's file to the errors that its code raises in this context."""
    try:
        yield
    except ConfigError as error:
        message = str(error) if str(file) in str(error) else f"{file}: {error}"
        if match := re.search(r"unexpected keyword argument '(\w+)'", message):
            message += "".join(
                f"; {r}" for p in FIELDS if p.endswith(f".{match[1]}") and (r := retired(p))
            )
        raise ConfigError(message) from error
    except SystemExit as error:
        raise ConfigError(f"{file} ends the program (sys.exit): let config() return it") from error


def _modules() -> dict[str, ModuleType]:
    """The modules of recipes by name; one in a folder has the folder's name before its own."""
    modules = pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
    paths = [m.name.removeprefix(f"{package.__name__}.") for m in modules if not m.ispkg]
    paths = [path for path in paths if not path.split(".")[-1].startswith("_")]
    names = {path.replace(".", "/"): path for path in paths}
    return {n: importlib.import_module(f"{package.__name__}.{p}") for n, p in names.items()}
