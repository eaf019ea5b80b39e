"""Parameters from and to Hugging Face directories; parameters from GGUF files.

A Hugging Face `Linear` is stored outputs first; here inputs come first, heads have an axis of
their own and the layers are stacked (see `model.param_specs`). `_TOP` and `_LAYER` are the whole
of the mapping.
"""

import json
import math
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from r1s_jax.border.errors import ConfigError
from r1s_jax.config import ModelConfig, RopeScaling
from r1s_jax.models.gguf import WeightsError, gguf_in, open_gguf
from r1s_jax.models.params import Params, param_specs

__all__ = ["WeightsError", "load_config", "load_params", "save_params"]

MODEL_TYPES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}


class _Stored(NamedTuple):
    """How files hold one parameter."""

    hf: str
    gguf: str
    inputs: int  # leading axes (without the layer's) that are inputs; 0: stored as it is here


_TOP = {
    "embed": _Stored("model.embed_tokens.weight", "token_embd.weight", 0),
    "final_norm": _Stored("model.norm.weight", "output_norm.weight", 0),
    "lm_head": _Stored("lm_head.weight", "output.weight", 1),
}
_LAYER = {
    "attn_norm": _Stored("input_layernorm.weight", "attn_norm.weight", 0),
    "wq": _Stored("self_attn.q_proj.weight", "attn_q.weight", 1),
    "wk": _Stored("self_attn.k_proj.weight", "attn_k.weight", 1),
    "wv": _Stored("self_attn.v_proj.weight", "attn_v.weight", 1),
    "wo": _Stored("self_attn.o_proj.weight", "attn_output.weight", 2),
    "bq": _Stored("self_attn.q_proj.bias", "attn_q.bias", 0),
    "bk": _Stored("self_attn.k_proj.bias", "attn_k.bias", 0),
    "bv": _Stored("self_attn.v_proj.bias", "attn_v.bias", 0),
    "q_norm": _Stored("self_attn.q_norm.weight", "attn_q_norm.weight", 0),
    "k_norm": _Stored("self_attn.k_norm.weight", "attn_k_norm.weight", 0),
    "mlp_norm": _Stored("post_attention_layernorm.weight", "ffn_norm.weight", 0),
    "w_gate": _Stored("mlp.gate_proj.weight", "ffn_gate.weight", 1),
    "w_up": _Stored("mlp.up_proj.weight", "ffn_up.weight", 1),
    "w_down": _Stored("mlp.down_proj.weight", "ffn_down.weight", 1),
}


class _Tensor(NamedTuple):
    """One tensor of a file and its place among the parameters."""

    hf: str
    gguf: str
    param: str
    layer: int | None
    shape: tuple[int, ...]  # here, without the layer axis
    stored_shape: tuple[int, ...]
    transposed: bool


def _tensors(config: ModelConfig) -> Iterator[_Tensor]:
    """Every tensor of a model, in the order of the network."""
    specs = param_specs(config)

    def tensor(hf: str, gguf: str, param: str, layer: int | None, shape: tuple, inputs: int):
        stored = shape
        if inputs:
            stored = (math.prod(shape[inputs:]), math.prod(shape[:inputs]))
        elif layer is not None:
            stored = (math.prod(shape),)  # norms and biases are flat
        return _Tensor(hf, gguf, param, layer, shape, stored, inputs > 0)

    def top(param: str) -> _Tensor:
        s = _TOP[param]
        return tensor(s.hf, s.gguf, param, None, specs[param].shape, s.inputs)

    yield top("embed")
    for layer in range(config.num_layers):
        for param, spec in specs["layers"].items():
            s = _LAYER[param]
            names = f"model.layers.{layer}.{s.hf}", f"blk.{layer}.{s.gguf}"
            yield tensor(*names, param, layer, spec.shape[1:], s.inputs)
    yield top("final_norm")
    if not config.tie_embeddings:
        yield top("lm_head")


def load_config(path: str | Path) -> ModelConfig:
    """The architecture of a Hugging Face directory or a GGUF file.

    Raises WeightsError for a missing or damaged file and for what the model does not implement.
    """
    if file := gguf_in(path):
        return open_gguf(file).config()
    return _parse_config(_read_json(Path(path) / "config.json"), Path(path) / "config.json")


