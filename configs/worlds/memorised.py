"""The tiny world with people whose facts never change, so that the policy may know them."""

from r1s_jax.config import Config, override
from r1s_jax.configs.tiny_world import config as tiny_world


def config() -> Config:
    return override(
        tiny_world(),
        [
            "name=worlds/memorised",
            "environment.memorised_people=20",
        ],
    )
