"""Checksums of arrays, which detect damage to checkpoints and tell one state from another."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from r1s_jax.io.seals import digest

State = Any  # a pytree of arrays, such as a learner's state

# Elements that `host_checksum` takes at a time: their intermediates fit into a core's cache.
_CHUNK = 1 << 16
_BLOCK, _LANES = 1 << 18, 1 << 10  # elements of a block, and partial sums
# Odd, so that multiplication by them is invertible (golden ratio; murmur3's finalizer).
_PLACE, _FIRST, _SECOND = (np.uint32(n) for n in (0x9E3779B1, 0x85EBCA6B, 0xC2B2AE35))


def checksums(state: State) -> dict[str, int]:
    """For each array, the sum of its elements' bits, each mixed with its place in the array.

    One changed element always changes the sum; so do elements or rows that swap places, except once
    in 2^32. Integer sums are equal on every mesh, so a state may be restored onto another mesh.
    """
    leaves, _ = jax.tree_util.tree_flatten_with_path(state)
    arrays = [leaf for _, leaf in leaves]
    sums = _sums(arrays, tuple(_on_one_device(x) for x in arrays))
    names = [jax.tree_util.keystr(path) for path, _ in leaves]
    return {name: int(value) for name, value in zip(names, sums, strict=True)}


def _on_one_device(x: Any) -> bool:
    return not isinstance(x, Array) or len(x.sharding.device_set) == 1


def state_digests(sums: Mapping[str, int]) -> dict[str, str]:
    """A digest of the parameters and one of the optimizer's state, from their checksums."""
    parts = {"params": ".params", "optimizer": ".optimizer"}
    return {
        part: digest({name: n for name, n in sums.items() if name.startswith(start)})
        for part, start in parts.items()
    }


@jax.jit(static_argnums=1)
def _sums(arrays: list[Array], whole: tuple[bool, ...]) -> list[Array]:
    """The checksums; `whole` tells of each array whether one device has all of it."""
    return [
        _in_blocks(x) if one_device and _BLOCK < x.size < 2**31 else _by_dimension(x)
        for x, one_device in zip(arrays, whole, strict=True)
    ]


def _by_dimension(x: Array) -> Array:
    """Places are counted by dimension, so that each device counts those of its own shard."""
    place, stride = jnp.zeros(x.shape, jnp.uint32), 1
    for axis in reversed(range(x.ndim)):
        step = jnp.uint32(stride & 0xFFFFFFFF)
        place += jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis) * step
        stride *= x.shape[axis]
    return _mixed(_bits(x), place * _PLACE).sum(dtype=jnp.uint32)


def _in_blocks(x: Array) -> Array:
    """Block by block, so that no array as large as `x` is made: six times as fast on CPUs.

    A place within `x` must fit into int32.
    """
    flat = x.reshape(-1)
    place = jnp.arange(_BLOCK, dtype=jnp.uint32) * _PLACE

    def add(i: Array, total: Array) -> Array:
        bits = _bits(jax.lax.dynamic_slice(flat, (i * _BLOCK,), (_BLOCK,)))
        offset = i.astype(jnp.uint32) * np.uint32(_BLOCK * int(_PLACE) & 0xFFFFFFFF)
        mixed = _mixed(bits, place + offset)
        return total + mixed.reshape(-1, _LANES).sum(0, dtype=jnp.uint32)

    blocks = flat.size // _BLOCK
    total = jax.lax.fori_loop(0, blocks, add, jnp.zeros(_LANES, jnp.uint32))
    rest = jnp.arange(blocks * _BLOCK, flat.size, dtype=jnp.uint32) * _PLACE
    return total.sum(dtype=jnp.uint32) + _mixed(_bits(flat[blocks * _BLOCK :]), rest).sum(
        dtype=jnp.uint32
    )


def _bits(x: Array) -> Array:
    return jax.lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}").astype(jnp.uint32)


def host_checksum(x: np.ndarray) -> int:
    """The checksum of one array, without a device: all parameters may not fit on one."""
    flat = np.ascontiguousarray(x).reshape(-1).view(f"uint{8 * x.dtype.itemsize}")
    places, total = np.arange(min(_CHUNK, flat.size), dtype=np.uint32) * _PLACE, 0
    for start in range(0, flat.size, _CHUNK):
        bits = flat[start : start + _CHUNK].astype(np.uint32)
        offset = np.uint32(start * int(_PLACE) & 0xFFFFFFFF)
        total += int(_mixed(bits, places[: bits.size] + offset).sum(dtype=np.uint64))
    return total & 0xFFFFFFFF


def _mixed(bits: Any, place: Any) -> Any:
    """Mixes every bit of both; at one place, different bits give different results."""
    mixed = (bits ^ place) * _FIRST
    mixed = (mixed ^ (mixed >> 15)) * _SECOND
    return mixed ^ (mixed >> 13)
