"""What accelerators can do, by the name that JAX gives them (figures published by their makers)."""

from dataclasses import dataclass


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
