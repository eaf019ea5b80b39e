"""The limits of an attention backend; each backend's file declares its own."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Support:
    """Limits of one backend; by default there are none."""

    # A KV cache's tokens and head width come in multiples of these.
    cache_multiple: tuple[int, int] = (1, 1)
    dtypes: tuple[str, ...] | None = None  # of q, k and v; None: any
    serves_width: Callable[[int], bool] = lambda head_dim: True
    widths: str = "any width"  # `serves_width` in words


KERNEL_DTYPES = ("float32", "bfloat16")
