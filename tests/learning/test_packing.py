import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from r1s_jax.learning.packing import first_fit, pack, unpack

CAPACITY, WIDTH = 16, 20
ragged = st.lists(st.integers(1, CAPACITY), min_size=1, max_size=14)


def random_batch(lengths, seed: int = 0):
    """Four [N, W] arrays; values past the end of a sequence must have no effect."""
    rng = np.random.default_rng(seed)
    shape = (len(lengths), WIDTH)
    tokens = rng.integers(1, 1000, shape).astype(np.int32)
    return tokens, *(rng.normal(size=shape).astype(np.float32) for _ in range(3))


@given(st.lists(st.integers(0, CAPACITY), max_size=30))
@settings(deadline=None)
def test_few_rows_are_used_and_none_overflows(lengths):
    """No two rows fit into one."""
    row, rows = first_fit(lengths, CAPACITY)
    used = np.bincount(row, weights=lengths, minlength=rows)
    assert len(used) == rows and (used <= CAPACITY).all()
    assert (used > 0).all() or not all(lengths)
    pairs = used[:, None] + used[None, :] + np.diag(np.full(rows, np.inf))
    assert (pairs > CAPACITY).all()


def test_a_sequence_of_the_full_length_has_a_row_of_its_own():
    row, rows = first_fit([CAPACITY, 3, CAPACITY], CAPACITY)
    assert rows == 3 and len(set(row)) == 3


@pytest.mark.parametrize("call", [first_fit, lambda n, c: pack_all(n, capacity=c)])
def test_a_sequence_that_is_too_long_is_refused(call):
    with pytest.raises(ValueError, match=r"17 tokens .* rows of 16: raise optimizer.pack_length"):
        call([3, 17], CAPACITY)


def pack_all(lengths, **options):
    options = dict(capacity=CAPACITY, micro_batch_rows=2) | options
    return pack(random_batch(lengths)[0], np.array(lengths), *random_batch(lengths)[1:], **options)


@given(ragged, st.integers(1, 3))
@settings(deadline=None)
def test_values_stay_with_their_tokens_and_unpack_unchanged(lengths, micro_batch_rows):
    arrays = random_batch(lengths)
    inside = np.arange(WIDTH) < np.array(lengths)[:, None]
    batch, layout, micro = pack_all(lengths, micro_batch_rows=micro_batch_rows)
    names = ("tokens", "weights", "advantages", "old_logprobs")
    for name, array in zip(names, arrays, strict=True):
        packed = getattr(batch, name)
        assert packed.dtype == array.dtype
        np.testing.assert_array_equal(
            unpack(packed, layout, np.array(lengths), WIDTH), np.where(inside, array, 0)
        )
        assert not packed[batch.segment_ids == 0].any()
    rows = {name: getattr(batch, name).reshape(-1, CAPACITY) for name in names}
    for i, length in enumerate(lengths):
        for t in range(length):
            at = layout.row[i], layout.offset[i] + t
            assert [rows[name][at] for name in names] == [array[i, t] for array in arrays]
    assert micro == math.ceil(layout.rows / micro_batch_rows)


@st.composite
def alike(draw):
    """Tokens, lengths and weights of sequences over two letters, so that many begin alike."""
    lengths = np.array(draw(ragged))
    seed = draw(st.integers(0, 1000))
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, 2, (len(lengths), WIDTH)).astype(np.int32)
    first = rng.integers(0, WIDTH, (len(lengths), 1))
    weights = (np.arange(WIDTH) >= first) & (rng.random(tokens.shape) < 0.7)
    return tokens, lengths, (weights & (np.arange(WIDTH) < lengths[:, None])).astype(np.float32)


