"""Guessing the next tokens from a trajectory's own text: prompt and documents are often quoted.

Prompt lookup decoding (Saxena 2023): where the last tokens stood before, what followed them there
may follow again. A guess costs nothing but its place in a forward pass, which verifies it.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int


def lookup(
    tokens: Int[Array, "S W"], lengths: Int[Array, " S"], count: int
) -> Int[Array, "S {count}"]:
    """The tokens that followed the latest place where a row's last three, or two, stood before.

    0 where there is none, and past the row's `lengths`.
    """
    width = tokens.shape[1]
    at = jnp.arange(width)

    def back(steps: int) -> Int[Array, " S 1"]:
        place = jnp.maximum(lengths - 1 - steps, 0)[:, None]
        return jnp.take_along_axis(tokens, place, axis=1)

    def same(steps: int) -> Array:
        """Where the token so many steps before is the one so many steps before the end."""
        shifted = jnp.pad(tokens, ((0, 0), (steps, 0)), constant_values=-1)[:, :width]
        return shifted == back(steps)

    two = same(0) & same(1) & (at < lengths[:, None] - 1)
    rank = jnp.where(two, at + width * (same(2) & two), -1)
    best = rank.max(axis=1)
    place = (best % width)[:, None] + 1 + jnp.arange(count)
    known = (best[:, None] >= 0) & (place < lengths[:, None])
    found = jax.vmap(lambda row, i: row.at[i].get(mode="fill", fill_value=0))(tokens, place)
    return jnp.where(known, found, 0)
