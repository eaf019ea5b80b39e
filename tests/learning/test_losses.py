"""The losses against float64, token by token."""

from functools import partial

import jax
import numpy as np
import pytest

from r1s_jax.config import AlgorithmConfig
from r1s_jax.learning.losses import clipped_loss, likelihood_loss, policy_loss
from r1s_jax.learning.packing import PackedBatch


def random_rows(
    spread: float = 0.3, seed: int = 0, kl: float = 0.0
) -> tuple[np.ndarray, np.ndarray, PackedBatch]:
    rng = np.random.default_rng(seed)
    shape = (2, 40)
    weights = rng.uniform(0.1, 1, shape) * (rng.random(shape) < 0.6)
    old = rng.normal(-2, 1, shape)
    arrays = dict(weights=weights, advantages=rng.normal(size=shape), old_logprobs=old)
    arrays |= dict(reference_logprobs=rng.normal(-2, 1, shape), kl_weights=kl * weights)
    arrays |= dict(ce_weights=0 * weights, fresh=rng.random(shape) < 0.7)
    zeros = np.zeros(shape, np.int32)
    batch = PackedBatch(
        tokens=zeros,
        segment_ids=zeros + 1,
        positions=zeros,
        last_query=zeros,
        kept=np.zeros((*shape, 0), np.int32),
        log_kept=np.zeros(shape, np.float32),
        **{name: a.astype(np.float32) for name, a in arrays.items()},
    )
    logprobs = (old + rng.normal(0, spread, shape)).astype(np.float32)
    return logprobs, batch


def oracle(config, logprobs, batch):
    """The loss, and the number of tokens without a gradient because of the clip."""
    loss, outside = 0.0, 0
    for at in np.ndindex(batch.weights.shape):
        if batch.weights[at] > 0:
            ratio, advantage = np.exp(logprobs[at] - batch.old_logprobs[at]), batch.advantages[at]
            high = config.clip_high or config.clip
            gain = min(ratio * advantage, min(max(ratio, 1 - config.clip), 1 + high) * advantage)
            # Beyond the bound at which the clipped objective stays constant.
            outside += ratio > 1 + high if advantage > 0 else ratio < 1 - config.clip
            if config.dual_clip and advantage < 0:
                gain = max(gain, config.dual_clip * advantage)
            loss -= batch.weights[at] * gain
        if batch.kl_weights[at] > 0:
            gap = batch.reference_logprobs[at] - logprobs[at]
            estimate = gap**2 / 2 if config.kl_estimator == "k2" else np.exp(gap) - gap - 1
            loss += batch.kl_weights[at] * estimate
    return loss, outside


