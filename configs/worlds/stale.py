"""The tiny world with an outdated page about three in ten people, found first."""

from r1s_jax.config import Config, override
from r1s_jax.configs.tiny_world import config as tiny_world


def config() -> Config:
    return override(
        tiny_world(),
        [
            "name=worlds/stale",
            "environment.stale=0.3",
            "cold_start.steps=800",
            "rollout.documents_per_query=2",
            "rollout.max_documents_length=80",
            "rollout.max_length=320",
        ],
    )
