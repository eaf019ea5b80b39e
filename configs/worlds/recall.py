"""The tiny world with a search engine that misses the right page for four queries in ten."""

from r1s_jax.config import Config, override
from r1s_jax.configs.tiny_world import config as tiny_world


def config() -> Config:
    return override(
        tiny_world(),
        [
            "name=worlds/recall",
            "environment.recall=0.6",
        ],
    )
