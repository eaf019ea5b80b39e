"""Low-rank adapters (LoRA, arXiv 2106.09685): a weight W trained as W + scale * A B, W frozen.

Sampling and learning both compute x W + scale * (x A) B. A sum W + A B in bfloat16 would lose every
update below half of W's last digit. A layer's parameters hold A and B beside W, as `{W}_lora_a` and
`{W}_lora_b`.
"""

from typing import Any

import jax
import jax.numpy as jnp

Params = dict[str, Any]

# The weight matrices of a layer; each may have adapters.
MATRICES = ("wq", "wk", "wv", "wo", "w_gate", "w_up", "w_down")
_A, _B = "_lora_a", "_lora_b"


def adapter_entries(layer: dict[str, tuple], rank: int) -> dict[str, tuple]:
    """(shape, axes, gain) of each adapter, from those of the layer's weights; B starts at 0."""
    entries = {}
    for name in MATRICES:
        shape, axes, _ = layer[name]
        inputs = 2 if axes[0] == "heads" else 1  # wo reads heads x head width
        entries[name + _A] = ((*shape[:inputs], rank), (*axes[:inputs], None), 1.0)
        entries[name + _B] = ((rank, *shape[inputs:]), (None, *axes[inputs:]), 0.0)
    return entries


def is_adapter(name: str) -> bool:
    """Whether a parameter of this name belongs to an adapter."""
    return name.endswith((_A, _B))


def adapters_of(w: Params, name: str) -> tuple[Any, Any] | None:
    """A and B of one weight of a layer; None where it has none."""
    return (w[name + _A], w[name + _B]) if name + _A in w else None


def merge_layer(w: Params, scale: float) -> Params:
    """A layer's weights with its adapters added; weights without adapters are unchanged."""
    merged = {name: p for name, p in w.items() if not is_adapter(name)}
    for name in merged:
        if name + _A in w:
            product = jnp.tensordot(w[name + _A], w[name + _B], 1, precision="highest")
            merged[name] = w[name].astype(product.dtype) + scale * product
    return merged


def merge_adapters(params: Params, scale: float) -> Params:
    """All parameters with the adapters added, in the weights' own dtype."""
    if not any(map(is_adapter, params["layers"])):
        return params
    layers = jax.vmap(lambda w: merge_layer(w, scale))(params["layers"])
    layers = {name: p.astype(params["layers"][name].dtype) for name, p in layers.items()}
    return params | {"layers": layers}


def trainable(params: Params) -> Params:
    """The parameters that learning changes: the adapters if there are any, else all.

    `params` may be any tree of the same structure (their shardings, say).
    """
    adapters = {name: p for name, p in params.get("layers", {}).items() if is_adapter(name)}
    return {"layers": adapters} if adapters else params


def combine(params: Params, trained: Params) -> Params:
    """`params` with `trained` (of the structure that `trainable` returns) replacing their own."""
    if trained.keys() == params.keys():
        return trained
    return params | {"layers": params["layers"] | trained["layers"]}
