"""The tiny world without a third of its pages."""

from r1s_jax.config import Config, override
from r1s_jax.configs.tiny_world import config as tiny_world


def config() -> Config:
    return override(
        tiny_world(),
        [
            "name=worlds/coverage",
            "environment.coverage=0.67",
        ],
    )
