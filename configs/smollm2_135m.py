"""SmolLM2-135M-Instruct, both stages: the smallest real model, for trying a cluster."""

from r1s_jax.config import Config
from r1s_jax.configs._published import STAGE1, STAGE2, published


def config() -> Config:
    return published(
        "smollm2_135m",
        "hf:HuggingFaceTB/SmolLM2-135M-Instruct",
        stage1=STAGE1,
        stage2=STAGE2,
        prompt="chat",
    )
