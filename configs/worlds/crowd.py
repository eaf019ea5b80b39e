"""The tiny world with three people of like names beside everybody, and three documents a search."""

from r1s_jax.config import Config, override
from r1s_jax.configs.tiny_world import config as tiny_world


def config() -> Config:
    return override(
        tiny_world(),
        [
            "name=worlds/crowd",
            "environment.distractors=3",
            "cold_start.steps=800",
            "rollout.documents_per_query=3",
            "rollout.max_documents_length=120",
            "rollout.max_length=448",
        ],
    )
