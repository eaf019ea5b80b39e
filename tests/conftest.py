"""Tests run on the CPU unless JAX_PLATFORMS is set, even where a TPU compiler is installed."""

import os
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# A test compiles for longer than it computes. XLA's programs stay as they are; LLVM, which turns
# them into machine code, takes half the time.
os.environ["XLA_FLAGS"] = f"--xla_backend_optimization_level=0 {os.environ.get('XLA_FLAGS', '')}"

import pytest
from jaxtyping import install_import_hook

from tests.checked import checked

# Every call checks the shapes and dtypes of arrays against their annotations.
ROOMS = ("kernels", "retrieval", "models", "rollout", "learning", "eval")
install_import_hook(
    [f"r1s_jax.{room}" for room in ROOMS], f"{checked.__module__}.{checked.__name__}"
)

from r1s_jax.system.profiling import forget_compiled_programs  # noqa: E402
from tests import makers  # noqa: E402

# Linux allows a process 65,530 memory maps by default, and each compiled program takes several: a
# worker that kept the programs of all its tests would exceed the limit and crash.
_MANY_MAPS = 25_000


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """A random model with the tokenizer of the tiny world, as a Hugging Face directory."""
    return makers.save_small_model(tmp_path_factory.mktemp("models") / "small")


@pytest.fixture(scope="session")
def index(tmp_path_factory):
    """An index of the passages of a tiny world."""
    return makers.save_small_index(tmp_path_factory.mktemp("indexes"))


@pytest.fixture(scope="module", autouse=True)
def few_programs():
    """Forgets compiled programs when there are very many."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > _MANY_MAPS:
        forget_compiled_programs()


def pytest_collection_modifyitems(items):
    """Whole runs come first: with two workers, the longest tests must not start last."""
    items.sort(key=lambda item: item.path.name != "test_train.py")
