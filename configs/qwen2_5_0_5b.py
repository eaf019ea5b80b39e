"""Qwen2.5-0.5B base, both stages with the published numbers."""

from r1s_jax.config import Config
from r1s_jax.configs._published import STAGE1, STAGE2, published


def config() -> Config:
    return published("qwen2_5_0_5b", "hf:Qwen/Qwen2.5-0.5B", stage1=STAGE1, stage2=STAGE2)
