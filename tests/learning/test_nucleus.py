"""Ratios under top-p compare probabilities within the nucleus that a token was drawn from."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from r1s_jax.config import AlgorithmConfig, MeshConfig
from r1s_jax.configs import tiny_world
from r1s_jax.learning.collect import Rewarded
from r1s_jax.learning.losses import _log_ratio
from r1s_jax.learning.packing import pack, unpack
from r1s_jax.learning.policy_gradient import PolicyGradient
from r1s_jax.models.decoder import Policy
from r1s_jax.models.sharding import make_mesh, shard_params
from r1s_jax.protocol.solution import Solution
from r1s_jax.rewards.rules import Reward
from r1s_jax.rollout.engine import Rolled
from tests.makers import MODEL, ROLLOUT, make_engine, make_learner, roll, searching_params

TOP_P = 0.9


def peaked_params(temperature: float):
    """Most nuclei have 5 to 30 tokens, some have more than are recorded."""
    params = searching_params()
    return params | {"lm_head": 1.5 * temperature * params["lm_head"]}


@pytest.fixture(scope="module", params=[1.0, 0.7])
def rolled(request):
    config = replace(ROLLOUT, top_p=TOP_P, temperature=request.param)
    return request.param, roll(make_engine(config), params=peaked_params(request.param)).trajectory


def log_ratios(t, params) -> np.ndarray:
    """The log-ratio of every sampled token that an update under `params` compares."""
    mesh = make_mesh(MeshConfig())
    learner = make_learner(model=MODEL, mesh=mesh)
    weights = t.loss_mask.astype(np.float32)
    batch, layout, _ = pack(
        t.tokens,
        t.lengths,
        weights,
        0 * weights,
        t.policy_logprobs - t.log_kept,
        kept=t.kept,
        capacity=t.tokens.shape[1],
        micro_batch_rows=len(t.tokens),
    )
    rows = jax.tree.map(lambda a: a[0], batch)

    @jax.jit
    def compared(params):
        logprobs, _, masses = learner._forward(params, rows)
        return _log_ratio(logprobs, rows._replace(log_kept=masses))

    packed = np.asarray(compared(shard_params(params, MODEL, mesh)))[None]
    return unpack(packed, layout, t.lengths, t.tokens.shape[1])


def test_a_policy_that_has_not_moved_has_ratio_1(rolled):
    temperature, t = rolled
    recorded = (t.kept >= 0).any(-1)[t.loss_mask]
    assert 0.5 < recorded.mean() < 1, "both kinds of nuclei occur"
    assert np.abs(log_ratios(t, peaked_params(temperature))[t.loss_mask]).max() < 1e-5


def test_a_policy_that_moved_has_the_ratio_within_the_nucleus_of_sampling_time(rolled):
    temperature, t = rolled
    rng, before = np.random.default_rng(0), peaked_params(temperature)
    after = jax.tree.map(lambda p: p + 0.05 * rng.normal(size=p.shape).astype(p.dtype), before)
    logits = [np.asarray(Policy(MODEL, p)(t.tokens), np.float64) for p in (before, after)]
    got, compared = log_ratios(t, after), 0
    for row, at in zip(*np.nonzero(t.loss_mask), strict=True):
        old, new = (x[row, at - 1] for x in logits)
        tempered = np.exp(old / temperature - np.logaddexp.reduce(old / temperature))
        order = np.argsort(-tempered)
        size = 1 + int((np.cumsum(tempered[order]) < TOP_P).sum())
        kept = order[:size] if size <= t.kept.shape[2] else order
        token = t.tokens[row, at]
        old, new = (x[token] - np.logaddexp.reduce(x[kept]) for x in (old, new))
        np.testing.assert_allclose(got[row, at], new - old, atol=2e-4)
        compared += 1
    assert compared > 100
    assert np.abs(got[t.loss_mask]).max() > 0.05


def test_ratios_to_the_learners_own_probabilities_are_within_the_nucleus_too(rolled):
    """With tis_cap, old log-probabilities are the learner's: within the nuclei, as the new ones."""
    temperature, t = rolled
    config = tiny_world.config()
    config = replace(config, rollout=ROLLOUT, algorithm=AlgorithmConfig(tis_cap=2.0))
    mesh = make_mesh(MeshConfig())
    learner = make_learner(model=MODEL, mesh=mesh)
    method = PolicyGradient(config, learner)
    method._rows = 2
    n = len(t.lengths)
    said = (Solution.of_text("<answer> a </answer>"),) * n
    rolled_batch = Rolled(((),) * n, t, said, ((),) * n, {}, 1.0, {})
    batch = Rewarded.of(rolled_batch, [Reward(0.0, {})] * n, config.algorithm)
    # The policy has moved since it sampled, as that of carried trajectories has.
    after = jax.tree.map(lambda p: p * 1.1, peaked_params(temperature))
    state = learner.init(shard_params(after, MODEL, mesh))
    old, correction, _ = method._old_logprobs(state, batch, [np.arange(n)])
    mask = t.loss_mask & batch.mask
    moved = log_ratios(t, after)
    sampled = t.policy_logprobs - t.log_kept
    np.testing.assert_allclose((old - sampled)[mask], moved[mask], atol=1e-4)
    assert np.abs(moved[mask]).max() > 0.05
    expected = np.minimum(np.exp(moved[mask]), 2.0)
    np.testing.assert_allclose(correction[mask], expected, rtol=1e-3)
