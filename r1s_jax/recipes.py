"""Recipes: whole configurations by name, with single fields changed."""

import importlib
import pkgutil
from collections.abc import Sequence
from types import ModuleType

import r1s_jax.configs as package
from r1s_jax.border.errors import ConfigError
from r1s_jax.config import Config, override


def titles() -> dict[str, str]:
    """The recipes by name, with what each is in a line."""
    return {name: (m.__doc__ or "").strip().splitlines()[0] for name, m in _modules().items()}


def load_recipe(name: str, overrides: Sequence[str] = ()) -> Config:
    """The recipe of that name, changed by `section.field=value` texts.

    Raises ConfigError for a name that is none, and as `config.override` does.
    """
    modules = _modules()
    if name not in modules:
        raise ConfigError(f"no recipe {name!r}; there are: {', '.join(modules)}")
    return override(modules[name].config(), overrides)


def _modules() -> dict[str, ModuleType]:
    modules = [module.name for module in pkgutil.iter_modules(package.__path__) if not module.ispkg]
    names = [name for name in modules if not name.startswith("_")]
    return {name: importlib.import_module(f"{package.__name__}.{name}") for name in names}
