"""Prompt lookup against a plain search in the text."""

import numpy as np
import pytest

from r1s_jax.rollout.lookup import lookup


def plain(text, count):
    """The tokens after the latest earlier place of the last three tokens, else of the last two."""
    for size in (3, 2):
        if len(text) <= size:
            continue
        for end in range(len(text) - 2, size - 2, -1):
            if text[end - size + 1 : end + 1] == text[-size:]:
                return (text[end + 1 : end + 1 + count] + [0] * count)[:count]
    return [0] * count


@pytest.mark.parametrize("count", [1, 3, 6])
def test_the_guess_follows_the_latest_earlier_occurrence(count):
    rng = np.random.default_rng(count)
    lengths = rng.integers(1, 30, 200)
    texts = rng.integers(1, 4, (200, 32)).astype(np.int32)
    texts[np.arange(32) >= lengths[:, None]] = 0
    guesses = np.asarray(lookup(texts, lengths.astype(np.int32), count))
    for row, length, guess in zip(texts.tolist(), lengths, guesses.tolist(), strict=True):
        assert guess == plain(row[:length], count), (row[:length], guess)
    assert (guesses > 0).any() and (guesses == 0).all(1).any()
