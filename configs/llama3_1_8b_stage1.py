"""Llama-3.1-8B-Instruct learns to search: the published first stage."""

from r1s_jax.config import Config
from r1s_jax.configs._published import STAGE1, published


def config() -> Config:
    return published(
        "llama3_1_8b_stage1",
        "hf:meta-llama/Llama-3.1-8B-Instruct",
        stage1=STAGE1,
        prompt="chat",
        estimator="grpo",
        kl_coefficient=1e-4,
        tensor=4,
    )
