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
def test_sequences_neither_overlap_nor_overflow(lengths):
    layout = first_fit(lengths, CAPACITY)
    uses = np.zeros((layout.rows, CAPACITY), int)
    for row, offset, length in zip(layout.row, layout.offset, lengths, strict=True):
        assert offset + length <= CAPACITY
        uses[row, offset : offset + length] += 1
    assert uses.sum() == sum(lengths)
    assert (uses <= 1).all()
    assert not len(lengths) or (layout.row < layout.rows).all()


@given(ragged)
@settings(deadline=None)
def test_few_rows_are_used(lengths):
    """No two rows fit into one."""
    layout = first_fit(lengths, CAPACITY)
    used = np.bincount(layout.row, weights=lengths, minlength=layout.rows)
    assert (used > 0).all()
    pairs = used[:, None] + used[None, :] + np.diag(np.full(layout.rows, np.inf))
    assert (pairs > CAPACITY).all()


def test_a_sequence_of_the_full_length_has_a_row_of_its_own():
    layout = first_fit([CAPACITY, 3, CAPACITY], CAPACITY)
    assert layout.rows == 3 and len(set(layout.row)) == 3


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


@given(ragged)
@settings(deadline=None)
def test_segment_ids_separate_sequences_and_positions_restart(lengths):
    batch, _, _ = pack_all(lengths)
    segments = batch.segment_ids.reshape(-1, CAPACITY)
    positions = batch.positions.reshape(-1, CAPACITY)
    assert set(segments.flat) - {0} == set(range(1, len(lengths) + 1))
    for i, length in enumerate(lengths):
        row, column = np.nonzero(segments == i + 1)
        assert len(set(row)) == 1
        np.testing.assert_array_equal(column, column[0] + np.arange(length))
        np.testing.assert_array_equal(positions[row, column], np.arange(length))
    assert (segments == 0).sum() == segments.size - sum(lengths)
    assert not positions[segments == 0].any()


def test_shapes_do_not_depend_on_the_lengths():
    short, _, few = pack_all([2] * 7)
    long, _, many = pack_all([CAPACITY] * 7)
    assert (few, many) == (1, 4)
    for a, b in zip(short, long, strict=True):
        assert a.shape == b.shape == (4, 2, CAPACITY)
    assert not any(a[few:].any() for a in short)
    assert pack_all([2] * 7, max_micro=1)[0].tokens.shape == (1, 2, CAPACITY)