CONFIGS = {
    "narrow": AlgorithmConfig(clip=0.1),
    "wide": AlgorithmConfig(clip=0.5),
    "asymmetric": AlgorithmConfig(clip=0.2, clip_high=0.28),
    "dual": AlgorithmConfig(clip=0.2, dual_clip=1.5),
    "kl": AlgorithmConfig(kl_coefficient=0.1, kl_penalty="loss", kl_estimator="k3"),
    "reverse kl": AlgorithmConfig(kl_coefficient=0.1, kl_penalty="loss", kl_estimator="k2"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_the_policy_loss_agrees_with_float64(name):
    config = CONFIGS[name]
    logprobs, batch = random_rows(spread=1.0, kl=config.kl_coefficient)
    exact = PackedBatch(*(a.astype(np.float64) for a in batch))
    expected, outside = oracle(config, logprobs.astype(np.float64), exact)
    loss, metrics = policy_loss(config)(logprobs, batch)
    np.testing.assert_allclose(loss, expected, rtol=1e-6, atol=1e-6)
    trained = batch.weights > 0
    gaps = np.abs(logprobs - batch.old_logprobs)
    np.testing.assert_allclose(metrics["ratio_drift"], gaps[trained].sum(), rtol=1e-5)
    gaps = gaps[trained & (batch.fresh > 0)]
    assert metrics["fresh"] == len(gaps) < trained.sum()
    assert 0 < outside == metrics["clip_fraction"]
    np.testing.assert_allclose(metrics["logprob_diff_mean"], gaps.sum(), rtol=1e-5)
    np.testing.assert_allclose(metrics["logprob_diff_max"], gaps.max(), rtol=1e-5)


@pytest.mark.parametrize("name", ["asymmetric", "dual", "kl", "reverse kl"])
def test_each_option_makes_a_difference(name):
    config = CONFIGS[name]
    logprobs, batch = random_rows(spread=1.0, kl=config.kl_coefficient)
    plain = clipped_loss(0.2, logprobs, batch._replace(kl_weights=0 * batch.weights))[0]
    assert abs(policy_loss(config)(logprobs, batch)[0] - plain) > 1e-3


def test_the_first_gradient_is_that_of_reinforce():
    """At ratio 1 nothing is clipped: the gradient is weight times advantage."""
    logprobs, batch = random_rows()
    batch = batch._replace(old_logprobs=logprobs)
    gradient = jax.grad(lambda x: clipped_loss(0.2, x, batch)[0])(logprobs)
    np.testing.assert_allclose(gradient, -batch.weights * batch.advantages, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("loss", [partial(clipped_loss, 0.2), likelihood_loss])
def test_tokens_of_weight_0_have_no_effect(loss):
    logprobs, batch = random_rows()
    masked = batch.weights == 0
    value, _ = loss(logprobs, batch)
    gradient = np.asarray(jax.grad(lambda x: loss(x, batch)[0])(logprobs))
    assert not gradient[masked].any() and gradient[~masked].any()
    other = batch._replace(
        advantages=np.where(masked, 1e6, batch.advantages),
        old_logprobs=np.where(masked, -np.inf, batch.old_logprobs),
    )
    moved = np.where(masked, logprobs - 50, logprobs)
    assert loss(moved, other)[0] == value
    again = jax.grad(lambda x: loss(x, other)[0])(moved)
    np.testing.assert_array_equal(again, gradient)


def test_likelihood_loss_is_the_weighted_negative_log_likelihood():
    logprobs, batch = random_rows()
    expected = -(batch.weights.astype(np.float64) * logprobs).sum()
    np.testing.assert_allclose(likelihood_loss(logprobs, batch)[0], expected, rtol=1e-5)


# Each other loss in a few lines of float64, sequence by sequence.


def sequences(batch: PackedBatch):
    """(row, positions) of the trained tokens of every sequence."""
    for row, ids in enumerate(batch.segment_ids):
        for number in np.unique(ids[ids > 0]):
            places = np.flatnonzero((ids == number) & (batch.weights[row] > 0))
            if len(places):
                yield row, places


def gain_of(config: AlgorithmConfig, log_ratio, advantage, logprob, old):
    """The objective of a sequence's tokens."""
    low, high = config.clip, config.clip_high or config.clip
    if config.loss == "clip":
        ratio = np.exp(log_ratio)
        return np.minimum(ratio * advantage, np.clip(ratio, 1 - low, 1 + high) * advantage)
    if config.loss == "dppo":
        left = (np.exp(old + log_ratio) - np.exp(old)) * np.sign(advantage) > low
        return np.where(left, 0, np.minimum(np.exp(log_ratio), 20)) * advantage * logprob
    if config.loss == "gspo":
        s = np.exp(log_ratio.mean())
        return np.minimum(s * advantage, np.clip(s, 1 - low, 1 + high) * advantage)
    if config.loss == "cispo":
        return np.minimum(np.exp(log_ratio), 1 + high) * advantage * logprob
    if config.loss == "gmpo":
        limited = np.where(advantage > 0, np.minimum(log_ratio, high), np.maximum(log_ratio, -low))
        return np.exp(limited.mean()) * advantage
    return advantage * logprob


def sequence_oracle(config: AlgorithmConfig, logprobs, batch, fixed=None) -> float:
    """`fixed` are the log-probabilities that CISPO and DPPO treat as constants."""

    def wide(array):
        return np.asarray(array, np.float64)

    loss = 0.0
    for row, at in sequences(batch):
        weights, new = wide(batch.weights[row, at]), wide(logprobs[row, at])
        old = wide(batch.old_logprobs[row, at])
        log_ratio = ratios = new - old
        if config.loss in ("cispo", "dppo") and fixed is not None:
            ratios = wide(fixed[row, at]) - old
        advantage = wide(batch.advantages[row, at])
        masked = config.sequence_mask and abs(np.exp(log_ratio.mean()) - 1) > config.sequence_mask
        if not masked:
            loss -= (weights * gain_of(config, ratios, advantage, new, old)).sum()
        turns = np.split(np.arange(len(at)), np.flatnonzero(np.diff(at) > 1) + 1)
        for turn in turns if config.llds_gate == "action" else [np.arange(len(at))]:
            if config.llds_coefficient and log_ratio[turn].sum() < 0:
                lost = np.maximum(-log_ratio[turn], 0) * (advantage[turn] >= 0)
                loss += config.llds_coefficient * (weights[turn] * lost).sum()
    if config.echo_coefficient:
        loss -= (wide(batch.ce_weights) * wide(logprobs)).sum()
    return loss


SEQUENCE_CONFIGS = {
    "gspo": AlgorithmConfig(loss="gspo", clip=0.05, clip_high=0.08),
    "cispo": AlgorithmConfig(loss="cispo", clip=0.2, clip_high=0.3),
    "gmpo": AlgorithmConfig(loss="gmpo", clip=0.2, clip_high=0.4),
    "reinforce": AlgorithmConfig(loss="reinforce"),
    "dppo": AlgorithmConfig(loss="dppo", clip=0.02),
    "sequence mask": AlgorithmConfig(loss="reinforce", sequence_mask=0.1),
    "clip with sequence mask": AlgorithmConfig(clip=0.3, sequence_mask=0.1),
    "preserving": AlgorithmConfig(loss="reinforce", llds_coefficient=0.7),
    "preserving by response": AlgorithmConfig(
        loss="reinforce", llds_coefficient=0.7, llds_gate="response"
    ),
    "echo": AlgorithmConfig(loss="reinforce", echo_coefficient=0.1),
}


def packed_rows(seed: int) -> tuple[np.ndarray, PackedBatch]:
    """Two rows of three sequences, with one advantage per sequence, and padding."""
    logprobs, batch = random_rows(seed=seed)
    ids = np.repeat(np.array([[1, 2, 3, 0], [4, 5, 6, 0]]), [7, 13, 15, 5], axis=1)
    advantages = np.random.default_rng(seed).normal(size=7).astype(np.float32)[ids]
    weights = np.where(ids > 0, batch.weights, 0).astype(np.float32)
    return logprobs, batch._replace(
        segment_ids=ids.astype(np.int32),
        advantages=advantages,
        weights=weights,
        ce_weights=np.where((ids > 0) & (weights == 0), np.float32(0.02), np.float32(0)),
    )


@pytest.mark.parametrize("name", SEQUENCE_CONFIGS)
def test_other_losses_against_float64_and_finite_differences(name):
    config = SEQUENCE_CONFIGS[name]
    loss_of = policy_loss(config)
    for seed in range(5):
        logprobs, batch = packed_rows(seed)
        loss, metrics = loss_of(logprobs, batch)
        np.testing.assert_allclose(loss, sequence_oracle(config, logprobs, batch), rtol=2e-5)
        assert {"clip_fraction", "ratio", "logprob_diff_mean", "logprob_diff_max"} <= set(metrics)
        slope = np.asarray(jax.grad(lambda p, b: loss_of(p, b)[0])(logprobs, batch))
        rng = np.random.default_rng(seed)
        for row, column in zip(rng.integers(0, 2, 12), rng.integers(0, 35, 12), strict=True):
            step = np.zeros(logprobs.shape)
            step[row, column] = 1e-5
            wide = logprobs.astype(np.float64)
            up, down = (sequence_oracle(config, wide + s, batch, logprobs) for s in (step, -step))
            assert slope[row, column] == pytest.approx((up - down) / 2e-5, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("name", SEQUENCE_CONFIGS)
def test_packing_changes_no_loss(name):
    """Compares with the same sequences, one per row."""
    loss = policy_loss(SEQUENCE_CONFIGS[name])
    logprobs, batch = packed_rows(1)
    rows = [(row, batch.segment_ids[row] == i) for row in (0, 1) for i in range(1, 7)]
    rows = [(row, mine) for row, mine in rows if mine.any()]
    assert len(rows) == 6

    def alone(array: np.ndarray) -> np.ndarray:
        wide = array.ndim - 2  # of nuclei
        return np.stack(
            [np.where(mine.reshape(-1, *[1] * wide), array[row], 0) for row, mine in rows]
        )

    apart = PackedBatch(*map(alone, batch))
    np.testing.assert_allclose(loss(alone(logprobs), apart)[0], loss(logprobs, batch)[0], rtol=1e-5)


def test_losses_agree_where_the_policy_has_not_moved():
    """At the policy that sampled, every objective has the gradient of REINFORCE."""
    _, batch = packed_rows(2)
    # One weight per sequence, as in averages by sequence.
    batch = batch._replace(weights=(batch.weights > 0).astype(np.float32))

    def slope(config: AlgorithmConfig) -> np.ndarray:
        return np.asarray(jax.grad(lambda p: policy_loss(config)(p, batch)[0])(batch.old_logprobs))

    plain = slope(AlgorithmConfig(loss="reinforce"))
    for name in ("clip", "gspo", "cispo", "gmpo", "dppo"):
        np.testing.assert_allclose(
            slope(AlgorithmConfig(loss=name)), plain, rtol=1e-4, atol=1e-7, err_msg=name
        )
