"""The parameter tree of a decoder: its shapes, logical axes and random initialisation.

Parameters are a plain nested dict, the pytree that crosses every jit boundary; `layers` holds the
layers' parameters, stacked.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from r1s_jax.config import ModelConfig
from r1s_jax.models.lora import Params, adapter_entries, is_adapter


class ParamSpec(NamedTuple):
    """Shape, logical axes (see sharding.py) and initial scale of one parameter."""

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    std: float | None  # None: all ones (a norm's gain)


def param_specs(config: ModelConfig) -> dict[str, Any]:
    """The parameter tree of `config`, a `ParamSpec` at each leaf."""
    c = config
    layer = {
        "attn_norm": ((c.d_model,), (None,), None),
        "wq": ((c.d_model, c.num_heads, c.head_dim), ("embed", "heads", None), 1.0),
        "wk": ((c.d_model, c.num_kv_heads, c.head_dim), ("embed", "kv_heads", None), 1.0),
        "wv": ((c.d_model, c.num_kv_heads, c.head_dim), ("embed", "kv_heads", None), 1.0),
        "wo": ((c.num_heads, c.head_dim, c.d_model), ("heads", None, "embed"), c.num_layers),
        "mlp_norm": ((c.d_model,), (None,), None),
        "w_gate": ((c.d_model, c.d_ff), ("embed", "mlp"), 1.0),
        "w_up": ((c.d_model, c.d_ff), ("embed", "mlp"), 1.0),
        "w_down": ((c.d_ff, c.d_model), ("mlp", "embed"), c.num_layers),
    }
    if c.qkv_bias:
        layer["bq"] = ((c.num_heads, c.head_dim), ("heads", None), 0.0)
        layer["bk"] = ((c.num_kv_heads, c.head_dim), ("kv_heads", None), 0.0)
        layer["bv"] = ((c.num_kv_heads, c.head_dim), ("kv_heads", None), 0.0)
    if c.qk_norm:
        layer["q_norm"] = ((c.head_dim,), (None,), None)
        layer["k_norm"] = ((c.head_dim,), (None,), None)
    if c.lora_rank:
        layer |= adapter_entries(layer, c.lora_rank)

    def spec(shape: tuple, axes: tuple, gain: float | None) -> ParamSpec:
        # 1/sqrt(fan in); the two projections that add to the residual also shrink with depth.
        fan_in = shape[0] * shape[1] if axes[0] == "heads" else shape[0]
        std = None if gain is None else (gain and (fan_in * (2 * gain if gain > 1 else 1)) ** -0.5)
        return ParamSpec((c.num_layers, *shape), ("layers", *axes), std)

    specs: dict[str, Any] = {
        "embed": ParamSpec((c.vocab_size, c.d_model), ("vocab", "embed"), c.d_model**-0.5),
        "layers": {name: spec(*entry) for name, entry in layer.items()},
        "final_norm": ParamSpec((c.d_model,), (None,), None),
    }
    if not c.tie_embeddings:
        specs["lm_head"] = ParamSpec((c.d_model, c.vocab_size), ("embed", "vocab"), c.d_model**-0.5)
    return specs


def init_params(config: ModelConfig, seed: int, dtype: Any = jnp.float32) -> Params:
    """Random parameters of `config`; equal seeds give equal parameters. Adapters are float32."""
    return _draw(param_specs(config), seed, dtype)


def add_adapters(params: Params, config: ModelConfig, seed: int) -> Params:
    """`params` with new float32 adapters as in `config`; the policy's output is unchanged."""
    specs = {n: s for n, s in param_specs(config)["layers"].items() if is_adapter(n)}
    return params | {"layers": params["layers"] | _draw(specs, seed, jnp.float32)}


def _draw(specs: dict[str, Any], seed: int, dtype: Any) -> Params:
    named, treedef = jax.tree_util.tree_flatten_with_path(
        specs, is_leaf=lambda x: isinstance(x, ParamSpec)
    )
    keys = jax.random.split(jax.random.key(seed), len(named))

    def leaf(path: tuple, spec: ParamSpec, key: Array) -> Array:
        leaf_dtype = jnp.float32 if is_adapter(path[-1].key) else dtype
        if spec.std is None:
            return jnp.ones(spec.shape, leaf_dtype)
        return (spec.std * jax.random.normal(key, spec.shape)).astype(leaf_dtype)

    leaves = [leaf(path, spec, key) for (path, spec), key in zip(named, keys, strict=True)]
    return jax.tree.unflatten(treedef, leaves)


def as_computed(params: Params, dtype: Any) -> Params:
    """Casts `params`, of a whole model or of a layer, to the forward pass's `dtype`.

    The gains of norms keep their own dtype: norms are computed in float32. Sampling and learning
    both read parameters through this function, so they compute with the same numbers.
    """

    def cast(path: tuple, p: Array) -> Array:
        return p if path[-1].key.endswith("norm") else p.astype(dtype)

    return jax.tree_util.tree_map_with_path(cast, params)


def unstack_layers(params: Params) -> Params:
    """The same parameters with a list of layers.

    For sampling on a CPU: there a scan copies every layer's weights out of their stack at every
    step, and reading weights dominates a decode step.
    """
    layers = params["layers"]
    count = len(layers["attn_norm"])
    return params | {"layers": [{n: w[i] for n, w in layers.items()} for i in range(count)]}
