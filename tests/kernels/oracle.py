"""Attention in float64, one query at a time: the expected result of every backend."""

import numpy as np


def softmax_mix(q: np.ndarray, keys: np.ndarray, values: np.ndarray, scale: float) -> np.ndarray:
    """Attention of one query to some keys; zeros without keys."""
    if not len(keys):
        return np.zeros_like(q)
    scores = keys @ q * scale
    weights = np.exp(scores - scores.max())
    return weights @ values / weights.sum()


def attention_oracle(q, k, v, last_query, scale) -> np.ndarray:
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out, per_group = np.zeros_like(q), q.shape[2] // k.shape[2]
    for b, t, h in np.ndindex(q.shape[:3]):
        seen = np.flatnonzero(last_query[b, : t + 1] >= t)
        n = h // per_group
        out[b, t, h] = softmax_mix(q[b, t, h], k[b, seen, n], v[b, seen, n], scale)
    return out


def decode_oracle(q, k, v, layer, lengths, scale) -> np.ndarray:
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out, per_group = np.zeros_like(q), q.shape[2] // k.shape[2]
    for b, t, h in np.ndindex(q.shape[:3]):
        seen = max(0, lengths[b] - q.shape[1] + t + 1)
        n = h // per_group
        out[b, t, h] = softmax_mix(q[b, t, h], k[layer, b, n, :seen], v[layer, b, n, :seen], scale)
    return out


def normal(rng, *shape) -> np.ndarray:
    return rng.normal(size=shape).astype(np.float32)


def random_qkv(rows, length, heads, kv_heads, head_dim, seed=0):
    rng = np.random.default_rng(seed)
    k, v = (normal(rng, rows, length, kv_heads, head_dim) for _ in "kv")
    return normal(rng, rows, length, heads, head_dim), k, v


def random_cache(layers, rows, kv_heads, capacity, head_dim, new, heads, seed=0):
    rng = np.random.default_rng(seed)
    k, v = (normal(rng, layers, rows, kv_heads, capacity, head_dim) for _ in "kv")
    return normal(rng, rows, new, heads, head_dim), k, v


def whole_rows(rows: int, length: int) -> np.ndarray:
    """`last_query` of rows of one sequence each."""
    return np.full((rows, length), length - 1, np.int32)


def in_parts(lengths, padding: int = 0) -> np.ndarray:
    """`last_query` of one row of sequences one after another, then padding."""
    ends = np.repeat(np.cumsum(lengths) - 1, lengths)
    return np.concatenate([ends, np.full(padding, -1)])[None].astype(np.int32)


def random_trees(rng, rows: int, length: int, depth: int = 3) -> np.ndarray:
    """`last_query` of rows of random trees: sequences share beginnings that share beginnings.

    Some rows end in padding.
    """
    out = np.full((rows, length), -1, np.int32)

    def fill(row: np.ndarray, begin: int, end: int, depth: int) -> None:
        cuts = np.sort(rng.integers(begin, end + 1, rng.integers(0, 4)))
        for a, b in zip([begin, *cuts], [*cuts, end], strict=True):
            stem = rng.integers(a, b + 1) if depth > 1 else b
            row[a:stem] = b - 1
            if stem < b:
                fill(row, stem, b, depth - 1)

    for row in out:
        fill(row, 0, rng.integers(1, length + 1), depth)
    return out
