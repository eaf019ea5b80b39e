"""Trajectories in flight across steps: complete groups, their own keys and worlds, checkpoints."""

import dataclasses
import json

import numpy as np
import pytest

from r1s_jax.config import AlgorithmConfig, override
from r1s_jax.configs import tiny_world
from r1s_jax.data.environment import Batch
from r1s_jax.data.questions import Question
from r1s_jax.io.errors import BadInput, ConfigError
from r1s_jax.learning.collect import Rewarded
from r1s_jax.learning.partial_rollouts import PartialRollouts
from r1s_jax.models.sharding import shard_params
from r1s_jax.retrieval.api import Hit
from r1s_jax.rewards.registry import reward_rule
from r1s_jax.rollout.broker import SearchFailure
from r1s_jax.rollout.trajectory import Finish
from r1s_jax.tracking.metrics import rollout_metrics
from tests.fakes import RaisingRetriever
from tests.makers import ROLLOUT, make_engine, searching_params

SAMPLES, SIZE, STEPS = 3, 2, 6


class Worlds:
    """New questions at each step; the retriever of a step returns the step in its documents."""

    def batch(self, step: int, size: int, draw: int = 0) -> Batch:
        first = 100 * step + 10 * draw
        questions = [
            Question(first + i, f"What is the trade of {first + i}?", ("x",)) for i in range(size)
        ]
        return Batch(questions, self.retriever_of(step, draw))

    def retriever_of(self, step: int, draw: int) -> "World":
        return World(f"drawn {step} {draw}")


class World:
    def __init__(self, name: str):
        self.name = name

    def search(self, queries, k):
        return [[Hit(str(i), 1.0, f"{self.name}   {query}") for i in range(k)] for query in queries]


@pytest.fixture(scope="module")
def config():
    c = override(tiny_world.config(), [f"algorithm.samples_per_question={SAMPLES}", "seed=1"])
    return dataclasses.replace(
        c, rollout=dataclasses.replace(ROLLOUT, slots=4, partial_rollouts=True)
    )


@pytest.fixture(scope="module")
def engine(config):
    return make_engine(config.rollout)


def steps(config, engine, *, restart: bool):
    """Six steps with one policy; with `restart`, every step restores its state."""
    carried, batches = PartialRollouts(config, engine, Worlds()), []
    params = shard_params(searching_params(model=engine.model), engine.model, engine.mesh)
    for step in range(STEPS):
        if restart:
            state = carried.state()
            carried = PartialRollouts(config, engine, Worlds())
            carried.restore(state)
        batches.append(carried.roll(params, step, SIZE))
    return batches, carried


@pytest.fixture(scope="module")
def batches(config, engine):
    return steps(config, engine, restart=False)[0]


def test_every_step_trains_complete_groups(batches):
    drawn = set()
    for rolled in batches:
        t = rolled.trajectory
        assert t.groups.tolist() == [0] * SAMPLES + [1] * SAMPLES
        assert (t.finish != Finish.NONE).all()
        ids = [q.id for q in rolled.questions]
        assert len(set(ids[:SAMPLES])) == len(set(ids[SAMPLES:])) == 1
        assert not drawn & set(ids)
        drawn |= set(ids)
    assert sum(b.carried for b in batches) > 0
    assert max(b.ages.max() for b in batches) >= 1


def test_the_metrics_of_a_step_are_json(batches):
    rule = reward_rule("stage2")
    for rolled in batches:
        pairs = zip(rolled.solutions, rolled.questions, strict=True)
        rewards = [rule(solution, question.answers) for solution, question in pairs]
        row = rollout_metrics(Rewarded.of(rolled, rewards, AlgorithmConfig()))
        assert json.loads(json.dumps(row))["partial_trajectories"] >= 0
    assert any(rolled.carried for rolled in batches)


