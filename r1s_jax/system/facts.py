"""The facts about a machine and a program on which the bits of a result depend."""

import importlib.metadata
import os
import platform
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from r1s_jax import __version__
from r1s_jax.io.seals import digest
from r1s_jax.system.dtype import machine

_PACKAGES = ("jax", "jaxlib", "numpy", "transformers", "tokenizers", "scann")
_FLAGS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "JAX_DEFAULT_MATMUL_PRECISION")


def facts(mesh: Mapping[str, int] | None = None, dtype: str = "") -> dict[str, Any]:
    """All that decides, besides a run's settings and data, whether two machines compute alike."""
    devices = Counter(f"{d.platform} {d.device_kind}" for d in jax.devices())
    return {
        "version": __version__,
        "code": code_digest(),
        **{name: v for name in _PACKAGES if (v := _version(name))},
        "python": platform.python_version(),
        "processor": machine(),
        "cores": _cores(),
        "flags": {name: os.environ[name] for name in _FLAGS if os.environ.get(name)},
        "devices": dict(sorted(devices.items())),
        "processes": jax.process_count(),
        "mesh": dict(mesh or {}),
        "dtype": dtype,
    }


def code_digest() -> str:
    """A digest of the package's Python files."""
    root = Path(__file__).parents[1]
    paths = (Path(at, name) for at, _, names in os.walk(root, followlinks=True) for name in names)
    files = sorted(path for path in paths if path.suffix == ".py")
    return digest(
        *(part for f in files for part in (f.relative_to(root).as_posix(), f.read_bytes()))
    )


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _cores() -> int:
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1