@given(alike(), st.integers(CAPACITY, 64), st.integers(1, 3))
@settings(deadline=None)
def test_each_sequence_attends_to_itself_alone(batch, capacity, micro_batch_rows):
    """The tokens that a sequence's last one sees are the whole sequence, in order."""
    tokens, lengths, weights = batch
    packed, layout, micro = pack(
        tokens, lengths, weights, weights, weights,
        capacity=capacity, micro_batch_rows=micro_batch_rows,
    )  # fmt: skip
    rows = {name: a.reshape(-1, capacity) for name, a in packed._asdict().items()}
    used = (rows["segment_ids"] > 0).sum(1)[: layout.rows]
    pairs = used[:, None] + used[None, :] + np.diag(np.full(layout.rows, np.inf))
    assert (pairs > capacity).all(), "no two rows fit into one"
    assert micro == math.ceil(layout.rows / micro_batch_rows)
    for i, n in enumerate(lengths):
        row, end = layout.row[i], layout.offset[i] + n - layout.shared[i]
        last = rows["last_query"][row]
        seen = np.flatnonzero(last[:end] >= end - 1)
        np.testing.assert_array_equal(rows["tokens"][row, seen], tokens[i, :n])
        np.testing.assert_array_equal(rows["positions"][row, seen], np.arange(n))
        own = seen[layout.shared[i] :]
        np.testing.assert_array_equal(own, np.arange(layout.offset[i], end))
        np.testing.assert_array_equal(rows["segment_ids"][row, own], i + 1)
        np.testing.assert_array_equal(rows["weights"][row, own], weights[i, layout.shared[i] : n])
        # What predicts a trained token is the sequence's own.
        assert not weights[i, : layout.shared[i] + 1].any() or not layout.shared[i]
    real = rows["segment_ids"] > 0
    assert real.sum() == (lengths - layout.shared).sum()
    assert (rows["last_query"][~real] == -1).all()
    assert (rows["last_query"][real] >= np.nonzero(real)[1]).all()


def test_without_a_common_beginning_the_longest_come_first():
    """Sequences of which nothing can be shared do not stay together as samples of a question do."""
    lengths = np.array([16, 5, 5, 5, 11, 11, 11])
    tokens = np.arange(len(lengths) * WIDTH).reshape(-1, WIDTH).astype(np.int32)
    first = np.where(lengths == 11, 6, 0)[:, None]  # the others are trained from the start
    inside = np.arange(WIDTH) < lengths[:, None]
    weights = ((np.arange(WIDTH) >= first) & inside).astype(np.float32)
    _, layout, _ = pack(
        tokens, lengths, weights, weights, weights, capacity=CAPACITY, micro_batch_rows=1
    )
    assert layout.rows == 4


def test_samples_of_a_question_share_its_prompt_in_every_row():
    """Two groups of four: [1, 2, 3, 4, 5] and [1, 2, 9, 4, 5] before five tokens of their own."""
    rng = np.random.default_rng(0)
    prompts = np.repeat([[1, 2, 3, 4, 5], [1, 2, 9, 4, 5]], 4, axis=0)
    tokens = np.column_stack([prompts, rng.integers(10, 1000, (8, 5))]).astype(np.int32)
    weights = np.broadcast_to((np.arange(10) >= 5).astype(np.float32), tokens.shape)

    def used(capacity: int) -> list[int]:
        shuffled = rng.permutation(8)
        packed, layout, _ = pack(
            tokens[shuffled], np.full(8, 10), weights, weights, weights,
            capacity=capacity, micro_batch_rows=1,
        )  # fmt: skip
        return (packed.segment_ids.reshape(-1, capacity) > 0).sum(1)[: layout.rows].tolist()

    # Four of a prompt's tokens are shared; the fifth predicts the first trained token.
    assert used(28) == [4 + 4 * 6] * 2
    assert used(80) == [2 + 2 * (2 + 4 * 6)], "two questions share their first two tokens"
    assert used(16) == [4 + 2 * 6] * 4, "rows too short repeat the prompt once each"


def test_shapes_do_not_depend_on_the_lengths():
    short, _, few = pack_all([2] * 7)
    long, _, many = pack_all([CAPACITY] * 7)
    assert (few, many) == (1, 4)
    for a, b in zip(short, long, strict=True):
        assert a.shape == b.shape and a.shape[:3] == (4, 2, CAPACITY)
    assert (short.last_query[few:] == -1).all()
    rest = short._replace(last_query=short.tokens)
    assert not any(a[few:].any() for a in rest)
