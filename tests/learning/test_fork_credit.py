"""What a search was worth, as credit and as further samples."""

from dataclasses import replace

import numpy as np
import pytest

from r1s_jax.config import AlgorithmConfig
from r1s_jax.learning.collect import Rewarded
from r1s_jax.learning.policy_gradient import fork_advantages
from r1s_jax.rewards.rules import Reward
from r1s_jax.rollout.trajectory import Finish, turn_numbers
from r1s_jax.tracking.metrics import fork_metrics
from tests.makers import ROLLOUT as CONFIG
from tests.makers import make_engine, roll

PLAIN = AlgorithmConfig()


@pytest.fixture(scope="module")
def rolled():
    config = replace(CONFIG, forks=1.0, forks_per_trajectory=2, fork_depth=2, fork_draws=2)
    return roll(make_engine(config))


def rewarded(rolled, values, **changes) -> Rewarded:
    return Rewarded.of(rolled, [Reward(float(v), {}) for v in values], replace(PLAIN, **changes))


def test_worth_is_the_reward_with_the_search_minus_that_without(rolled):
    """Against a loop over all trajectories and forks, the means of two draws each."""
    values = np.random.default_rng(0).normal(size=len(rolled.questions)).round(2)
    values[3] = np.nan
    batch, t = rewarded(rolled, values), rolled.trajectory
    turns = turn_numbers(t.loss_mask)
    for row in range(len(values)):
        for turn in range(batch.worth.shape[1]):
            forks = [
                f
                for f in np.flatnonzero(rolled.parents == row)
                if turns[row, t.forked[f] - 1] == turn
                and not np.isnan(values[f])
                and t.loss_mask[f].any()
            ]
            without = [values[f] for f in forks if not rolled.with_search[f]]
            again = [values[f] for f in forks if rolled.with_search[f]]
            if row == 3 or not without or t.finish[row] == Finish.SEARCH_ERROR:
                assert np.isnan(batch.worth[row, turn])
                continue
            expected = np.mean([values[row], *again]) - np.mean(without)
            assert batch.worth[row, turn] == pytest.approx(expected, abs=1e-6)
            own = fork_advantages(batch)[row, turns[row] == turn]
            credit = expected - np.nanmean(batch.worth)
            np.testing.assert_allclose(own, credit if batch.mask[row].any() else 0, atol=1e-6)
    assert (~np.isnan(batch.worth)).sum() >= 5


def test_forks_are_learned_from_only_where_they_teach(rolled):
    values = np.arange(len(rolled.questions)) % 3
    alone, taught = rewarded(rolled, values), rewarded(rolled, values, forks_teach=True)
    forks = ~rolled.trunks
    assert not alone.mask[forks].any()
    assert taught.mask[forks].any()
    assert not np.isnan(alone.trunks.worth).all()
    np.testing.assert_array_equal(alone.trunks.mask, taught.trunks.mask)
    # A fork's own tokens come after what it shares with its parent.
    t = rolled.trajectory
    for row in np.flatnonzero(forks):
        assert not t.loss_mask[row, : t.forked[row]].any()


def test_a_price_is_relative_to_the_searches_of_the_trajectories(rolled):
    values = np.ones(len(rolled.questions))
    priced = rewarded(rolled, values, search_price=0.5)
    plain = rewarded(rolled.take(np.flatnonzero(rolled.trunks)), values[rolled.trunks])
    assert priced.trunks.values.min() == pytest.approx(0.5)
    assert len(plain.values) == len(priced.trunks.values)


def test_metrics_tell_what_each_search_was_worth(rolled):
    values = rolled.trajectory.searches.astype(float)
    row = fork_metrics(rewarded(rolled, values))
    assert row["fork_tokens"] == rolled.trajectory.loss_mask[~rolled.trunks].sum()
    assert row["search_worth"] == pytest.approx(
        np.nanmean(rewarded(rolled, values).trunks.worth), abs=1e-6
    )
    assert row["search_worth_1"] is not None
    plain = roll(make_engine())
    assert fork_metrics(rewarded(plain, np.ones(len(plain.questions)))) == {}
