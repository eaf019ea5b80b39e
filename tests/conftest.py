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

import jax  # noqa: E402

from r1s_jax.system.dtype import machine  # noqa: E402
from r1s_jax.system.profiling import forget_compiled_programs  # noqa: E402
from tests import makers  # noqa: E402

# Programs compile once, not for every worker, process and run of the tests.
_PROGRAMS = {
    "jax_compilation_cache_dir": str(
        Path(__file__).parents[1] / ".pytest_cache" / f"programs-{machine()}"
    ),
    "jax_persistent_cache_min_compile_time_secs": 0.0,
    "jax_persistent_cache_min_entry_size_bytes": -1,
}
for name, value in _PROGRAMS.items():
    jax.config.update(name, value)
    os.environ[name.upper()] = str(value)  # for the processes that tests start


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
    """A worker that kept the programs of all its tests would crash."""
    yield
    forget_compiled_programs()


# The longest files, which come first: none of them may start last.
_LONGEST = (
    "test_train.py",
    "test_mesh.py",
    "test_notebooks.py",
    "test_serve_command.py",
    "test_run.py",
    "test_flash.py",
    "test_kinds.py",
    "test_shared_beginnings.py",
    "test_learner.py",
    "test_attention.py",
    "test_decoder.py",
    "test_lora.py",
    "test_distributed.py",
)


def pytest_collection_modifyitems(items):
    """Puts the longest files first."""
    place = {name: i for i, name in enumerate(_LONGEST)}
    items.sort(key=lambda item: place.get(item.path.name, len(place)))
