"""Health signals: each fires in a run with its failure, and none in healthy runs."""

import zlib
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import jax
import pytest

from r1s_jax import train as training
from r1s_jax.config import Config, OptimizerConfig, override
from r1s_jax.configs import tiny_world
from r1s_jax.data.environment import Batch, TinyWorldEnvironment
from r1s_jax.data.tiny_world import TinyWorld
from r1s_jax.io.fields import declared
from r1s_jax.io.journal import rows_so_far
from r1s_jax.models.export import export
from r1s_jax.rollout.engine import Engine
from r1s_jax.tracking.health import SIGNALS, History, UnhealthyRun, check
from tests.fakes import EmptyRetriever

HEALTHY = {
    "stage": "stage2",
    "loss": 0.1,
    "grad_norm": 1.0,
    "reward": 0.5,
    "answer_f1": 0.4,
    "entropy": 0.4,
    "ratio_drift": 0.01,
    "logprob_diff_mean": 0.001,
    "format_valid": 0.9,
    "searches_per_question": 1.5,
    "finish_search_limit": 0.01,
    "searches": 100,
    "searches_empty": 1,
    "searches_failed": 0,
    "identical_responses": 0.2,
    "response_length": 100.0,
    "correct_logprob": -0.2,
    "thought_words": 12.0,
    "answered": 0.9,
    "repeated_query_share": 0.02,
    "truncated": 0.05,
    "groups_without_signal": 0.3,
    "rewards_answers": True,
}
# The columns of the last steps of an unhealthy run, and the level of the signal.
SICK = {
    "not_finite": ({"loss": float("nan")}, "fatal"),
    "entropy_collapse": ({"entropy": 0.01}, "warning"),
    "entropy_explosion": ({"entropy": 2.0}, "warning"),
    "ratio_drift": ({"ratio_drift": 0.5}, "warning"),
    "drift_returns": ({"ratio_drift": 0.1}, "warning"),
    "logprob_diff": ({"logprob_diff_mean": 0.1}, "warning"),
    "format_falling": ({"format_valid": 0.3}, "warning"),
    "no_searches": ({"searches_per_question": 0.05}, "warning"),
    "search_limit": ({"finish_search_limit": 0.5}, "warning"),
    "empty_documents": ({"searches_empty": 10, "searches_failed": 9}, "warning"),
    "identical_responses": ({"identical_responses": 0.95}, "warning"),
    "reward_without_f1": ({"reward": 0.9}, "warning"),
    "length_blow_up": ({"response_length": 400.0}, "warning"),
    "likelihood_displaced": ({"correct_logprob": -0.9}, "warning"),
    "thoughts_vanish": ({"thought_words": 1.0}, "warning"),
    "answers_avoided": ({"answered": 0.4}, "warning"),
    "repeated_queries": ({"repeated_query_share": 0.5}, "warning"),
    "truncated": ({"truncated": 0.7}, "warning"),
    "no_signal": ({"groups_without_signal": 1.0}, "warning"),
}


def rows(last: dict, steps: int = 6) -> History:
    return History([HEALTHY] * 6 + [HEALTHY | last] * steps)


def test_every_signal_has_a_case():
    assert {signal.name for signal in SIGNALS} == SICK.keys()


@pytest.mark.parametrize("name", SICK)
def test_a_signal_fires_for_its_own_reason_and_no_other(name):
    last, level = SICK[name]
    fired = check(rows(last))
    assert [(f["signal"], f["level"]) for f in fired] == [(name, level)]
    assert fired[0]["advice"]


def test_a_healthy_run_fires_no_signal():
    assert check(rows({})) == []
    assert check(History([HEALTHY])) == []
    sure = {"entropy": 0.005, "identical_responses": 1.0, "answer_f1": 0.97, "reward": 0.97}
    assert check(rows(sure)) == [], "a policy that is right may be sure of itself"
    assert check(rows({"reward": 0.9, "rewards_answers": False})) == [], "stage 1 pays for format"


def test_steps_without_a_right_answer_do_not_hide_a_falling_likelihood():
    none = {name: value for name, value in HEALTHY.items() if name != "correct_logprob"}
    lost = [HEALTHY | {"correct_logprob": -0.9}] * 5
    fired = check(History([none, *[HEALTHY] * 5, *lost]))
    assert [one["signal"] for one in fired] == ["likelihood_displaced"]


def test_one_update_far_too_large_fires_after_the_first_step():
    for drift, signals in ((0.7, []), (0.9, ["ratio_drift"])):
        fired = check(History([HEALTHY | {"ratio_drift": drift}]))
        assert [one["signal"] for one in fired] == signals


def test_extreme_values_are_fatal():
    for last in ({"logprob_diff_mean": 2.0}, {"format_valid": 0.0}):
        assert [f["level"] for f in check(rows(last))] == ["fatal"]


AT_ONCE = ("not_finite", "drift_returns")


@pytest.mark.parametrize("name", [name for name in SICK if name not in AT_ONCE])
def test_one_bad_step_fires_no_trend_signal(name):
    fired = {one["signal"] for one in check(rows(SICK[name][0], steps=1))}
    assert fired <= {"drift_returns"} and (name == "ratio_drift" or not fired)


