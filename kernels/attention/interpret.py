"""The TPU kernels, interpreted on any device: slow, for tests."""

from functools import partial

from r1s_jax.kernels.attention import tpu

SUPPORT = tpu.SUPPORT
attention = partial(tpu.attention, interpret=True)
decode_attention = partial(tpu.decode_attention, interpret=True)