def test_with_one_policy_tokens_equal_those_of_an_uninterrupted_rollout(batches, engine):
    """With the same parameters at every step, partial rollouts change no token, mask or ending."""
    params = shard_params(searching_params(model=engine.model), engine.model, engine.mesh)
    compared = 0
    for rolled in batches:
        for group in range(SIZE):
            rows = slice(group * SAMPLES, (group + 1) * SAMPLES)
            question = rolled.questions[rows.start]
            step, draw = divmod(question.id, 100)[0], question.id % 100 // 10
            if (rolled.trajectory.finish[rows] == Finish.TOO_OLD).any():
                continue
            alone = engine.run(
                params,
                [question],
                samples=SAMPLES,
                seed=1,
                step=step,
                draw=draw,
                retriever=Worlds().retriever_of(step, draw),
            )
            for name in ("tokens", "loss_mask", "lengths", "searches", "finish"):
                ours = getattr(rolled.trajectory, name)[rows]
                np.testing.assert_array_equal(ours, getattr(alone.trajectory, name), err_msg=name)
            ours = rolled.trajectory.policy_logprobs[rows]
            np.testing.assert_allclose(ours, alone.trajectory.policy_logprobs, atol=2e-5)
            for mine, theirs in zip(rolled.searches[rows], alone.searches, strict=True):
                assert [s.query for s in mine] == [s.query for s in theirs]
            compared += 1
    assert compared >= STEPS


def test_a_search_goes_to_the_retriever_of_its_question(batches):
    answered = 0
    for rolled in batches:
        for question, searches in zip(rolled.questions, rolled.searches, strict=True):
            name = f"drawn {question.id // 100} {question.id % 100 // 10} "
            for search in searches:
                assert all(document.startswith(name) for document in search.documents)
                answered += bool(search.documents)
    assert answered >= 5


def test_a_checkpoint_restores_trajectories_in_flight(batches, config, engine):
    again, _ = steps(config, engine, restart=True)
    for a, b in zip(batches, again, strict=True):
        assert a.questions == b.questions and a.carried == b.carried
        for x, y in zip((*a.trajectory, a.ages), (*b.trajectory, b.ages), strict=True):
            np.testing.assert_array_equal(x, y)
        assert [s.text for s in a.solutions] == [s.text for s in b.solutions]
        for mine, theirs in zip(a.searches, b.searches, strict=True):
            assert [(s.query, s.outcome) for s in mine] == [(s.query, s.outcome) for s in theirs]


def test_too_stale_trajectories_are_cut_off_and_counted(config):
    short = dataclasses.replace(config.rollout, slots=12, max_staleness=1)
    config = dataclasses.replace(config, rollout=short)
    batches, carried = steps(config, make_engine(short), restart=False)
    ages = np.concatenate([b.ages.ravel() for b in batches])
    assert ages.max() <= 2  # cut at the end of the second step, trained in the next
    ends = np.concatenate([b.trajectory.finish for b in batches])
    assert (ends == Finish.TOO_OLD).any()
    for group in carried.groups:
        assert all(f.ended or STEPS - 1 - f.step < 1 for f in group)


def test_damaged_state_is_refused(config, engine):
    carried = steps(config, engine, restart=False)[1]
    state = carried.state()
    other = PartialRollouts(config, engine, Worlds())
    for damaged in (state[:-7], state[:20] + "!" + state[21:], "nonsense", state[::-1]):
        with pytest.raises(BadInput, match="carried trajectories"):
            other.restore(damaged)
    other.restore(None)
    assert other.groups == [] and other.state() is None


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (["rollout.max_staleness=0"], "rollout.max_staleness must be at least 1"),
        (["rollout.partial_rollouts=true", "algorithm.dynamic_sampling=2"], "switch one off"),
        (["rollout.partial_rollouts=true", "algorithm.loss=reinforce"], "set algorithm.tis_cap=2"),
    ],
)
def test_settings_that_make_no_sense_are_refused(wrong, said):
    with pytest.raises(ConfigError, match=said):
        override(tiny_world.config(), wrong)


def test_first_searches_are_counted_and_too_many_failures_end_the_step(config, monkeypatch):
    searching = dataclasses.replace(config.rollout, retrieve_first=True, max_prompt_length=64)
    engine = make_engine(searching)
    c = dataclasses.replace(config, rollout=searching)
    params = shard_params(searching_params(model=engine.model), engine.model, engine.mesh)
    rolled = PartialRollouts(c, engine, Worlds()).roll(params, 0, SIZE)
    # One first search for every drawn question, besides those of the policy.
    assert rolled.outcomes["found"] >= 2 * SIZE
    monkeypatch.setattr(Worlds, "retriever_of", lambda *_: RaisingRetriever())
    with pytest.raises(SearchFailure, match="2 of 2 searches failed"):
        PartialRollouts(c, engine, Worlds()).roll(params, 0, SIZE)
