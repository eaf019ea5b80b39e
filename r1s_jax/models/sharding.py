"""The mesh and the logical-axis rules; nothing else in the package names a mesh axis.

`data` replicates parameters, `fsdp` shards them for learning, `tensor` splits heads, feed-forward
and vocabulary. A batch is divided over data x fsdp.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from r1s_jax.config import Attention, Impl, MeshConfig, ModelConfig
from r1s_jax.io.errors import ConfigError
from r1s_jax.kernels.attention.api import attention, check_support, default_impl
from r1s_jax.kernels.tuning import Tuning, default_tuning
from r1s_jax.models.decoder import RowAttention
from r1s_jax.models.params import Params, ParamSpec, param_specs

BATCH_AXES = ("data", "fsdp")
TENSOR_AXIS = "tensor"

_LEARNING_RULES = {
    "embed": "fsdp",
    "vocab": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "layers": None,
    None: None,
}
# While sampling, every data shard works alone, so it holds its whole tensor slice.
_SAMPLING_RULES = {**_LEARNING_RULES, "embed": None}


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """A (data, fsdp, tensor) mesh over all devices; `fsdp=-1` takes all that remain.

    Raises ConfigError when the axes do not multiply to the number of devices, or where JAX is set
    to 64 bits.
    """
    if jax.config.jax_enable_x64:  # pyright: ignore[reportAttributeAccessIssue]  # defined at import
        raise ConfigError(
            "jax_enable_x64 is on: r1s_jax computes in 32 bits; unset JAX_ENABLE_X64, or call "
            "jax.config.update('jax_enable_x64', False)"
        )
    devices = jax.devices() if devices is None else devices
    rest = config.data * config.tensor
    fsdp = config.fsdp if config.fsdp != -1 else max(1, len(devices) // rest)
    if rest * fsdp != len(devices):
        raise ConfigError(
            f"mesh data={config.data} x fsdp={fsdp} x tensor={config.tensor} needs "
            f"{rest * fsdp} devices, {len(devices)} are here: set mesh.data, mesh.fsdp, mesh.tensor"
        )
    axes = ("data", "fsdp", "tensor")
    return jax.make_mesh(
        (config.data, fsdp, config.tensor), axes, axis_types=(AxisType.Auto,) * 3, devices=devices
    )


def check_divisible(config: ModelConfig, mesh: Mesh) -> None:
    """Raises ValueError when a sharded dimension of the model does not divide over the mesh."""
    tensor, fsdp = mesh.shape[TENSOR_AXIS], mesh.shape["fsdp"]
    dims = {
        "num_kv_heads": (config.num_kv_heads, "tensor", tensor),
        "num_heads": (config.num_heads, "tensor", tensor),
        "d_ff": (config.d_ff, "tensor", tensor),
        "vocab_size": (config.vocab_size, "tensor", tensor),
        "d_model": (config.d_model, "fsdp", fsdp),
    }
    for name, (size, axis, parts) in dims.items():
        if size % parts:
            raise ConfigError(f"{name}={size} does not divide over mesh.{axis}={parts}")


def param_partition(config: ModelConfig, *, sampling: bool = False) -> dict[str, Any]:
    """PartitionSpec of every parameter, for learning or for sampling."""
    rules = _SAMPLING_RULES if sampling else _LEARNING_RULES
    return jax.tree.map(
        lambda spec: P(*(rules[axis] for axis in spec.axes)),
        param_specs(config),
        is_leaf=lambda x: isinstance(x, ParamSpec),
    )


def sampling_partition(config: ModelConfig, *, unstacked: bool = False) -> dict[str, Any]:
    """PartitionSpec of every parameter while sampling; `unstacked`: after `unstack_layers`."""
    partition = param_partition(config, sampling=True)
    if not unstacked:
        return partition

    layer = {name: P(*spec[1:]) for name, spec in partition["layers"].items()}
    return partition | {"layers": [layer] * config.num_layers}


def param_shardings(config: ModelConfig, mesh: Mesh) -> dict[str, Any]:
    """NamedSharding of every parameter while learning."""
    return jax.tree.map(
        lambda spec: NamedSharding(mesh, spec),
        param_partition(config),
        is_leaf=lambda x: isinstance(x, P),
    )


def shard_params(params: Params, config: ModelConfig, mesh: Mesh) -> Params:
    """Places parameters on the mesh, sharded for learning."""
    check_divisible(config, mesh)
    return place(params, param_shardings(config, mesh))


def place(tree: Any, shardings: Any) -> Any:
    """Puts arrays, equal on every process, on the mesh; `shardings`: a tree, or one for all."""
    if jax.process_count() == 1:
        return jax.device_put(tree, shardings)

    def put(x: Any, sharding: NamedSharding) -> Array:
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(put(jax.random.key_data(x), sharding))
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    if isinstance(shardings, NamedSharding):
        return jax.tree.map(lambda x: put(x, shardings), tree)
    return jax.tree.map(put, tree, shardings)


def attention_impl(name: Attention, mesh: Mesh) -> Impl:
    """The attention backend that `policy.attention` selects on this mesh."""
    return default_impl(_platform(mesh)) if name == "auto" else name


def mesh_tuning(mesh: Mesh) -> Tuning:
    """How a decoder computes on this mesh, whatever its attention backend."""
    return default_tuning(_platform(mesh))


def _platform(mesh: Mesh) -> str:
    return mesh.devices.flat[0].platform


def check_attention(name: Attention, mesh: Mesh, model: ModelConfig, compute_dtype: Any) -> None:
    """Raises ConfigError where the attention backend does not serve this model in this dtype."""
    dtype = np.dtype(compute_dtype).name
    try:
        check_support(attention_impl(name, mesh), model.head_dim, {"policy.compute_dtype": dtype})
    except ValueError as error:
        raise ConfigError(f"policy.attention={name}: {error}; take another, or auto") from error


def row_attention(impl: Impl, mesh: Mesh) -> RowAttention:
    """Attention of whole rows while learning: each device computes its own rows and heads.

    It runs under `shard_map`, because XLA cannot partition a kernel by itself.
    """
    rows, heads = P(BATCH_AXES), P(BATCH_AXES, None, TENSOR_AXIS)

    def attend(q: Array, k: Array, v: Array, *, last_query: Array) -> Array:
        return jax.shard_map(
            lambda q, k, v, last: attention(q, k, v, last_query=last, impl=impl),
            mesh=mesh,
            in_specs=(heads, heads, heads, rows),
            out_specs=heads,
            check_vma=False,
        )(q, k, v, last_query)

    return attend


def batch_shards(mesh: Mesh) -> int:
    """The number of parts into which the mesh divides a batch."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Leading axis divided over data x fsdp."""
    return NamedSharding(mesh, P(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """The same on every device."""
    return NamedSharding(mesh, P())
