"""Tests run on the CPU unless JAX_PLATFORMS says otherwise; a TPU compiler is no TPU."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")


def pytest_collection_modifyitems(items):
    """Whole runs come first: with two workers, what takes longest must not start last."""
    items.sort(key=lambda item: item.path.name != "test_train.py")
