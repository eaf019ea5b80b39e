from typing import get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from r1s_jax.config import Estimator
from r1s_jax.learning.advantages import (
    adapted_kl_coefficient,
    has_signal,
    kl_divergence,
    token_advantages,
    whiten,
)

ESTIMATORS = get_args(Estimator)
N, W = 12, 9


def oracle(estimator, rewards, groups, mask, kl=None, coefficient=0.0, clip=10.0):
    """The advantages in float64, token by token."""
    rewards = np.clip(np.asarray(rewards, np.float64), -clip, clip)
    out = np.zeros(mask.shape)
    for i, row in enumerate(mask):
        peers = [j for j in range(len(mask)) if groups[j] == groups[i] and mask[j].any()]
        r, others = rewards[peers], [rewards[j] for j in peers if j != i]
        if not row.any():
            continue
        outcome = {
            "reinforce++": lambda i=i: rewards[i],
            "reinforce_baseline": lambda i=i, r=r: rewards[i] - r.mean(),
            "rloo": lambda i=i, o=others: rewards[i] - np.mean(o) if o else 0.0,
            "grpo": lambda i=i, r=r: (
                (rewards[i] - r.mean()) / (r.std(ddof=1) + 1e-9) if len(r) > 1 else 0.0
            ),
            "dr_grpo": lambda i=i, r=r: rewards[i] - r.mean(),
        }[estimator]()
        total = outcome
        for t in np.flatnonzero(row)[::-1]:
            total -= coefficient * kl[i, t] if kl is not None else 0.0
            out[i, t] = total
    if estimator in ("grpo", "dr_grpo") or not mask.any():
        return out
    return np.where(mask, (out - out[mask].mean()) / np.sqrt(out[mask].var() + 1e-8), 0)


@st.composite
def batches(draw):
    rng = np.random.default_rng(draw(st.integers(0, 2**31)))
    mask = rng.random((N, W)) < rng.random((N, 1))  # ragged, with holes for documents
    mask[rng.random(N) < 0.2] = False
    groups = rng.integers(0, draw(st.sampled_from([1, 4, N])), N)
    levels = draw(st.sampled_from([np.array([-2, 0, 0.5, 1]), np.array([1 / 3, 2 / 3]), None]))
    rewards = rng.normal(size=N) * 8 if levels is None else rng.choice(levels, N)
    kl = rng.normal(size=(N, W)).astype(np.float32) if draw(st.booleans()) else None
    return rewards.astype(np.float32), groups.astype(np.int32), mask, kl


