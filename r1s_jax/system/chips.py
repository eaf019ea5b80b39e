"""Accelerators: published figures of chips, and whether this machine has one."""

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


# Device files that TPU drivers create, by generation.
_TPU_DEVICES = ("/dev/accel*", "/dev/vfio/[0-9]*")
_GPU_DEVICES = ("/dev/nvidia[0-9]*",)
# Variables that request the TPU runtime, whether or not device files exist.
_TPU_WANTED = ("TPU_LIBRARY_PATH", "JAX_FORCE_TPU_INIT")


def hide_tpu_runtime() -> None:
    """On a machine without a TPU, keeps JAX from starting an installed TPU runtime.

    The runtime may be installed to compile for TPUs elsewhere; without a TPU it prints errors. Must
    be called before JAX is imported.
    """
    if not _exists(_TPU_DEVICES) and not any(name in os.environ for name in _TPU_WANTED):
        # `import libtpu` now raises ImportError.
        sys.modules.setdefault("libtpu", None)  # pyright: ignore[reportArgumentType]  # None is allowed


def has_accelerator() -> bool:
    """Whether the kernel shows a TPU or a CUDA GPU; does not import JAX."""
    return _exists(_TPU_DEVICES + _GPU_DEVICES)


def _exists(patterns: tuple[str, ...]) -> bool:
    return any(True for pattern in patterns for _ in Path("/").glob(pattern[1:]))


def show_tpu_runtime() -> None:
    """Undoes `hide_tpu_runtime`, to compile for TPUs."""
    if sys.modules.get("libtpu", "") is None:
        del sys.modules["libtpu"]
