"""Packs several trajectories into one row, separated by segment ids.

Packing saves the padding of trajectories of different lengths. A token's entries (`weights`, ...)
belong to the token itself, which the model predicts at the position before.
"""

from collections.abc import Sequence
from typing import Generic, NamedTuple

import numpy as np

from r1s_jax.io.errors import ConfigError
from r1s_jax.rollout.trajectory import A


class PackedBatch(NamedTuple, Generic[A]):
    """Micro-batches of packed rows: every array is [M, R, T] (micro-batch, row, token)."""

    tokens: A  # int32
    segment_ids: A  # int32, 0 is padding
    positions: A  # int32, restarting in each segment
    weights: A  # float32, a token's share of the loss; 0 unless the policy wrote it
    advantages: A  # float32
    old_logprobs: A  # float32, when the token was sampled
    reference_logprobs: A  # float32, under the frozen reference; 0 where there is none
    kl_weights: A  # float32, a token's share of a KL in the loss; 0 where there is none
    fresh: A  # float32, 1 where this step's parameters sampled the token; for metrics


class Layout(NamedTuple):
    """Places of trajectories: `row[i]` and `offset[i]` of each, and the number of rows used."""

    row: np.ndarray
    offset: np.ndarray
    rows: int


def first_fit(lengths: Sequence[int], capacity: int) -> Layout:
    """First-fit decreasing: within 11/9 of the fewest rows.

    Raises ConfigError when a length exceeds `capacity`.
    """
    row, offset = np.zeros(len(lengths), np.int64), np.zeros(len(lengths), np.int64)
    used: list[int] = []
    for i in np.argsort(-np.asarray(lengths), kind="stable"):
        if lengths[i] > capacity:
            raise ConfigError(
                f"a sequence of {lengths[i]} tokens does not fit into packed rows of {capacity}: "
                "raise optimizer.pack_length"
            )
        r = next((r for r, n in enumerate(used) if n + lengths[i] <= capacity), len(used))
        if r == len(used):
            used.append(0)
        row[i], offset[i] = r, used[r]
        used[r] += lengths[i]
    return Layout(row, offset, len(used))


def pack(
    tokens: np.ndarray,
    lengths: np.ndarray,
    weights: np.ndarray,
    advantages: np.ndarray,
    old_logprobs: np.ndarray,
    reference_logprobs: np.ndarray | None = None,
    kl_weights: np.ndarray | None = None,
    fresh: np.ndarray | None = None,
    *,
    capacity: int,
    micro_batch_rows: int,
    max_micro: int | None = None,
) -> tuple[PackedBatch[np.ndarray], Layout, int]:
    """Packs N sequences ([N, W] arrays, `lengths` int[N]) into micro-batches.

    Returns the batch, its layout and the number of micro-batches that are not empty. The batch has
    `max_micro` micro-batches of `micro_batch_rows` rows (by default enough for one sequence a row)
    whatever is packed, so that the update compiles once.
    """
    layout = first_fit(np.asarray(lengths).tolist(), capacity)
    micro = -(-layout.rows // micro_batch_rows)
    max_micro = max_micro or -(-len(lengths) // micro_batch_rows)
    shape = (max_micro * micro_batch_rows, capacity)
    segment_ids, positions = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    sources = {"tokens": tokens, "weights": weights, "advantages": advantages}
    sources |= {"old_logprobs": old_logprobs, "reference_logprobs": reference_logprobs}
    sources |= {"kl_weights": kl_weights, "fresh": fresh}
    packed = {
        name: np.zeros(shape, np.int32 if name == "tokens" else np.float32) for name in sources
    }
    for i, n in enumerate(lengths):
        r, cut = layout.row[i], slice(layout.offset[i], layout.offset[i] + n)
        segment_ids[r, cut] = i + 1
        positions[r, cut] = np.arange(n)
        for name, source in sources.items():
            if source is not None:
                packed[name][r, cut] = source[i, :n]
    batch = PackedBatch(segment_ids=segment_ids, positions=positions, **packed)
    split = (max_micro, micro_batch_rows, capacity)
    return PackedBatch(*(a.reshape(split) for a in batch)), layout, micro


def unpack(packed: np.ndarray, layout: Layout, lengths: np.ndarray, width: int) -> np.ndarray:
    """Undoes `pack` for one array of values: [M, R, T] -> [N, width]."""
    rows = packed.reshape(-1, packed.shape[-1])
    out = np.zeros((len(lengths), width), packed.dtype)
    for i, n in enumerate(lengths):
        out[i, :n] = rows[layout.row[i], layout.offset[i] : layout.offset[i] + n]
    return out
