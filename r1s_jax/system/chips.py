"""Accelerators: what they can do (as their makers publish it), and whether a TPU is here."""

import os
import sys
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Chip:
    """One chip: GiB that programs may use, published bf16 TFLOP/s, GB/s of memory and links."""

    hbm_gib: float
    tflops: float
    memory_gb_s: float
    link_gb_s: float


CHIPS = {
    "TPU v5 lite": Chip(15.75, 197, 819, 200),
    "TPU v5": Chip(95.74, 459, 2765, 600),
    "TPU v6 lite": Chip(31.25, 918, 1640, 448),
    "NVIDIA H100 80GB HBM3": Chip(80, 989, 3350, 450),
}


# Where the drivers of TPUs put their chips, by generation.
_TPU_DEVICES = ("/dev/accel*", "/dev/vfio/[0-9]*")
_GPU_DEVICES = ("/dev/nvidia[0-9]*",)
# Whoever sets one of these wants the runtime whatever is found.
_TPU_WANTED = ("TPU_LIBRARY_PATH", "JAX_FORCE_TPU_INIT")


def hide_tpu_runtime() -> None:
    """Where there is no TPU, keeps JAX from starting the runtime of one that may be installed.

    It is installed to compile for TPUs elsewhere, and prints errors wherever it finds none. Must
    come before JAX is imported.
    """
    if not _found(_TPU_DEVICES) and not any(name in os.environ for name in _TPU_WANTED):
        # Importing it now raises ImportError.
        sys.modules.setdefault("libtpu", None)  # pyright: ignore[reportArgumentType]  # None is allowed


def has_accelerator() -> bool:
    """Whether the kernel shows a TPU or a CUDA GPU; does not import JAX."""
    return _found(_TPU_DEVICES + _GPU_DEVICES)


def _found(patterns: tuple[str, ...]) -> bool:
    return any(True for pattern in patterns for _ in Path("/").glob(pattern[1:]))


def show_tpu_runtime() -> None:
    """Undoes `hide_tpu_runtime`, for whoever compiles for TPUs."""
    if sys.modules.get("libtpu", "") is None:
        del sys.modules["libtpu"]
