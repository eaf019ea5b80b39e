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
    """The recipes by name, with what each is in a line."""
    return {name: _title(Path(str(module.__file__))) for name, module in _modules().items()}


def load_recipe(name: str, overrides: Sequence[str] = ()) -> Config:
    """The recipe of that name or in that file, changed by `section.field=value` texts.

    A file of one's own ends in .py and has a `config()`, as the files of `configs/` have. Raises
    ConfigError for what is neither, for a file that raises, and as `config.override` does.
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
    """What a recipe is called: that of a file by the file's name."""
    return Path(name).stem if name.endswith(".py") else name


def copy_recipe(name: str, file: Path) -> Path:
    """Writes a recipe's source to a file of one's own, to start from.

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
    """The first line of a recipe's docstring, which Python itself may leave out (-OO)."""
    return (ast.get_docstring(ast.parse(file.read_text("utf-8"))) or "").partition("\n")[0]


def _from_file(file: Path) -> Config:
    """What `config()` of a user's file gives; whatever the file does wrong is named with it."""
    if not file.is_file():
        raise ConfigError(f"{file}: there is no such file (looked for {file.absolute()})")
    spec = importlib.util.spec_from_file_location(f"r1s_recipe_{file.stem}", file)
    assert spec is not None and spec.loader is not None  # by its suffix
    module = importlib.util.module_from_spec(spec)
    with _of_user(file), reading(file, ConfigError):
        spec.loader.exec_module(module)
    if not callable(getattr(module, "config", None)):
        raise ConfigError(f"{file} has no function config(), which gives the Config of a run")
    with _of_user(file), reading(f"{file}: config()", ConfigError):
        config = module.config()
    if not isinstance(config, Config):
        raise ConfigError(f"{file}: config() gave a {type(config).__name__}, not a Config")
    return config


@contextmanager
def _of_user(file: Path) -> Iterator[None]:
    """Around code of a user's file: what it asks wrongly of a Config is named with the file."""
    try:
        yield
    except ConfigError as error:
        told = str(error) if str(file) in str(error) else f"{file}: {error}"
        if named := re.search(r"unexpected keyword argument '(\w+)'", told):
            told += "".join(
                f"; {r}" for p in FIELDS if p.endswith(f".{named[1]}") and (r := retired(p))
            )
        raise ConfigError(told) from error
    except SystemExit as error:
        raise ConfigError(f"{file} ends the program (sys.exit): let config() return it") from error


def _modules() -> dict[str, ModuleType]:
    modules = [module.name for module in pkgutil.iter_modules(package.__path__) if not module.ispkg]
    names = [name for name in modules if not name.startswith("_")]
    return {name: importlib.import_module(f"{package.__name__}.{name}") for name in names}
