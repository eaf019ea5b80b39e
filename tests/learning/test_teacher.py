"""Teachers: what they score, and what they refuse."""

from dataclasses import replace

import numpy as np
import pytest

from r1s_jax.config import ConfigError, MeshConfig, override
from r1s_jax.configs import tiny_world
from r1s_jax.data.environment import dialect_of
from r1s_jax.data.tiny_world import build_tokenizer
from r1s_jax.learning.collect import Rewarded
from r1s_jax.learning.packing import Sizes
from r1s_jax.learning.policy_gradient import PolicyGradient
from r1s_jax.learning.teacher import load_teacher, shown_logprobs
from r1s_jax.models.decoder import Policy
from r1s_jax.models.pretrained import make_policy
from r1s_jax.models.sharding import make_mesh, shard_params
from r1s_jax.rewards.rules import Reward
from tests.makers import (
    MODEL,
    QUESTIONS,
    ROLLOUT,
    make_engine,
    make_learner,
    roll,
    searching_params,
)

SAMPLES = 3


@pytest.fixture(scope="module")
def rewarded():
    engine = make_engine(replace(ROLLOUT, top_p=1.0))
    rolled = roll(engine, samples=SAMPLES)
    # Only the second sample of the first question is right.
    rewards = [Reward(float(i == 1), {"exact_match": float(i == 1)}) for i in range(12)]
    return engine, Rewarded.of(rolled, rewards, tiny_world.config().algorithm)


def scored_by(engine, rewarded, shown: str, capacity: int):
    mesh = make_mesh(MeshConfig())
    learner = make_learner(model=MODEL, mesh=mesh)
    params = shard_params(searching_params(), MODEL, mesh)
    sizes = Sizes(capacity, 2)
    return shown_logprobs(learner, params, rewarded, shown, engine.prompt_tokens, sizes)


@pytest.mark.parametrize("shown", ["gold", "sample"])
def test_the_policys_own_tokens_are_scored_after_the_longer_prompt(rewarded, shown):
    engine, batch = rewarded
    t, solutions = batch.rolled.trajectory, batch.rolled.solutions
    logprobs, scored = scored_by(engine, batch, shown, 2 * ROLLOUT.max_length)
    with_hint = set(np.flatnonzero(scored.any(1)).tolist())
    assert with_hint == (set(range(12)) if shown == "gold" else {0, 2})
    for row in with_hint:
        assert (scored[row] == batch.mask[row]).all()
        question = QUESTIONS[row // SAMPLES]
        hint = f"The correct answer is: {question.answers[0]}"
        if shown == "sample":
            right = solutions[1].written.strip()
            hint = f"A correct solution of this question:\n{right}"
        longer = engine.prompt_tokens(f"{question.question}\n\n{hint}")
        own = t.tokens[row, t.prompt_lengths[row] : t.lengths[row]]
        tokens = np.array([*longer, *own])
        padded = np.zeros((1, 2 * ROLLOUT.max_length), np.int32)  # one shape for all
        padded[0, : len(tokens)] = tokens
        logits = np.asarray(Policy(MODEL, searching_params())(padded)[0], np.float64)
        logits -= np.logaddexp.reduce(logits, axis=-1, keepdims=True)
        at = np.flatnonzero(batch.mask[row]) - int(t.prompt_lengths[row]) + len(longer)
        expected = logits[at - 1, tokens[at]]
        np.testing.assert_allclose(logprobs[row, batch.mask[row]], expected, atol=1e-4)


def test_without_room_nothing_is_scored(rewarded):
    engine, batch = rewarded
    shortest = int(batch.rolled.trajectory.lengths.min())
    logprobs, scored = scored_by(engine, batch, "gold", shortest)
    assert not scored.any() and not logprobs.any()


def tiny(*changes: str):
    return override(tiny_world.config(), changes)


TEACH = ("algorithm.kl_coefficient=1", "algorithm.kl_penalty=loss", "algorithm.kl_estimator=k2")


def test_a_teacher_that_is_the_policy_has_no_divergence_and_moves_nothing(rewarded, model):
    """A model of the same tokens: scored by its own parameters."""
    engine, batch = rewarded
    config = tiny(*TEACH, f"algorithm.teacher={model}", "policy.compute_dtype=float32")
    config = replace(config, rollout=replace(ROLLOUT, top_p=1.0))
    mesh = make_mesh(MeshConfig())
    policy = make_policy(config.policy, 0, engine.dialect, None, build_tokenizer())
    teacher = load_teacher(config, mesh, policy)
    assert teacher is not None
    learner = make_learner(model=teacher.learner.model, mesh=mesh)
    method = PolicyGradient(config, learner, engine, teacher)
    method._rows = 1
    state = learner.init(teacher.params)
    theirs, scored = method._reference(state, batch, [np.arange(12)])
    t = batch.rolled.trajectory
    own = method._logprobs(state.params, t, batch.mask, [np.arange(12)])
    np.testing.assert_allclose(theirs, own, atol=1e-5)
    assert (scored == batch.mask).all() and theirs[batch.mask].any()


def test_a_teacher_with_other_tokens_is_refused(tmp_path, model):
    config = tiny(*TEACH, f"algorithm.teacher={model}")
    tokenizer = build_tokenizer()
    tokenizer.add_tokens(["another"])
    policy = make_policy(
        config.policy, 0, dialect_of(config, lambda: None), None, build_tokenizer()
    )
    with pytest.raises(ConfigError, match=r"has other tokens than the policy .*1 differ"):
        load_teacher(config, make_mesh(MeshConfig()), policy._replace(tokenizer=tokenizer))


def test_a_teacher_needs_a_coefficient():
    with pytest.raises(ConfigError, match="must be above 0"):
        tiny("algorithm.teacher=gold")
