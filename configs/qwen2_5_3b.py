"""Qwen2.5-3B base, both stages with the published numbers."""

from r1s_jax.config import Config
from r1s_jax.configs._published import STAGE1, STAGE2, published


def config() -> Config:
    return published("qwen2_5_3b", "hf:Qwen/Qwen2.5-3B", stage1=STAGE1, stage2=STAGE2, tensor=2)
