"""Qwen2.5-7B learns to answer: the second stage (policy.model=RUN of the first)."""

from r1s_jax.config import Config
from r1s_jax.configs._published import STAGE2, published


def config() -> Config:
    return published("qwen2_5_7b_stage2", "hf:Qwen/Qwen2.5-7B", stage2=STAGE2, tensor=4)
