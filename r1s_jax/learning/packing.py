"""Packs several trajectories into one row, the beginning that they share only once.

Packing saves the padding of trajectories of different lengths, and computes a common beginning
(the instructions, a question with its first documents) once for all trajectories of a row
(Prefix Grouper, arXiv 2506.05433, for prompts). A token's entries (`weights`, ...) belong to the
token itself, which the model predicts at the position before.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Generic, NamedTuple

import numpy as np

from r1s_jax.config import Config
from r1s_jax.io.errors import ConfigError
from r1s_jax.rollout.trajectory import A


class Sizes(NamedTuple):
    """Sizes of packed rows."""

    capacity: int  # tokens of a row
    micro_batch_rows: int  # of all data shards
    sequences: int = 0  # a batch has room for so many, one a row, if it holds fewer


def row_length(config: Config) -> int:
    """Tokens of a packed row."""
    return config.optimizer.pack_length or config.rollout.max_length


class PackedBatch(NamedTuple, Generic[A]):
    """Micro-batches of packed rows: every array is [M, R, T] (micro-batch, row, token)."""

    tokens: A  # int32
    segment_ids: A  # int32, the trajectory of each token; 0 is padding
    positions: A  # int32, in the token's own trajectory
    last_query: A  # int32, last token of the row that attends to this one; -1 is padding
    weights: A  # float32, a token's share of the loss `rl`; 0 unless the policy wrote it
    advantages: A  # float32
    old_logprobs: A  # float32, when the token was sampled
    reference_logprobs: A  # float32, under the reference or teacher; 0 where there is none
    kl_weights: A  # float32, a token's share of the loss `ref_kl`; 0 where there is none
    ce_weights: A  # float32, a token's share of the loss `ce`; 0 where there is none
    fresh: A  # float32, 1 where this step's parameters sampled the token; for metrics
    kept: A  # int32[M, R, T, C], the nucleus that the token was drawn from (see sampler.Drawn)
    log_kept: A  # float32, log of the nucleus's probability under the learner, which fills it in


class Layout(NamedTuple):
    """Places of trajectories: trajectory i has the columns from `offset[i]` on of row `row[i]`.

    These are its tokens from `shared[i]` on; those before stand among trajectories to the left.
    """

    row: np.ndarray
    offset: np.ndarray
    shared: np.ndarray
    rows: int  # in use


class Beginnings(NamedTuple):
    """What N sequences may share: their tokens before the first trained one, but the last of these.

    The last one stays with each sequence because the model predicts the trained token there. A fork
    (see rollout/forks.py) shares also what its parent trains.
    """

    order: np.ndarray  # the sequences, sorted by their beginnings; forks follow their parents
    common: np.ndarray  # [N, N] number of leading tokens that two sequences share
    group: np.ndarray  # [N] equal for equal beginnings, if there is something to share

    @staticmethod
    def of(
        tokens: np.ndarray,
        lengths: np.ndarray,
        trained: np.ndarray,
        parents: np.ndarray | None = None,
    ) -> "Beginnings":
        """`tokens` and `trained` are [N, W]; `parents` int[N], -1: it is no fork."""
        first = np.where(trained.any(1), trained.argmax(1), lengths)
        starts = [row[: max(0, n - 1)] for row, n in zip(tokens, first, strict=True)]
        parents = np.full(len(starts), -1) if parents is None else parents
        texts = [row[:n] for row, n in zip(tokens, lengths, strict=True)]

        def path(i: int) -> tuple[int, ...]:
            """Sorts forks behind their parents, first those that share more."""
            if (parent := int(parents[i])) < 0:
                return (i,)
            return (*path(parent), -_common(texts[parent], starts[i]), i)

        paths = [path(i) for i in range(len(starts))]
        keys = [(starts[p[0]].astype(">i4").tobytes(), p) for p in paths]
        order = np.array(sorted(range(len(starts)), key=keys.__getitem__))
        steps = [
            _common(texts[i] if paths[i][0] == paths[j][0] else starts[i], starts[j])
            for i, j in pairwise(order)
        ]
        steps = np.array(steps, np.int64)
        size, n = np.array([len(s) for s in starts], np.int64), len(starts)
        common, group = np.zeros((n, n), np.int64), np.zeros(n, np.int64)
        for at, i in enumerate(order):
            # Two sequences share what all neighbours between them share.
            common[i, i] = size[i]
            common[i, order[at + 1 :]] = np.minimum.accumulate(steps[at:])
        common = np.maximum(common, common.T)
        same = (steps > 0) & (steps == size[order[1:]]) & (steps == size[order[:-1]])
        same |= (steps > 0) & (parents[order[1:]] >= 0)
        group[order[1:]] = np.cumsum(~same)
        return Beginnings(order, common, group)


def _common(a: np.ndarray, b: np.ndarray) -> int:
    n = min(len(a), len(b))
    differ = a[:n] != b[:n]
    return int(differ.argmax()) if differ.any() else n


def first_fit(
    lengths: Sequence[int] | np.ndarray, capacity: int, beginnings: Beginnings | None = None
) -> tuple[np.ndarray, int]:
    """The row of each sequence, and the number of rows: first-fit decreasing.

    Sequences of equal beginnings are placed one after another. Each goes to the row that already
    holds most of it, or to the first; without anything in common, the rows are within 11/9 of the
    fewest. Raises ConfigError when a length exceeds `capacity`.
    """
    size = np.asarray(lengths, np.int64)
    n = len(size)
    group = np.arange(n) if beginnings is None else beginnings.group
    longest = np.zeros(n, np.int64)
    np.maximum.at(longest, group, size)
    row, used = np.zeros(n, np.int64), np.zeros(n, np.int64)
    held = np.zeros((n, n), np.int64)  # [row, sequence]: tokens of the sequence in the row
    rows = 0
    for i in np.lexsort((-size, group, -longest[group])):
        if size[i] > capacity:
            raise ConfigError(
                f"a sequence of {size[i]} tokens does not fit into packed rows of {capacity}: "
                "raise optimizer.pack_length"
            )
        fits = used[:rows] + size[i] - held[:rows, i] <= capacity
        r = int(np.where(fits, held[:rows, i], -1).argmax()) if fits.any() else rows
        rows = max(rows, r + 1)
        row[i], used[r] = r, used[r] + size[i] - held[r, i]
        if beginnings is not None:
            held[r] = np.maximum(held[r], beginnings.common[i])
    return row, rows


def pack(
    tokens: np.ndarray,
    lengths: np.ndarray,
    weights: np.ndarray,
    advantages: np.ndarray,
    old_logprobs: np.ndarray,
    reference_logprobs: np.ndarray | None = None,
    kl_weights: np.ndarray | None = None,
    ce_weights: np.ndarray | None = None,
    fresh: np.ndarray | None = None,
    kept: np.ndarray | None = None,
    parents: np.ndarray | None = None,
    *,
    capacity: int,
    micro_batch_rows: int,
    sequences: int = 0,
) -> tuple[PackedBatch[np.ndarray], Layout, int]:
    """Packs N sequences ([N, W] arrays, `lengths` int[N]) into micro-batches.

    Returns the batch, its layout and the number of micro-batches that are not empty. The batch has
    enough micro-batches of `micro_batch_rows` rows for one sequence a row, and for `sequences` of
    them, whatever is packed, so that the update compiles once. Sequences share a beginning up to
    the token before the first that has a weight; `parents` int[N] are those of forks, or -1.
    """
    streams = [w for w in (weights, kl_weights, ce_weights) if w is not None]
    trained = np.any([w > 0 for w in streams], axis=0)
    beginnings = Beginnings.of(tokens, lengths, trained, parents)
    layout, last = _place(*first_fit(lengths, capacity, beginnings), lengths, capacity, beginnings)
    micro = -(-layout.rows // micro_batch_rows)
    most = max(len(lengths), sequences)
    split = (-(-most // micro_batch_rows), micro_batch_rows, capacity)
    shape = (split[0] * micro_batch_rows, capacity)
    segment_ids, positions = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    last_query = np.full(shape, -1, np.int32)
    last_query[: layout.rows] = last
    sources = {"tokens": tokens, "weights": weights, "advantages": advantages}
    sources |= {"old_logprobs": old_logprobs, "reference_logprobs": reference_logprobs}
    sources |= {"kl_weights": kl_weights, "ce_weights": ce_weights, "fresh": fresh}
    packed: dict[str, np.ndarray] = {
        name: np.zeros(shape, np.int32 if name == "tokens" else np.float32) for name in sources
    }
    sources["kept"] = kept
    packed["kept"] = np.full((*shape, 0 if kept is None else kept.shape[2]), -1, np.int32)
    for i, cut, own in _places(layout, lengths):
        segment_ids[cut] = i + 1
        positions[cut] = np.arange(own.start, own.stop)
        for name, source in sources.items():
            if source is not None:
                packed[name][cut] = source[i, own]
    batch = PackedBatch(
        segment_ids=segment_ids,
        positions=positions,
        last_query=last_query,
        log_kept=np.zeros(shape, np.float32),
        **packed,
    )
    return PackedBatch(*(a.reshape(split + a.shape[2:]) for a in batch)), layout, micro


def _place(
    row: np.ndarray, rows: int, lengths: np.ndarray, capacity: int, beginnings: Beginnings
) -> tuple[Layout, np.ndarray]:
    """The layout, and `last_query` int[rows, capacity].

    A row's sequences stand in the order of their beginnings, so that those with a common beginning
    are neighbours, and each leaves out what it shares with the one before.
    """
    offset, shared = np.zeros_like(row), np.zeros_like(row)
    last_query = np.full((rows, capacity), -1)
    for r in range(rows):
        columns, end, before = np.zeros(capacity, np.int64), 0, -1
        for i in beginnings.order[row[beginnings.order] == r].tolist():
            begin, known = end, 0 if before < 0 else int(beginnings.common[before, i])
            offset[i], shared[i], before = begin, known, i
            end += int(lengths[i]) - known
            columns[known : lengths[i]] = np.arange(begin, end)
            last_query[r, columns[: lengths[i]]] = end - 1
    return Layout(row, offset, shared, rows), last_query


def _places(layout: Layout, lengths: np.ndarray) -> Iterator[tuple[int, tuple[int, slice], slice]]:
    """Each sequence, its place [row, columns], and which of its tokens stand there."""
    for i, n in enumerate(lengths):
        begin = layout.offset[i]
        columns = slice(begin, begin + n - layout.shared[i])
        yield i, (layout.row[i], columns), slice(layout.shared[i], n)


def unpack(packed: np.ndarray, layout: Layout, lengths: np.ndarray, width: int) -> np.ndarray:
    """Undoes `pack` for one array of values: [M, R, T] -> [N, width].

    The values of a shared beginning are those of one of its sequences; the others have zeros there.
    """
    rows = packed.reshape(-1, packed.shape[-1])
    out = np.zeros((len(lengths), width), packed.dtype)
    for i, cut, own in _places(layout, lengths):
        out[i, own] = rows[cut]
    return out
