"""The tiny world with questions that need up to four searches, for a policy that reads badly."""

from r1s_jax.config import Config, override
from r1s_jax.configs.tiny_world import config as tiny_world


def config() -> Config:
    return override(
        tiny_world(),
        [
            "name=worlds/hops",
            "environment.hops=4",
            "cold_start.steps=380",
            "cold_start.cooldown_steps=100",
            "rollout.max_searches=6",
            "rollout.max_length=320",
        ],
    )
