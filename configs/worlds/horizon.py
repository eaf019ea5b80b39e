"""The tiny world with long pages, in which most facts are about other people."""

from r1s_jax.config import Config, override
from r1s_jax.configs.tiny_world import config as tiny_world


def config() -> Config:
    return override(
        tiny_world(),
        [
            "name=worlds/horizon",
            "environment.padding=6",
            "rollout.documents_per_query=1",
            "rollout.max_documents_length=128",
            "rollout.max_length=448",
        ],
    )
