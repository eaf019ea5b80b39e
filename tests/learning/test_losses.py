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
    zeros = np.zeros(shape, np.int32)
    batch = PackedBatch(
        tokens=zeros,
        segment_ids=zeros + 1,
        positions=zeros,
        **{name: a.astype(np.float32) for name, a in arrays.items()},
    )
    logprobs = (old + rng.normal(0, spread, shape)).astype(np.float32)
    return logprobs, batch


def oracle(config, logprobs, batch):
    """Loss and how many tokens the clip keeps from moving on."""
    loss, outside = 0.0, 0
    for at in np.ndindex(batch.weights.shape):
        if batch.weights[at] > 0:
            ratio, advantage = np.exp(logprobs[at] - batch.old_logprobs[at]), batch.advantages[at]
            high = config.clip_high or config.clip
            gain = min(ratio * advantage, min(max(ratio, 1 - config.clip), 1 + high) * advantage)
            # Outside of the range on the side where the objective no longer grows.
            outside += ratio > 1 + high if advantage > 0 else ratio < 1 - config.clip
            if config.dual_clip and advantage < 0:
                gain = max(gain, config.dual_clip * advantage)
            loss -= batch.weights[at] * gain
        if batch.kl_weights[at] > 0:
            gap = batch.reference_logprobs[at] - logprobs[at]
            loss += batch.kl_weights[at] * (np.exp(gap) - gap - 1)
    return loss, outside


CONFIGS = {
    "narrow": AlgorithmConfig(clip=0.1),
    "wide": AlgorithmConfig(clip=0.5),
    "asymmetric": AlgorithmConfig(clip=0.2, clip_high=0.28),
    "dual": AlgorithmConfig(clip=0.2, dual_clip=1.5),
    "kl": AlgorithmConfig(kl_coefficient=0.1, kl_penalty="loss", kl_estimator="k3"),
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
    gaps = np.abs(logprobs - batch.old_logprobs)[trained]
    assert 0 < outside == metrics["clip_fraction"]
    np.testing.assert_allclose(metrics["logprob_gap_mean"], gaps.sum(), rtol=1e-5)
    np.testing.assert_allclose(metrics["logprob_gap_max"], gaps.max(), rtol=1e-5)


@pytest.mark.parametrize("name", ["asymmetric", "dual", "kl"])
def test_each_option_makes_a_difference(name):
    config = CONFIGS[name]
    logprobs, batch = random_rows(spread=1.0, kl=config.kl_coefficient)
    plain = clipped_loss(0.2, logprobs, batch._replace(kl_weights=0 * batch.weights))[0]
    assert abs(policy_loss(config)(logprobs, batch)[0] - plain) > 1e-3


def test_the_first_gradient_is_that_of_reinforce():
    """With ratio 1 nothing is clipped: the gradient is weight times advantage."""
    logprobs, batch = random_rows()
    batch = batch._replace(old_logprobs=logprobs)
    gradient = jax.grad(lambda x: clipped_loss(0.2, x, batch)[0])(logprobs)
    np.testing.assert_allclose(gradient, -batch.weights * batch.advantages, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("loss", [partial(clipped_loss, 0.2), likelihood_loss])
def test_tokens_of_weight_0_have_no_gradient_and_no_say(loss):
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
