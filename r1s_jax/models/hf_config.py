"""The `config.json` of a Hugging Face model: read into an architecture, and written from one."""

from pathlib import Path
from typing import Annotated, Any

import msgspec

from r1s_jax.config import ModelConfig, RopeScaling
from r1s_jax.io.errors import ConfigError, shorten
from r1s_jax.io.json import read_object
from r1s_jax.io.schema import check
from r1s_jax.models.gguf import WeightsError

# The oldest release that reads this config.json; if none is named, transformers guesses and warns.
_TRANSFORMERS = "4.57.0"
MODEL_TYPES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}


def read_model_json(file: Path) -> dict[str, Any]:
    """A JSON object of a model's folder; raises WeightsError where it is missing or damaged."""
    try:
        return read_object(file, WeightsError)
    except FileNotFoundError as error:
        raise WeightsError(
            f"{file} is missing: a model is a Hugging Face directory (config.json, *.safetensors) "
            "or one .gguf file"
        ) from error


Size = Annotated[int, msgspec.Meta(ge=1, le=2**24)]
Positive = Annotated[float, msgspec.Meta(gt=0, le=1e12)]


class _HFRope(msgspec.Struct):
    """transformers 5 writes `rope_parameters`; before, it was `rope_theta` and `rope_scaling`."""

    rope_theta: Positive | None = None
    rope_type: str | None = None
    type: str | None = None
    factor: Positive | None = None
    low_freq_factor: Positive | None = None
    high_freq_factor: Positive | None = None
    original_max_position_embeddings: Size | None = None


class _HFConfig(msgspec.Struct):
    """The fields of a config.json that are read, with their valid ranges."""

    vocab_size: Size
    hidden_size: Size
    intermediate_size: Size
    num_hidden_layers: Annotated[int, msgspec.Meta(ge=1, le=1024)]
    num_attention_heads: Annotated[int, msgspec.Meta(ge=1, le=1024)]
    max_position_embeddings: Size
    rms_norm_eps: Annotated[float, msgspec.Meta(gt=0, le=0.1)]
    num_key_value_heads: Annotated[int, msgspec.Meta(ge=1, le=1024)] | None = None
    head_dim: Annotated[int, msgspec.Meta(ge=2, le=1024, multiple_of=2)] | None = None
    tie_word_embeddings: bool = False
    rope_theta: Positive | None = None
    rope_parameters: _HFRope | None = None
    rope_scaling: _HFRope | None = None


def parse_config(c: dict[str, Any], file: Path) -> ModelConfig:
    """The architecture that a config.json describes; raises WeightsError for any other."""
    c = {key: value for key, value in c.items() if value is not None}
    kind = c.get("model_type")
    if not isinstance(kind, str) or kind not in MODEL_TYPES:
        raise WeightsError(
            f"{file}: model type {shorten(repr(kind), 60)} is not supported; supported are "
            f"{', '.join(MODEL_TYPES)}"
        )
    # An attention bias outside Qwen2 sits on the output projection too.
    refused = {
        "hidden_act": c.get("hidden_act", "silu") != "silu",
        "attention_bias": kind != "qwen2" and c.get("attention_bias"),
        "mlp_bias": c.get("mlp_bias"),
        "use_sliding_window": c.get("use_sliding_window"),
        "quantization_config": c.get("quantization_config"),
        "partial_rotary_factor": c.get("partial_rotary_factor", 1) != 1,
    }
    if wrong := [f"{key}={shorten(repr(c[key]), 40)}" for key, bad in refused.items() if bad]:
        raise WeightsError(f"{file}: not supported: {', '.join(wrong)}")
    hf = check(c, _HFConfig, file, WeightsError)
    heads = hf.num_attention_heads
    head_dim = hf.head_dim or hf.hidden_size // heads
    if head_dim < 2 or head_dim % 2:
        raise WeightsError(
            f"{file}: hidden_size / num_attention_heads is {head_dim}, must be even and at least 2"
        )
    try:
        return ModelConfig(
            vocab_size=hf.vocab_size,
            d_model=hf.hidden_size,
            d_ff=hf.intermediate_size,
            num_layers=hf.num_hidden_layers,
            num_heads=heads,
            num_kv_heads=hf.num_key_value_heads or heads,
            head_dim=head_dim,
            norm_eps=hf.rms_norm_eps,
            tie_embeddings=hf.tie_word_embeddings,
            qkv_bias=kind == "qwen2",
            qk_norm=kind == "qwen3",
            max_position=hf.max_position_embeddings,
            **_parse_rope(hf, file),
        )
    except ConfigError as error:
        raise WeightsError(f"{file}: {error}") from error


def _parse_rope(hf: _HFConfig, file: Path) -> dict[str, Any]:
    rope = hf.rope_parameters or hf.rope_scaling or _HFRope()
    theta = float(rope.rope_theta or hf.rope_theta or 10000.0)
    kind = rope.rope_type or rope.type or "default"
    if kind == "default":
        return {"rope_theta": theta}
    if kind != "llama3":
        raise WeightsError(
            f"{file}: rope type {shorten(repr(kind), 60)} is not supported; only default and llama3"
        )
    names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    values = [getattr(rope, name) for name in names]
    if None in values:
        raise WeightsError(f"{file}: rope of type llama3 lacks {names[values.index(None)]}")
    return {"rope_theta": theta, "rope_scaling": RopeScaling(*values)}


def hf_config(config: ModelConfig, dtype: str) -> dict[str, Any]:
    """The contents of config.json; rope in the older form, which transformers 5 reads too."""
    if config.qkv_bias and config.qk_norm:
        raise WeightsError("no Hugging Face model type has both qkv_bias and qk_norm")
    kind = "qwen3" if config.qk_norm else "qwen2" if config.qkv_bias else "llama"
    scaling = None
    if s := config.rope_scaling:
        scaling = {
            "rope_type": "llama3",
            "factor": s.factor,
            "low_freq_factor": s.low_freq_factor,
            "high_freq_factor": s.high_freq_factor,
            "original_max_position_embeddings": s.original_max_position,
        }
    return {
        "architectures": [MODEL_TYPES[kind]],
        "model_type": kind,
        "torch_dtype": dtype,
        "transformers_version": _TRANSFORMERS,
        "hidden_act": "silu",
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": config.d_ff,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "rope_theta": config.rope_theta,
        "rope_scaling": scaling,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "max_position_embeddings": config.max_position,
    }
