"""What an attention backend serves; each backend's file declares its own."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Support:
    """Limits of one backend. The defaults are none."""

    # A KV cache's tokens and head width come in multiples of these.
    cache_multiple: tuple[int, int] = (1, 1)
    dtypes: tuple[str, ...] | None = None  # of q, k and v; None: any
    serves_width: Callable[[int], bool] = lambda head_dim: True
    widths: str = "any width"  # the same in words


KERNEL_DTYPES = ("float32", "bfloat16")
