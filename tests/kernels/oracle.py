"""Attention in float64, one query at a time: the expected result of every backend."""

import numpy as np


def softmax_mix(q: np.ndarray, keys: np.ndarray, values: np.ndarray, scale: float) -> np.ndarray:
    """Attention of one query to some keys; zeros without keys."""
    if not len(keys):
        return np.zeros_like(q)
    scores = keys @ q * scale
    weights = np.exp(scores - scores.max())
    return weights @ values / weights.sum()


def attention_oracle(q, k, v, segments, scale, causal=True) -> np.ndarray:
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out, per_group = np.zeros_like(q), q.shape[2] // k.shape[2]
    for b, t, h in np.ndindex(q.shape[:3]):
        end = t + 1 if causal else q.shape[1]
        seen = np.flatnonzero((segments[b, :end] == segments[b, t]) & (segments[b, t] > 0))
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


def random_segments(rng, rows: int, length: int, padded: bool = True) -> np.ndarray:
    """Segment ids 1, 2, 3... along each row; some rows end in padding."""
    out = np.zeros((rows, length), np.int32)
    for row in out:
        end = rng.integers(1, length + 1) if padded else length
        cuts = np.sort(rng.integers(0, end, rng.integers(0, 5)))
        row[:end] = 1 + np.searchsorted(cuts, np.arange(end), side="right")
    return out