# Real runs of the tiny world that fail because of their reward, settings or retriever.

SHORT = [
    "stage1.steps=0",
    "stage2.steps=16",
    "stage2.questions_per_step=8",
    "algorithm.samples_per_question=8",
    "environment.people=60",
    "eval.questions=0",
    "optimizer.learning_rate=1e-3",
    "optimizer.decay_to=1",
    "search.max_failure_rate=1",
    "run.stop_when_unhealthy=false",  # another signal often fires first
]


def pays_for_silence(solution, golds):
    return -len(solution.written) / 100


def pays_for_words(solution, golds):
    return len(solution.written) / 100


def pays_for_broken_format(solution, golds):
    return -float("</think>" in solution.written)


def pays_for_not_searching(solution, golds):
    return -float(solution.written.count("<|begin_of_query|>"))


def pays_for_searching(solution, golds):
    return float(solution.written.count("<|end_of_query|>"))


def pays_for_noise(solution, golds):
    return len(zlib.compress(solution.written.encode())) / 100


@pytest.fixture(scope="module")
def beginner(tmp_path_factory) -> Path:
    """A policy after a short cold start, in Hugging Face format."""
    folder = tmp_path_factory.mktemp("beginner")
    cold = ["cold_start.steps=250", "cold_start.cooldown_steps=50", "eval.questions=0"]
    training.train(override(tiny_world.config(), cold), folder / "run", cold_start_only=True)
    return export(str(folder / "run"), folder / "model", "float32")


def run_config(beginner: Path, *overrides: str) -> Config:
    config = tiny_world.config()
    policy = replace(config.policy, model=str(beginner), architecture=None)
    cold_start = replace(config.cold_start, steps=0)
    config = replace(config, policy=policy, cold_start=cold_start)
    return override(config, [*SHORT, *overrides])


def reward(function: Callable) -> str:
    return f"stage2.reward={__name__}:{function.__name__}"


@cache
def _original_batch():
    return TinyWorldEnvironment._batch


def finds_nothing(self: TinyWorldEnvironment, world: TinyWorld, size: int) -> Batch:
    return Batch(_original_batch()(self, world, size).questions, EmptyRetriever())


def samples_from_old_weights(self: Engine, params, *args, **options):
    stale = jax.tree.map(lambda p: p * 0.8, params)
    return Engine.roll(self, stale, *args, **options)


@pytest.fixture(autouse=True)
def any_learning_rate(monkeypatch):
    """Allows higher learning rates than recipes do, so that runs surely fail."""
    monkeypatch.setitem(declared(OptimizerConfig), "learning_rate", (float, None))


RUNS = {
    "not_finite": ["optimizer.learning_rate=1e38", "run.stop_when_unhealthy=true"],
    "entropy_collapse": [reward(pays_for_silence), "stage2.steps=30"],
    "entropy_explosion": [reward(pays_for_noise), "stage2.steps=60"],
    "ratio_drift": ["optimizer.learning_rate=1e-2", "algorithm.clip=0.9"],
    "logprob_diff": [],
    "format_falling": [reward(pays_for_broken_format)],
    "no_searches": [reward(pays_for_not_searching), "optimizer.learning_rate=2e-4"],
    "search_limit": [reward(pays_for_searching), "rollout.max_searches=1"],
    "empty_documents": [],
    "identical_responses": ["rollout.temperature=0.01"],
    "reward_without_f1": [reward(pays_for_words)],
    "length_blow_up": [reward(pays_for_words), "rollout.max_turn_length=150", "stage2.steps=24"],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_a_failing_run_fires_its_signal(beginner, tmp_path, monkeypatch, name):
    if name == "empty_documents":
        _original_batch()
        monkeypatch.setattr(TinyWorldEnvironment, "_batch", finds_nothing)
    if name == "logprob_diff":
        monkeypatch.setattr(Engine, "roll", Engine.run, raising=False)
        monkeypatch.setattr(Engine, "run", samples_from_old_weights)
    try:
        training.train(run_config(beginner, *RUNS[name]), tmp_path / "run")
    except UnhealthyRun as error:
        assert "the run was stopped after step" in str(error)
        assert name == "not_finite" or list((tmp_path / "run" / "checkpoints").glob("[0-9]*"))
    fired = {
        f["signal"] for row in rows_so_far(tmp_path / "run/metrics.jsonl") for f in row["health"]
    }
    assert name in fired


@pytest.mark.slow
def test_a_fatal_signal_stops_the_run_and_keeps_the_previous_step(tmp_path):
    """Parameters with NaN must not replace the saved ones."""
    config = override(
        tiny_world.config(),
        [*SHORT, "cold_start.steps=0", *RUNS["not_finite"]],
    )
    with pytest.raises(UnhealthyRun, match=r"not_finite.*older checkpoint"):
        training.train(config, tmp_path / "run")
    rows = rows_so_far(tmp_path / "run" / "metrics.jsonl")
    assert rows[-1]["health"][0]["level"] == "fatal"
    saved = [int(p.name) for p in (tmp_path / "run" / "checkpoints").glob("[0-9]*")]
    assert max(saved) <= rows[-1]["step"]
