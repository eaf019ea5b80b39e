"""Speculative tokens from a trajectory's own text, which often quotes its prompt and documents.

Prompt lookup decoding (Saxena 2023): if the last tokens occurred before, the tokens that followed
then are proposed again. A speculative token costs one position of the forward pass that verifies
it.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int


def lookup(
    tokens: Int[Array, "S W"], lengths: Int[Array, " S"], count: int
) -> Int[Array, "S {count}"]:
    """The tokens after the latest earlier occurrence of a row's last three tokens, or last two.

    0 without an earlier occurrence, and past the row's `lengths`.
    """
    width = tokens.shape[1]
    at = jnp.arange(width)

    def back(steps: int) -> Int[Array, " S 1"]:
        place = jnp.maximum(lengths - 1 - steps, 0)[:, None]
        return jnp.take_along_axis(tokens, place, axis=1)

    def same(steps: int) -> Array:
        """Columns whose token `steps` before equals the row's token `steps` before its end."""
        shifted = jnp.pad(tokens, ((0, 0), (steps, 0)), constant_values=-1)[:, :width]
        return shifted == back(steps)

    two = same(0) & same(1) & (at < lengths[:, None] - 1)
    rank = jnp.where(two, at + width * (same(2) & two), -1)
    best = rank.max(axis=1)
    place = (best % width)[:, None] + 1 + jnp.arange(count)
    valid = (best[:, None] >= 0) & (place < lengths[:, None])
    proposed = jax.vmap(lambda row, i: row.at[i].get(mode="fill", fill_value=0))(tokens, place)
    return jnp.where(valid, proposed, 0)
