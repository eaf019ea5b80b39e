"""The BERT encoder (Devlin et al., 2018), as used by sentence encoders such as MiniLM, E5 and BGE.

One forward pass serves two engines. On JAX it is jitted, with the layers under `lax.scan`, for
bulk encoding. On NumPy it needs no device, for queries that arrive while the device is busy.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import msgspec
import numpy as np
import scipy.special
from flax import nnx
from jaxtyping import Bool, Float, Int
from safetensors.numpy import load_file

from r1s_jax.io.errors import BadInput, ConfigError, reading, shorten
from r1s_jax.io.json import read_object
from r1s_jax.io.schema import check

Array = jax.Array | np.ndarray
Weights = Mapping[str, Array]


Size = Annotated[int, msgspec.Meta(ge=1, le=2**20)]


class _BertFile(msgspec.Struct):
    """The fields of `config.json` that are read here."""

    num_hidden_layers: Annotated[int, msgspec.Meta(ge=1, le=1024)]
    num_attention_heads: Annotated[int, msgspec.Meta(ge=1, le=1024)]
    hidden_size: Size
    max_position_embeddings: Size
    layer_norm_eps: Annotated[float, msgspec.Meta(gt=0, le=0.1)]


@dataclass(frozen=True)
class BertConfig:
    """The shape of a model, from its `config.json`."""

    layers: int
    heads: int
    dims: int
    positions: int
    norm_epsilon: float

    @classmethod
    def load(cls, directory: Path) -> "BertConfig":
        """Raises ValueError where the model is not a BERT with exact GELU."""
        path = directory / "config.json"
        raw = read_object(path)
        for key, ours in (
            ("model_type", "bert"),
            ("hidden_act", "gelu"),
            ("position_embedding_type", "absolute"),
        ):
            if raw.get(key, ours) != ours:
                value = shorten(repr(raw[key]), 60)
                raise ConfigError(f"{path}: {key} is {value}; only {ours!r} is supported")
        fields = check(raw, _BertFile, path)
        if fields.hidden_size % fields.num_attention_heads:
            raise ConfigError(f"{path}: hidden_size is not a multiple of num_attention_heads")
        return cls(
            layers=fields.num_hidden_layers,
            heads=fields.num_attention_heads,
            dims=fields.hidden_size,
            positions=fields.max_position_embeddings,
            norm_epsilon=fields.layer_norm_eps,
        )


class Engine(NamedTuple):
    """The functions of an array library that the forward pass uses."""

    xp: ModuleType
    erf: Callable[[Array], Array]
    scan: Callable[..., tuple[Array, None]]


def _loop(body: Callable, carry: Array, stacked: Weights) -> tuple[Array, None]:
    """`lax.scan` without outputs, as a Python loop."""
    for i in range(len(next(iter(stacked.values())))):
        carry, _ = body(carry, {name: value[i] for name, value in stacked.items()})
    return carry, None


JAX = Engine(jnp, jax.scipy.special.erf, jax.lax.scan)
NUMPY = Engine(np, scipy.special.erf, _loop)

# Stacked parameter -> its name under `encoder.layer.{i}.` in a checkpoint.
_LAYER_NAMES = {
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "attention_out": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "mlp_in": "intermediate.dense",
    "mlp_out": "output.dense",
    "mlp_norm": "output.LayerNorm",
}
_EMBEDDING_NAMES = {
    "words": "word_embeddings.weight",
    "positions": "position_embeddings.weight",
    "types": "token_type_embeddings.weight",
    "norm.weight": "LayerNorm.weight",
    "norm.bias": "LayerNorm.bias",
}


class BertWeights(NamedTuple):
    """Parameters by name: embeddings, and layer parameters stacked over a leading axis.

    Dense weights are [in, out], so that `x @ weight` applies them.
    """

    embeddings: Weights
    layers: Weights


def load_weights(directory: Path, config: BertConfig) -> BertWeights:
    """Reads `model.safetensors` (with or without a `bert.` prefix) as float32 on the host.

    Raises BadInput, naming the file, for a missing tensor, another shape, NaN or infinity.
    """
    path = directory / "model.safetensors"
    with reading(path):
        weights = _load_weights(load_file(path), config)
    _check_weights(path, weights, config)
    return weights


def _check_weights(path: Path, weights: BertWeights, config: BertConfig) -> None:
    words, positions = weights.embeddings["words"], weights.embeddings["positions"]
    mlp = weights.layers["mlp_in.weight"].shape[-1]
    wide = {"mlp_in.weight": (config.dims, mlp), "mlp_in.bias": (mlp,)}
    wide |= {"mlp_out.weight": (mlp, config.dims)}
    for name, value in weights.layers.items():
        square = name.endswith(".weight") and "norm" not in name
        shape = wide.get(name, (config.dims, config.dims) if square else (config.dims,))
        if value.shape != (config.layers, *shape):
            raise BadInput(f"{path}: {name} has shape {value.shape[1:]}, not {shape}")
    if words.shape[1:] != (config.dims,) or positions.shape != (config.positions, config.dims):
        raise BadInput(f"{path}: the embeddings do not have the shapes that config.json states")
    for name, value in (*weights.embeddings.items(), *weights.layers.items()):
        if not np.isfinite(value).all():
            raise BadInput(f"{path}: {name} holds NaN or infinity")


def _load_weights(tensors: Weights, config: BertConfig) -> BertWeights:
    tensors = {name.removeprefix("bert."): value for name, value in tensors.items()}

    def stacked(name: str, part: str) -> np.ndarray:
        values = [tensors[f"encoder.layer.{i}.{name}.{part}"] for i in range(config.layers)]
        value = np.stack(values).astype(np.float32)
        return np.ascontiguousarray(value.swapaxes(1, 2)) if value.ndim == 3 else value

    embeddings = {
        ours: tensors[f"embeddings.{theirs}"].astype(np.float32)
        for ours, theirs in _EMBEDDING_NAMES.items()
    }
    layers = {
        f"{ours}.{part}": stacked(theirs, part)
        for ours, theirs in _LAYER_NAMES.items()
        for part in ("weight", "bias")
    }
    return BertWeights(embeddings, layers)


def bert(
    weights: BertWeights,
    ids: Int[Array, "batch time"],
    mask: Bool[Array, "batch time"],
    config: BertConfig,
    engine: Engine = JAX,
) -> Float[Any, "batch time dims"]:
    """The last hidden states of a batch; `mask` is True at real tokens. Computes in float32."""
    xp = engine.xp
    table = weights.embeddings
    x = table["words"][ids] + table["positions"][: ids.shape[1]] + table["types"][0]
    x = _norm(xp, x, table, "norm", config.norm_epsilon)
    bias = xp.where(mask, 0.0, -1e9).astype(x.dtype)[:, None, None, :]

    def layer(x: Array, w: Weights) -> tuple[Array, None]:
        x = _norm(xp, x + _attention(xp, x, bias, w, config), w, "attention_norm", eps)
        hidden = _dense(x, w, "mlp_in")
        hidden = hidden * (0.5 + 0.5 * engine.erf(hidden * math.sqrt(0.5)))
        return _norm(xp, x + _dense(hidden, w, "mlp_out"), w, "mlp_norm", eps), None

    eps = config.norm_epsilon
    return engine.scan(layer, x, weights.layers)[0]


def _attention(xp: ModuleType, x: Array, bias: Array, w: Weights, config: BertConfig) -> Array:
    def by_head(name: str) -> Array:  # [batch, time, dims] -> [batch, heads, time, head_dim]
        return _dense(x, w, name).reshape(*x.shape[:2], config.heads, -1).swapaxes(1, 2)

    scale = math.sqrt(config.heads / config.dims)
    scores = by_head("query") @ by_head("key").swapaxes(2, 3) * scale + bias
    scores = xp.exp(scores - scores.max(-1, keepdims=True))
    scores = scores / scores.sum(-1, keepdims=True)
    return _dense((scores @ by_head("value")).swapaxes(1, 2).reshape(x.shape), w, "attention_out")


def _dense(x: Array, w: Weights, name: str) -> Array:
    return x @ w[f"{name}.weight"] + w[f"{name}.bias"]


def _norm(xp: ModuleType, x: Array, w: Weights, name: str, epsilon: float) -> Array:
    x = x - x.mean(-1, keepdims=True)
    x = x / xp.sqrt((x * x).mean(-1, keepdims=True) + epsilon)
    return x * w[f"{name}.weight"] + w[f"{name}.bias"]


class Bert(nnx.Module):
    """`bert` on JAX, with its parameters placed as `sharding` says."""

    def __init__(self, config: BertConfig, weights: BertWeights, sharding: jax.sharding.Sharding):
        self.config = config
        self.embeddings, self.layers = (
            nnx.Dict({name: nnx.Param(jax.device_put(v, sharding)) for name, v in group.items()})
            for group in weights
        )

    def __call__(
        self, ids: Int[jax.Array, "batch time"], mask: Bool[jax.Array, "batch time"]
    ) -> Float[jax.Array, "batch time dims"]:
        groups = (
            {name: param[...] for name, param in group.items()}
            for group in (self.embeddings, self.layers)
        )
        return bert(BertWeights(*groups), ids, mask, self.config)
