"""Which tokens of a packed row see each other, and which blocks of them meet.

A row is a forest laid out depth first: sequences that begin alike share their beginning, which
stands once, before everything that continues it. So the queries that see a key are contiguous:
query t sees key s where s <= t <= last_query[s]. Padding has -1: nothing sees it.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


def seen_keys(last_query: Int[Array, "B T"]) -> Bool[Array, "B T T"]:
    """Whether query t (the second axis) sees key s (the last)."""
    index = jnp.arange(last_query.shape[1])
    return (index <= index[:, None]) & (index[:, None] <= last_query[:, None])


def meeting_blocks(last_query: Int[Array, "B T"], queries: int, keys: int) -> Bool[Array, "B I J"]:
    """Whether any of the `queries` queries of block i sees any of the `keys` keys of block j."""
    batch, length = last_query.shape
    begin, last = jnp.arange(0, length, keys), last_query.reshape(batch, -1, keys).max(-1)
    query = jnp.arange(0, length, queries)[:, None]
    return (begin < query + queries) & (last[:, None] >= query)


def visits(meets: Bool[Array, "*B I J"]) -> tuple[Int[Array, "*B I"], Int[Array, "*B I J"]]:
    """How many blocks j meet block i, and these blocks in order, followed by the others."""
    order = jnp.argsort(~meets, axis=-1, stable=True)
    return meets.sum(-1).astype(jnp.int32), order.astype(jnp.int32)
