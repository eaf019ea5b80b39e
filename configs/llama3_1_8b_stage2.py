"""Llama-3.1-8B-Instruct learns to answer: the second stage (policy.model=RUN of the first)."""

from r1s_jax.config import Config
from r1s_jax.configs._published import STAGE2, published


def config() -> Config:
    return published(
        "llama3_1_8b_stage2",
        "hf:meta-llama/Llama-3.1-8B-Instruct",
        stage2=STAGE2,
        prompt="chat",
        kl_coefficient=1e-4,
        tensor=4,
    )
