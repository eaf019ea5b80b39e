import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r1s_jax.rollout.sampler import (
    invert_cdf,
    nucleus_threshold,
    sample,
    sample_each,
    trajectory_keys,
)

threshold_of = jax.jit(nucleus_threshold)
draw_token = jax.jit(invert_cdf)
draw_sample = jax.jit(sample, static_argnames=("temperature", "top_p"))
BELOW_ONE = np.nextafter(np.float32(1), np.float32(0))


def log_softmax(logits: np.ndarray) -> np.ndarray:
    x = logits.astype(np.float64)
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def nucleus(probs: np.ndarray, top_p: float) -> np.ndarray:
    """Mask of the smallest set of likeliest tokens with mass top_p; includes all ties."""
    likeliest = np.sort(probs.astype(np.float64))[::-1]
    size = int((np.cumsum(likeliest) < top_p).sum()) + 1
    return probs >= likeliest[min(size, len(probs)) - 1]


def random_logits(rows: int, vocab: int, scale: float = 3.0, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (scale * rng.normal(size=(rows, vocab))).astype(np.float32)


@pytest.mark.parametrize("top_p", [1 / 64, 0.25, 0.5, 0.75, 61 / 64, 63 / 64])
@pytest.mark.parametrize("vocab", [5, 300])
def test_nucleus_equals_that_of_a_sort(vocab, top_p):
    """Probabilities are multiples of 1/1024: exact sums, many ties, some zeros."""
    rng = np.random.default_rng(vocab)
    shares = rng.dirichlet(np.full(vocab, 0.5), size=32)
    probs = np.stack([rng.multinomial(1024, s) for s in shares]).astype(np.float32) / 1024
    threshold = np.asarray(threshold_of(jnp.asarray(probs), top_p))
    for row, t in zip(probs, threshold, strict=True):
        np.testing.assert_array_equal(row >= t, nucleus(row, top_p))


def test_nucleus_of_equal_probabilities_is_all_tokens():
    probs = jnp.full((1, 64), 1 / 64)
    for top_p in (0.01, 0.5, 0.99):
        assert threshold_of(probs, top_p)[0] == 1 / 64


@pytest.mark.parametrize("top_p", [0.1, 0.8, 0.95, 0.9999])
def test_nucleus_of_real_probabilities_is_the_smallest_that_suffices(top_p):
    probs = np.asarray(jax.nn.softmax(jnp.asarray(random_logits(16, 1000)), axis=-1))
    threshold = np.asarray(threshold_of(jnp.asarray(probs), top_p))
    for row, t in zip(probs.astype(np.float64), threshold, strict=True):
        assert t in row.astype(np.float32)
        assert row[row >= t].sum() >= top_p - 1e-6
        assert row[row > t].sum() < top_p + 1e-6


@pytest.mark.parametrize("vocab", [3, 128, 300])
def test_tokens_are_drawn_as_often_as_they_are_likely(vocab):
    """Evenly spaced uniforms must hit every token in proportion, up to one draw at each end."""
    draws = 1 << 14
    probs = np.exp(log_softmax(random_logits(1, vocab, 1.5)))[0]
    probs[:: max(2, vocab // 7)] = 0  # zeros at the front, too
    uniform = (np.arange(draws, dtype=np.float32) + 0.5) / draws
    rows = jnp.broadcast_to(jnp.asarray(3 * probs, jnp.float32), (draws, vocab))
    counts = np.bincount(np.asarray(draw_token(rows, jnp.asarray(uniform))), minlength=vocab)
    expected = draws * probs / probs.sum()
    assert np.abs(counts - expected).max() <= 1.1
    assert not counts[probs == 0].any()


def test_random_draws_pass_a_chi_square_test():
    draws, logits = 20000, random_logits(1, 40, 1.0)
    uniform = jax.random.uniform(jax.random.key(3), (draws,))
    rows = jnp.broadcast_to(jnp.asarray(logits), (draws, 40))
    token, *_ = draw_sample(rows, uniform, temperature=1.0, top_p=1.0)
    expected = draws * np.exp(log_softmax(logits))[0]
    statistic = ((np.bincount(np.asarray(token), minlength=40) - expected) ** 2 / expected).sum()
    assert statistic < 39 + 4 * np.sqrt(2 * 39)


@pytest.mark.parametrize("uniform", [0.0, 1e-30, 0.5, float(BELOW_ONE)])
@pytest.mark.parametrize("only", [0, 1, 127, 128, 200, 299])
def test_the_only_possible_token_is_drawn(only, uniform):
    probs = jnp.zeros((1, 300)).at[0, only].set(0.3)
    assert draw_token(probs, jnp.array([uniform], jnp.float32))[0] == only


def test_no_impossible_token_is_drawn_at_the_edges_of_blocks():
    """Rounding of a uniform near a block's edge must not select a token without mass."""
    rng = np.random.default_rng(0)
    vocab, rows = 128 * 24, 64
    probs = rng.random((rows, vocab)).astype(np.float32) ** 4
    probs.reshape(rows, -1, 128)[:, :, :5] = 0
    probs.reshape(rows, -1, 128)[:, :, -5:] = 0
    blocks = probs.reshape(rows, -1, 128).sum(-1, dtype=np.float64)
    edges = np.cumsum(blocks, -1) / blocks.sum(-1, keepdims=True)
    draw = jax.jit(jax.vmap(invert_cdf, in_axes=(None, 1)))
    near = np.arange(-12, 13)[:, None] * np.float32(2.0**-25)
    for block in range(edges.shape[1]):
        uniform = np.clip(edges[:, block].astype(np.float32) + near, 0, BELOW_ONE).astype(
            np.float32
        )
        token = np.asarray(draw(jnp.asarray(probs), jnp.asarray(uniform.T)))
        assert (probs[np.arange(rows), token] > 0).all()


@pytest.mark.parametrize(
    ("temperature", "top_p"), [(1.0, 1.0), (1.0, 0.95), (0.5, 0.6), (2.0, 0.6), (2.0, 1.0)]
)
def test_both_log_probabilities(temperature, top_p):
    logits = random_logits(64, 500)
    uniform = jax.random.uniform(jax.random.key(0), (64,))
    drawn = draw_sample(logits, uniform, temperature=temperature, top_p=top_p)
    token, sample_logprob, policy_logprob, kept, log_kept = map(np.asarray, drawn)
    tempered = np.exp(log_softmax(logits / temperature))
    for i, t in enumerate(token):
        in_nucleus = nucleus(tempered[i], top_p)
        assert in_nucleus[t]
        expected = np.log(tempered[i, t] / tempered[i, in_nucleus].sum())
        np.testing.assert_allclose(sample_logprob[i], expected, atol=2e-5)
        np.testing.assert_allclose(policy_logprob[i], log_softmax(logits)[i, t], atol=2e-5)
        recorded = 0 < in_nucleus.sum() <= kept.shape[1]
        assert set(kept[i][kept[i] >= 0]) == set(np.flatnonzero(in_nucleus) if recorded else ())
        mass = np.exp(log_softmax(logits)[i, in_nucleus]).sum() if recorded else 1.0
        np.testing.assert_allclose(log_kept[i], np.log(mass), atol=2e-5)
    if top_p == 0.6 and temperature == 0.5:
        assert ((kept >= 0).any(-1)).all(), "the case has nuclei that are small enough"
    assert top_p == 1 or kept.shape == (64, 32)


def test_temperature_changes_the_distribution():
    draws = 4096
    logits = jnp.broadcast_to(jnp.array([0.0, 1.0, 3.0]), (draws, 3))
    uniform = (jnp.arange(draws) + 0.5) / draws
    for temperature in (0.5, 4.0):
        token, *_ = draw_sample(logits, uniform, temperature=temperature, top_p=1.0)
        share = np.bincount(np.asarray(token), minlength=3) / draws
        expected = np.exp(log_softmax(np.array([0.0, 1.0, 3.0]) / temperature))
        np.testing.assert_allclose(share, expected, atol=1e-3)


def test_greedy_takes_the_likeliest_whatever_the_uniform():
    logits = random_logits(32, 700)
    uniform = jnp.linspace(0, BELOW_ONE, 32)
    token, sample_logprob, policy_logprob, *_ = draw_sample(
        logits, uniform, temperature=0, top_p=0.95
    )
    np.testing.assert_array_equal(token, logits.argmax(-1))
    np.testing.assert_array_equal(sample_logprob, 0)
    np.testing.assert_allclose(policy_logprob, log_softmax(logits).max(-1), atol=2e-5)


@pytest.mark.parametrize("vocab", [156, 300])
@pytest.mark.parametrize("temperature", [1e-6, 1e-9, 1e-12, 1e-30, 1e-39])
def test_a_temperature_close_to_zero_is_greedy(vocab, temperature):
    logits, uniform = random_logits(8, vocab, scale=20), jnp.full(8, 0.5)
    each = [jnp.full(8, value, jnp.float32) for value in (temperature, 0.9)]
    drawn = [
        draw_sample(logits, uniform, temperature=temperature, top_p=1.0),
        jax.jit(sample_each)(logits, uniform, *each),
    ]
    for token, sample_logprob, *_ in drawn:
        np.testing.assert_array_equal(token, logits.argmax(-1))
        np.testing.assert_array_equal(sample_logprob, 0)


def keys(seed: int, step: int, pairs: list[tuple[int, int]], occurrence: int = 0) -> np.ndarray:
    questions, samples = map(jnp.array, zip(*pairs, strict=True))
    again = jnp.full(len(pairs), occurrence)
    return np.asarray(jax.random.key_data(trajectory_keys(seed, step, questions, samples, again)))


def test_a_key_depends_on_seed_step_question_and_sample_alone():
    pairs = [(q, s) for q in (3, 0, 2**31 - 1) for s in range(4)]
    together = keys(5, 7, pairs)
    order = np.random.default_rng(0).permutation(len(pairs))
    np.testing.assert_array_equal(keys(5, 7, [pairs[i] for i in order]), together[order])
    np.testing.assert_array_equal(keys(5, 7, pairs[6:7]), together[6:7])


def test_keys_differ_in_each_of_seed_step_question_and_sample():
    pairs = [(q, s) for q in range(4) for s in range(4)]
    every = np.concatenate(
        [keys(*at, pairs, again) for at in np.ndindex(3, 3) for again in range(3)]
    )
    assert len(np.unique(every, axis=0)) == len(every)


def test_a_question_seen_once_has_unchanged_keys():
    base = jax.random.fold_in(jax.random.key(5), 7)
    first = jax.random.fold_in(jax.random.fold_in(base, 3), 1)
    np.testing.assert_array_equal(keys(5, 7, [(3, 1)])[0], jax.random.key_data(first))
