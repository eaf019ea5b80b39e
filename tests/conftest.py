"""Tests run on the CPU unless JAX_PLATFORMS says otherwise; a TPU compiler is no TPU."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
