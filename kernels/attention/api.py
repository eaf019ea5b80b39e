"""The one door to attention: callers import from here, whatever runs behind it."""

from r1s_jax.kernels.attention.reference import attention
from r1s_jax.kernels.attention.xla import decode_attention

__all__ = ["attention", "decode_attention"]