@pytest.mark.parametrize("estimator", ESTIMATORS)
@given(batch=batches())
@settings(deadline=None, max_examples=25)
def test_estimators_agree_with_float64(estimator, batch):
    rewards, groups, mask, kl = batch
    options = dict(kl_coefficient=0.05, reward_clip=5.0)
    got = token_advantages(estimator, rewards, groups, mask, kl=kl, **options)
    expected = oracle(estimator, rewards, groups, mask, kl, 0.05, 5.0)
    np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-6)
    assert not np.asarray(got)[~mask].any()


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_rewards_are_clamped(estimator):
    rng = np.random.default_rng(0)
    rewards, groups = np.array([1e6, -1e6] + [0.0] * 10, np.float32), np.arange(N) // 4
    mask = rng.random((N, W)) < 0.6
    tamed = np.clip(rewards, -3, 3)
    got = token_advantages(estimator, rewards, groups, mask, reward_clip=3.0)
    np.testing.assert_array_equal(got, token_advantages(estimator, tamed, groups, mask))


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_forced_tokens_have_no_effect(estimator):
    """The reward of a row without sampled tokens and the KL of masked tokens have no effect."""
    rng = np.random.default_rng(1)
    rewards, groups = rng.normal(size=N).astype(np.float32), (np.arange(N) // 3).astype(np.int32)
    mask, kl = rng.random((N, W)) < 0.5, rng.normal(size=(N, W)).astype(np.float32)
    mask[4] = False
    first = token_advantages(estimator, rewards, groups, mask, kl=kl, kl_coefficient=0.1)
    rewards[4] = 9.0
    other = np.where(mask, kl, 1e3)
    second = token_advantages(estimator, rewards, groups, mask, kl=other, kl_coefficient=0.1)
    np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize("estimator", ["reinforce_baseline", "rloo", "grpo", "dr_grpo"])
@pytest.mark.parametrize("reward", [0.1, 1 / 3, 2 / 3, 0.7])
def test_equal_rewards_in_a_group_have_zero_advantages(estimator, reward):
    """Rounding errors must not count as differences, even in units of a standard deviation."""
    mask = np.ones((N, W), bool)
    for size in (3, 6, 12):
        groups = np.arange(N) // size
        got = token_advantages(estimator, np.full(N, reward, np.float32), groups, mask)
        np.testing.assert_array_equal(got, 0)


def test_a_single_sample_in_a_group_has_no_signal():
    mask = np.ones((N, W), bool)
    rewards, groups = np.arange(N, dtype=np.float32), np.arange(N)
    for estimator in ("reinforce_baseline", "rloo", "grpo", "dr_grpo"):
        assert not np.asarray(token_advantages(estimator, rewards, groups, mask)).any()
    assert np.asarray(token_advantages("reinforce++", rewards, groups, mask)).any()


def test_grpo_is_in_units_of_the_groups_standard_deviation():
    mask = np.zeros((4, 3), bool)
    mask[:, 1] = True
    rewards = np.array([0.0, 1.0, 5.0, 7.0], np.float32)
    got = np.asarray(token_advantages("grpo", rewards, np.array([0, 0, 1, 1]), mask))
    np.testing.assert_allclose(got[:, 1], [-(0.5**0.5), 0.5**0.5] * 2, rtol=1e-5)


def test_a_batch_without_any_sampled_token_is_all_zero():
    nothing = np.zeros((N, W), bool)
    for estimator in ESTIMATORS:
        got = token_advantages(estimator, np.ones(N, np.float32), np.arange(N) // 4, nothing)
        np.testing.assert_array_equal(got, 0)


def test_whitening_ignores_masked_tokens():
    rng = np.random.default_rng(2)
    mask, values = rng.random((N, W)) < 0.5, rng.normal(3.0, 2.0, (N, W)).astype(np.float32)
    got = np.asarray(whiten(np.where(mask, values, 1e6), mask))
    np.testing.assert_allclose(got[mask].mean(), 0, atol=1e-5)
    np.testing.assert_allclose(got[mask].std(), 1, atol=1e-5)
    assert not got[~mask].any()


def test_a_small_kl_stays_small_where_rewards_are_equal():
    rng, mask = np.random.default_rng(0), np.ones((N, W), bool)
    kl = rng.normal(0, 0.05, (N, W)).astype(np.float32)
    for estimator in ("reinforce++", "reinforce_baseline", "rloo"):
        got = token_advantages(
            estimator, np.ones(N), np.arange(N) // 4, mask, kl=kl, kl_coefficient=1e-3
        )
        assert 0 < np.abs(got).max() < 0.1
    rare = np.ones((1024, 1), np.float32)
    rare[0] = 0
    whitened = whiten(rare, np.ones(rare.shape, bool))
    assert whitened.std() == pytest.approx(1, abs=1e-4), "one in a thousand still counts in full"


def test_the_kl_of_one_token_is_clipped():
    mask, kl = np.ones((2, 3), bool), np.zeros((2, 3), np.float32)
    kl[0, 1] = np.expm1(30.0)
    got = token_advantages(
        "dr_grpo", np.zeros(2), np.zeros(2, int), mask, kl=kl, kl_coefficient=0.1
    )
    np.testing.assert_allclose(got, [[-1, -1, 0], [0, 0, 0]])


def test_an_unknown_estimator_is_named():
    with pytest.raises(ValueError, match="'ppo'"):
        token_advantages("ppo", np.ones(N), np.arange(N), np.ones((N, W), bool))


def test_kl_estimates_are_right_on_average():
    """k1 and k3 on samples from p both estimate KL(p, q), the sum of p log p/q."""
    rng = np.random.default_rng(0)
    p, q = rng.dirichlet(np.ones(5)), rng.dirichlet(np.ones(5))
    drawn = rng.choice(5, 200_000, p=p)
    exact = (p * np.log(p / q)).sum()
    for estimator in ("k1", "k3"):
        values = kl_divergence(estimator, np.log(p)[drawn], np.log(q)[drawn])
        error = 4 * values.std() / np.sqrt(len(values))
        np.testing.assert_allclose(values.mean(), exact, atol=error)
        assert estimator == "k1" or values.min() >= 0


def test_the_kl_coefficient_nears_its_target_in_bounded_steps():
    assert adapted_kl_coefficient(0.1, kl=0.5, target=0.5) == 0.1
    np.testing.assert_allclose(adapted_kl_coefficient(0.1, kl=9.0, target=0.5), 0.102)
    np.testing.assert_allclose(adapted_kl_coefficient(0.1, kl=0.0, target=0.5), 0.098)


def test_groups_with_different_rewards_have_signal():
    rewards, groups = np.array([1, 1, 0, 1, 2.0]), np.array([7, 7, 3, 3, 9])
    assert has_signal(rewards, groups).tolist() == [False, False, True, True, False]
    assert not has_signal(np.array([]), np.array([], int)).size
