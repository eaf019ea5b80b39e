"""Prompts that begin alike are computed once; no token changes."""

import dataclasses

import numpy as np
import pytest

from r1s_jax.data.questions import Question
from r1s_jax.rollout import in_flight
from r1s_jax.rollout.in_flight import InFlight, shared_beginning
from r1s_jax.rollout.loop import Until
from r1s_jax.rollout.session import Session
from tests.fakes import EchoRetriever
from tests.makers import QUESTIONS, ROLLOUT, make_engine, roll, searching_params
from tests.rollout.test_loop import assert_same

START = f"{QUESTIONS[0].question} {QUESTIONS[1].question}"
ALIKE = [dataclasses.replace(q, question=f"{START} {q.question}") for q in QUESTIONS]
CONFIG = dataclasses.replace(ROLLOUT, max_prompt_length=64, slots=5, prefill_rows=2)


def flight(*tokens: int) -> InFlight:
    question = Question(0, "q", ("a",))
    return InFlight.begun(question, tokens, sample=0, occurrence=0, step=0, draw=0, start=0)


def test_the_shared_beginning_ends_where_two_prompts_differ():
    start = list(range(20))
    assert shared_beginning([flight(*start, 1, 2), flight(*start, 3, 4, 5), None]) == 20
    assert shared_beginning([flight(*start), flight(*start)]) == 19, "the last token is not fed"
    assert shared_beginning([flight(*start[:18]), flight(*start)]) == 17
    assert shared_beginning([flight(*start[:15], 99, 1), flight(*start)]) == 0, "a few"
    assert shared_beginning([flight(7, *start), flight(*start)]) == 0
    assert shared_beginning([flight(1), flight(2)]) == shared_beginning([None]) == 0


@pytest.fixture
def compared(monkeypatch):
    """Rolls out `ALIKE` with and without sharing."""

    def rolled(engine, run=roll):
        apart = run(engine, questions=ALIKE)
        with monkeypatch.context() as patch:
            patch.setattr(in_flight, "_LEAST_SHARED", 4)
            return run(engine, questions=ALIKE), apart

    monkeypatch.setattr(in_flight, "_LEAST_SHARED", 1000)
    return rolled


@pytest.mark.parametrize(
    "changes",
    [
        {},
        pytest.param({"slots": 24, "prefill_chunk": 5}, marks=pytest.mark.slow),
        pytest.param({"slots": 1, "prefill_rows": 1}, marks=pytest.mark.slow),
        pytest.param({"speculative_tokens": 3}, marks=pytest.mark.slow),
        pytest.param({"cache_dtype": "int8"}, marks=pytest.mark.slow),
    ],
)
def test_tokens_are_the_same_and_fewer_are_computed(compared, changes):
    shared, apart = compared(make_engine(dataclasses.replace(CONFIG, **changes)))
    if "cache_dtype" not in changes:
        assert_same(shared.trajectory, apart.trajectory)
    np.testing.assert_array_equal(shared.trajectory.tokens, apart.trajectory.tokens)
    begin = shared_length(make_engine(CONFIG))
    assert begin > 10
    saved = apart.counters["prefill_tokens"] - shared.counters["prefill_tokens"]
    # Without sharing the beginning is computed once a group, or once a sample with one slot.
    times = len(apart.trajectory.lengths) if changes.get("slots") == 1 else len(ALIKE)
    assert saved == begin * (times - 1)


def shared_length(engine) -> int:
    prompts = [engine.prompt_tokens(q.question) for q in ALIKE]
    return next(i for i, tokens in enumerate(zip(*prompts, strict=False)) if len(set(tokens)) > 1)


@pytest.mark.slow
def test_leaving_and_entering_again_changes_nothing(compared):
    def in_pieces(engine, questions):
        engine.broker.begin(EchoRetriever())
        flights = engine.begin(questions, samples=6, step=2)
        prompts = engine.prompts(flights, 1, engine.config.max_prompt_length)
        session = Session(engine.programs, searching_params(), prompts, engine.tag_table)
        rng = np.random.default_rng(0)
        while not session.over:
            session.run(Until(steps=int(rng.integers(1, 30))))
        return session.results()[0]

    assert_same(*compared(make_engine(CONFIG), in_pieces))