def _read_json(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise WeightsError(
            f"{file} is missing: a model is a Hugging Face directory (config.json, *.safetensors) "
            "or one .gguf file"
        ) from error
    except ValueError as error:
        raise WeightsError(f"{file} is not readable as JSON: {error}") from error


def _parse_config(c: dict[str, Any], file: Path) -> ModelConfig:
    c = {key: value for key, value in c.items() if value is not None}
    kind = c.get("model_type")
    if kind not in MODEL_TYPES:
        raise WeightsError(
            f"{file}: model type {kind!r} is not supported; supported are {', '.join(MODEL_TYPES)}"
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
    if wrong := [f"{key}={c[key]!r}" for key, bad in refused.items() if bad]:
        raise WeightsError(f"{file}: not supported: {', '.join(wrong)}")
    try:
        heads = c["num_attention_heads"]
        return ModelConfig(
            vocab_size=c["vocab_size"],
            d_model=c["hidden_size"],
            d_ff=c["intermediate_size"],
            num_layers=c["num_hidden_layers"],
            num_heads=heads,
            num_kv_heads=c.get("num_key_value_heads") or heads,
            head_dim=c.get("head_dim") or c["hidden_size"] // heads,
            norm_eps=c["rms_norm_eps"],
            tie_embeddings=c.get("tie_word_embeddings", False),
            qkv_bias=kind == "qwen2",
            qk_norm=kind == "qwen3",
            max_position=c["max_position_embeddings"],
            **_parse_rope(c, file),
        )
    except KeyError as error:
        raise WeightsError(f"{file}: the entry {error} is missing") from error
    except (TypeError, ValueError) as error:
        raise (
            error if isinstance(error, WeightsError) else WeightsError(f"{file}: {error}")
        ) from error


def _parse_rope(c: dict[str, Any], file: Path) -> dict[str, Any]:
    """transformers 5 writes `rope_parameters`; before, it was `rope_theta` and `rope_scaling`."""
    rope = c.get("rope_parameters") or c.get("rope_scaling") or {}
    theta = float(rope.get("rope_theta") or c.get("rope_theta") or 10000.0)
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return {"rope_theta": theta}
    if kind != "llama3":
        raise WeightsError(f"{file}: rope type {kind!r} is not supported; only default and llama3")
    scaling = RopeScaling(
        factor=float(rope["factor"]),
        low_freq_factor=float(rope["low_freq_factor"]),
        high_freq_factor=float(rope["high_freq_factor"]),
        original_max_position=int(rope["original_max_position_embeddings"]),
    )
    return {"rope_theta": theta, "rope_scaling": scaling}


class _SafetensorsDir:
    """The safetensors of a directory, whole or in shards; one tensor is in memory at a time."""

    def __init__(self, path: Path):
        index = path / "model.safetensors.index.json"
        shards = [path / "model.safetensors"]
        if index.exists():
            shards = [path / name for name in sorted(set(_read_json(index)["weight_map"].values()))]
        self.path = path
        self._shards: dict[str, Any] = {}
        self._files: dict[str, Path] = {}
        for file in shards:
            if not file.exists():
                raise WeightsError(f"{file} is missing")
            try:
                shard = safe_open(file, framework="numpy")
            except (SafetensorError, OSError) as error:
                size = file.stat().st_size
                raise WeightsError(
                    f"{file} ({size} bytes) is no safetensors file or is truncated: {error}"
                ) from error
            self._shards |= dict.fromkeys(shard.keys(), shard)
            self._files |= dict.fromkeys(shard.keys(), file)

    def names(self) -> set[str]:
        # Old checkpoints also store the rotary frequencies, which follow from the configuration.
        return {name for name in self._shards if not name.endswith("rotary_emb.inv_freq")}

    def where(self, name: str) -> Path:
        return self._files.get(name, self.path)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._shards[name].get_slice(name).get_shape())

    def read(self, name: str) -> np.ndarray:
        return self._shards[name].get_tensor(name)


def load_params(
    path: str | Path, config: ModelConfig | None = None, dtype: Any = np.float32
) -> Params:
    """Parameters of a Hugging Face directory or GGUF file, as numpy arrays of `dtype`.

    The tree is that of `model.param_specs(config)`; `config` is read from the path when not given.
    Peak memory is the parameters and one tensor. Raises WeightsError for a file that is missing or
    truncated, and for a tensor that is missing, left over or of the wrong shape.
    """
    config = config or load_config(path)
    file = gguf_in(path)
    source = open_gguf(file) if file else _SafetensorsDir(Path(path))
    specs = param_specs(config)
    params: Params = {
        name: np.empty(spec.shape, dtype) for name, spec in specs.items() if name != "layers"
    }
    params["layers"] = {name: np.empty(s.shape, dtype) for name, s in specs["layers"].items()}

    left = source.names()
    for tensor in _tensors(config):
        name = tensor.gguf if file else tensor.hf
        if name not in left:
            raise WeightsError(
                f"{source.where(name)}: tensor {name} of shape {tensor.stored_shape} is missing"
            )
        left.discard(name)
        if source.shape(name) != tensor.stored_shape:
            raise WeightsError(
                f"{source.where(name)}: tensor {name} has shape {source.shape(name)}, "
                f"expected {tensor.stored_shape}"
            )
        values = source.read(name)
        values = (values.T if tensor.transposed else values).reshape(tensor.shape)
        if tensor.layer is None:
            params[tensor.param][...] = values
        else:
            params["layers"][tensor.param][tensor.layer] = values
    if config.tie_embeddings:
        left.discard(_TOP["lm_head"].hf)  # some checkpoints store the tied matrix twice
    if left:
        some = ", ".join(sorted(left)[:5])
        raise WeightsError(f"{path}: {len(left)} tensors have no place in the model: {some}")
    return params


def save_params(
    params: Params,
    config: ModelConfig,
    out_dir: str | Path,
    tokenizer: Any = None,
    dtype: str = "bfloat16",
    max_shard_bytes: float = 5e9,
    eos_token_ids: Sequence[int] = (),
    card: str = "",
) -> Path:
    """Writes a directory that `transformers` loads; returns its path.

    `params` may be numpy or (fully addressable) JAX arrays; `dtype` is "bfloat16" or "float32".
    `eos_token_ids` are where generation ends, by default the tokenizer's own; `card` becomes its
    README.md. The directory appears complete or not at all; one that holds files already is
    refused with FileExistsError.
    """
    out_dir = Path(out_dir)
    if dtype not in ("bfloat16", "float32"):
        raise ConfigError(f"dtype={dtype!r}: only 'bfloat16' and 'float32' can be written")
    if out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
        raise FileExistsError(f"{out_dir} exists and is not an empty directory")
    if not eos_token_ids and tokenizer is not None and tokenizer.eos_token_id is not None:
        eos_token_ids = (tokenizer.eos_token_id,)
    special = {
        "bos_token_id": getattr(tokenizer, "bos_token_id", None),
        "eos_token_id": [int(i) for i in eos_token_ids] or None,
        "pad_token_id": getattr(tokenizer, "pad_token_id", None),
    }
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    tmp = out_dir.with_name(f".{out_dir.name}.{os.getpid()}.tmp")
    shutil.rmtree(tmp, ignore_errors=True)  # of a killed process: containers reuse their ids
    tmp.mkdir()
    try:
        numpy_dtype = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
        _write_safetensors(params, config, tmp, numpy_dtype, max_shard_bytes)
        _write_json(tmp / "config.json", _hf_config(config, dtype) | special)
        _write_json(tmp / "generation_config.json", special)
        if tokenizer is not None:
            tokenizer.save_pretrained(tmp)
        if card:
            (tmp / "README.md").write_text(card, encoding="utf-8")
        tmp.replace(out_dir)
    except BaseException:
        shutil.rmtree(tmp, ignore_errors=True)
        raise
    return out_dir


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _hf_config(config: ModelConfig, dtype: str) -> dict[str, Any]:
    """config.json, its rope in the older spelling, which transformers 5 reads too."""
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


def _write_safetensors(
    params: Params, config: ModelConfig, folder: Path, dtype: np.dtype, max_shard_bytes: float
) -> None:
    """One file, or shards with an index; one shard is in memory at a time."""
    shards: list[list[_Tensor]] = [[]]
    size = 0
    for tensor in _tensors(config):
        nbytes = math.prod(tensor.shape) * dtype.itemsize
        if shards[-1] and size + nbytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += nbytes

    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = "model.safetensors"
        if len(shards) > 1:
            file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        weight_map |= dict.fromkeys((t.hf for t in shard), file)
        content = {t.hf: _stored(params, t, dtype) for t in shard}
        save_file(content, folder / file, metadata={"format": "pt"})
        (folder / file).chmod(0o644)  # as readable as its neighbours
    if len(shards) > 1:
        total = sum(math.prod(t.shape) for shard in shards for t in shard) * dtype.itemsize
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        _write_json(folder / "model.safetensors.index.json", index)


def _stored(params: Params, tensor: _Tensor, dtype: np.dtype) -> np.ndarray:
    """A parameter as a HF file holds it, cast and contiguous."""
    if tensor.layer is None:
        values = params[tensor.param]
    else:
        values = params["layers"][tensor.param][tensor.layer]
    values = np.asarray(values).astype(dtype)
    if values.shape != tensor.shape:
        raise ValueError(
            f"{tensor.param}: the parameters have shape {values.shape}, "
            f"their configuration says {tensor.shape}"
        )
    if tensor.transposed:
        values = values.reshape(tensor.stored_shape[::-1]).T
    return np.ascontiguousarray(values.reshape(tensor.stored_shape))
