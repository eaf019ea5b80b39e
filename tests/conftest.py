"""Tests run on the CPU unless JAX_PLATFORMS says otherwise; a TPU compiler is no TPU."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import pytest

from tests import makers


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """A random model that speaks the tiny world, as a Hugging Face directory."""
    return makers.save_small_model(tmp_path_factory.mktemp("models") / "small")


@pytest.fixture(scope="session")
def index(tmp_path_factory):
    """An index of a tiny world."""
    return makers.save_small_index(tmp_path_factory.mktemp("indexes"))


def pytest_collection_modifyitems(items):
    """Whole runs come first: with two workers, what takes longest must not start last."""
    items.sort(key=lambda item: item.path.name != "test_train.py")
