"""Evaluation during training: greedy and with several samples, against counting by hand."""

import dataclasses

import numpy as np
import pytest

from r1s_jax.data.environment import Batch
from r1s_jax.eval.held_out import evaluate, search_by_need
from r1s_jax.models.sharding import shard_params
from r1s_jax.rewards.answer_scores import exact_match, f1_score
from tests.fakes import EchoRetriever
from tests.makers import QUESTIONS, ROLLOUT, make_engine, scripted_policy


@pytest.fixture(scope="module")
def evaluated():
    """Results of a policy that answers one of six trades to every question."""
    params = scripted_policy().params
    greedy = make_engine(dataclasses.replace(ROLLOUT, temperature=0.0))
    sampler = make_engine(dataclasses.replace(ROLLOUT, top_p=1.0))
    params = shard_params(params, greedy.model, greedy.mesh)
    questions = [dataclasses.replace(q, answers=("farmer",)) for q in QUESTIONS]
    batch = Batch(questions, EchoRetriever())
    rolled = sampler.run(params, questions, samples=12, seed=0, step=1, retriever=EchoRetriever())
    return evaluate(greedy, params, batch, sampler, 12), rolled


def test_solved_questions_are_counted_with_and_without_a_search(evaluated):
    got, _ = evaluated
    right = [exact_match(s.answer or "", "farmer") for s in got.rolled.solutions]
    assert got.solved_with_search == np.mean(right)  # this policy always searches
    assert got.solved_without_search == 0
    assert set(got.scores()) >= {"f1", "cover_em", "searches", "solved_with_search"}


def test_search_by_need_compares_memorised_with_other_questions():
    lookup, memorised = QUESTIONS[0], dataclasses.replace(QUESTIONS[0], hops=0, memorised=True)
    searched, f1 = np.array([True, False, True, False]), np.array([1.0, 0.0, 0.5, 1.0])
    assert search_by_need([lookup, lookup, lookup, memorised], searched, f1) == {
        "searched_needed": 2 / 3,
        "searched_memorised": 0.0,
        "f1_needed": 0.5,
        "f1_memorised": 1.0,
    }
    for alike in (lookup, memorised):
        assert search_by_need([alike] * 4, searched, f1) == {}


def test_avg_and_pass_at_k_are_counted_over_the_samples_of_a_question(evaluated):
    got, rolled = evaluated
    answers = np.array([s.answer or "" for s in rolled.solutions]).reshape(len(QUESTIONS), 12)
    f1 = [[f1_score(a, "farmer")[0] for a in row] for row in answers]
    passed = [any(exact_match(a, "farmer") for a in row) for row in answers]
    assert got.sampled["avg_at_k_f1"] == pytest.approx(np.mean(f1))
    assert got.sampled["pass_at_k"] == np.mean(passed) > got.sampled["avg_at_k_f1"] > 0
    for name in ("avg_at_k_f1", "pass_at_k"):
        low, high = got.sampled[f"{name}_low"], got.sampled[f"{name}_high"]
        assert low <= got.sampled[name] <= high


def test_without_samples_there_are_no_sampled_scores():
    engine = make_engine(dataclasses.replace(ROLLOUT, temperature=0.0))
    params = shard_params(scripted_policy().params, engine.model, engine.mesh)
    assert evaluate(engine, params, Batch(QUESTIONS, EchoRetriever())).sampled == {}
