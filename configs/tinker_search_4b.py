"""Qwen3-4B-Instruct learns to search by tool calls with tinker-cookbook's published numbers."""

from r1s_jax.config import Config
from r1s_jax.configs._tinker import tinker_search


def config() -> Config:
    return tinker_search("tinker_search_4b", "hf:Qwen/Qwen3-4B-Instruct-2507", slots=32)
