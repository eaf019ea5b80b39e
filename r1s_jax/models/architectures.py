"""Architectures of the published models in recipes, so that planning needs no download."""

from dataclasses import replace

from r1s_jax.config import ModelConfig, PolicyConfig, RopeScaling
from r1s_jax.models.weights import load_config
from r1s_jax.system.assets import resolve

# As in the `config.json` of each model on the hub.
KNOWN = {
    "hf:Qwen/Qwen2.5-7B": ModelConfig(
        vocab_size=152064,
        d_model=3584,
        d_ff=18944,
        num_layers=28,
        num_heads=28,
        num_kv_heads=4,
        head_dim=128,
        rope_theta=1e6,
        norm_eps=1e-6,
        qkv_bias=True,
        max_position=131072,
    ),
    "hf:Qwen/Qwen3-4B-Instruct-2507": ModelConfig(
        vocab_size=151936,
        d_model=2560,
        d_ff=9728,
        num_layers=36,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        rope_theta=5e6,
        norm_eps=1e-6,
        tie_embeddings=True,
        qk_norm=True,
        max_position=262144,
    ),
    "hf:Qwen/Qwen2.5-3B": ModelConfig(
        vocab_size=151936,
        d_model=2048,
        d_ff=11008,
        num_layers=36,
        num_heads=16,
        num_kv_heads=2,
        head_dim=128,
        rope_theta=1e6,
        norm_eps=1e-6,
        tie_embeddings=True,
        qkv_bias=True,
        max_position=32768,
    ),
    "hf:Qwen/Qwen2.5-0.5B": ModelConfig(
        vocab_size=151936,
        d_model=896,
        d_ff=4864,
        num_layers=24,
        num_heads=14,
        num_kv_heads=2,
        head_dim=64,
        rope_theta=1e6,
        norm_eps=1e-6,
        tie_embeddings=True,
        qkv_bias=True,
        max_position=32768,
    ),
    "hf:meta-llama/Llama-3.1-8B-Instruct": ModelConfig(
        vocab_size=128256,
        d_model=4096,
        d_ff=14336,
        num_layers=32,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        rope_theta=5e5,
        rope_scaling=RopeScaling(8.0, 1.0, 4.0, 8192),
        max_position=131072,
    ),
    "hf:HuggingFaceTB/SmolLM2-135M-Instruct": ModelConfig(
        vocab_size=49152,
        d_model=576,
        d_ff=1536,
        num_layers=30,
        num_heads=9,
        num_kv_heads=3,
        head_dim=64,
        rope_theta=1e5,
        tie_embeddings=True,
        max_position=8192,
    ),
}
KNOWN["hf:Qwen/Qwen2.5-7B-Instruct"] = replace(KNOWN["hf:Qwen/Qwen2.5-7B"], max_position=32768)


def architecture_of(policy: PolicyConfig) -> ModelConfig:
    """The architecture of a recipe's policy; read from the model's files if not in `KNOWN`."""
    if policy.architecture:
        return policy.architecture
    return KNOWN.get(policy.model) or load_config(resolve(policy.model))
