"""Qwen2.5-7B base learns to search: the published first stage."""

from r1s_jax.config import Config
from r1s_jax.configs._published import STAGE1, published


def config() -> Config:
    return published("qwen2_5_7b_stage1", "hf:Qwen/Qwen2.5-7B", stage1=STAGE1, tensor=4)
