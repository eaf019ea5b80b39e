from typing import get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from r1s_jax.config import Estimator
from r1s_jax.learning.advantages import (
    Terms,
    TurnRewards,
    adapted_kl_coefficient,
    has_signal,
    kl_divergence,
    token_advantages,
    whiten,
)
from r1s_jax.rollout.trajectory import turn_numbers

ESTIMATORS = get_args(Estimator)
RELATIVE = [name for name in ESTIMATORS if name != "reinforce++"]
N, W = 12, 9


def relative(estimator, value, peers):
    """A value relative to those of its group, its own among them."""
    peers, spread = np.array(peers), max(peers) > min(peers)
    if estimator == "reinforce++":
        return value
    if not spread:
        return 0.0
    if estimator == "rloo":
        return value - (peers.sum() - value) / (len(peers) - 1)
    if estimator in ("grpo", "gdpo"):
        return (value - peers.mean()) / (peers.std(ddof=1) + 1e-9)
    if estimator == "max_rl":
        return (value - peers.mean()) / peers.mean() if peers.mean() > 0 else 0.0
    return value - peers.mean()


def oracle(
    estimator, rewards, groups, mask, kl=None, coefficient=0.0, clip=10.0, turns=None, terms=None
):
    """The advantages in float64, token by token."""
    rewards = np.clip(np.asarray(rewards, np.float64), -clip, clip)
    out = np.zeros(mask.shape)
    for i, row in enumerate(mask):
        peers = [j for j in range(len(mask)) if groups[j] == groups[i] and mask[j].any()]
        if not row.any():
            continue
        gains = [x for j in peers for x in turns.rewards[j] if x == x] if turns else []
        joint = [*rewards[peers], *gains]
        together = joint if turns and turns.joint else rewards[peers]
        total = relative(estimator, rewards[i], together)
        if estimator == "gdpo" and terms:
            total = 0.0
            for p in range(terms.values.shape[1]):
                column = np.clip(terms.values[:, p], -clip, clip)
                total += terms.weights[i, p] * relative("grpo", column[i], column[peers])
        for t in np.flatnonzero(row)[::-1]:
            out[i, t] = total - coefficient * (kl[i, t:][row[t:]].sum() if kl is not None else 0.0)
            for k in range(turns.turns[i, t], turns.rewards.shape[1]) if turns else ():
                out[i, t] += turns.shaping[i, k]
                if not np.isnan(turns.rewards[i, k]):
                    among = joint if turns.joint else gains
                    out[i, t] += relative(estimator, turns.rewards[i, k], among)
    if estimator in ("grpo", "dr_grpo", "max_rl") or not mask.any():
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
@given(batch=batches(), seed=st.integers(0, 2**31), joint=st.booleans())
@settings(deadline=None, max_examples=25)
def test_turns_and_terms_agree_with_float64(estimator, batch, seed, joint):
    rewards, groups, mask, kl = batch
    rng, numbers = np.random.default_rng(seed), turn_numbers(mask)
    shape = N, int(numbers.max()) + 2
    given = np.arange(shape[1]) < rng.integers(0, 1 + numbers.max(1, keepdims=True) + 1)
    turns = TurnRewards(
        numbers,
        np.where(given, rng.choice([0.0, 0.5, 1.0], shape), np.nan),
        rng.normal(size=shape) * 0.1,
        joint,
    )
    terms = Terms(rng.choice([-2.0, 0.0, 0.3, 1.0], (N, 2)), np.full((N, 2), [1.0, 0.2]))
    got = token_advantages(
        estimator, rewards, groups, mask, kl=kl, kl_coefficient=0.05, turns=turns, terms=terms
    )
    expected = oracle(estimator, rewards, groups, mask, kl, 0.05, turns=turns, terms=terms)
    np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-6)


def test_a_rewarded_turn_is_credited_to_itself_and_to_the_turns_before_it():
    """Two samples of a question, three turns each; the second turn of the first one earns more."""
    mask = np.tile(np.array([1, 1, 0, 1, 0, 0, 1, 1, 1], bool), (2, 1))
    rewards = np.array([[0.0, 1.0, np.nan], [0.0, 0.0, np.nan]])
    turns = TurnRewards(turn_numbers(mask), rewards, np.zeros(rewards.shape))
    got = token_advantages("dr_grpo", np.zeros(2, np.float32), np.zeros(2, int), mask, turns=turns)
    # Relative to the mean of 0.25 of all four rewarded turns.
    first, second = 0.0 - 0.25 + 1 - 0.25, 1 - 0.25
    np.testing.assert_allclose(got[0][mask[0]], [first, first, second, 0, 0, 0], atol=1e-7)
    assert (got[1][mask[1]][:2] == -0.5).all()


def test_a_penalty_that_a_group_shares_does_not_hide_the_answers():
    """gdpo's reason: in units of a group's deviation, a large term swamps a small one."""
    mask = np.ones((4, 3), bool)
    values = np.array([[1.0, 0.0], [0.0, 0.0], [1.0, -2.0], [0.0, -2.0]])
    terms, rewards = Terms(values, np.ones((4, 2))), values.sum(1).astype(np.float32)
    groups = np.zeros(4, int)
    plain = token_advantages("grpo", rewards, groups, mask)[:, 0]
    apart = token_advantages("gdpo", rewards, groups, mask, terms=terms)[:, 0]
    assert (plain[0] - plain[1]) / (plain[0] - plain[2]) == pytest.approx(0.5, rel=1e-5)
    assert (apart[0] - apart[1]) / (apart[0] - apart[2]) == pytest.approx(1.0, rel=1e-5)


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


@pytest.mark.parametrize("estimator", RELATIVE)
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
    for estimator in RELATIVE:
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
