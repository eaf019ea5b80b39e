"""The compiled rollout loop: its laws, and its equality with the host loop."""

import dataclasses
import threading
import time
from functools import partial

import jax
import numpy as np
import pytest

from r1s_jax.config import AlgorithmConfig, SearchConfig
from r1s_jax.data.questions import Question
from r1s_jax.learning.collect import Rewarded
from r1s_jax.learning.policy_gradient import Learned
from r1s_jax.models.decoder import Policy
from r1s_jax.models.params import init_params
from r1s_jax.models.sharding import shard_params
from r1s_jax.protocol import r1_searcher as protocol
from r1s_jax.rewards.rules import Reward
from r1s_jax.rollout.broker import Broker, SearchFailure
from r1s_jax.rollout.engine import Engine
from r1s_jax.rollout.in_flight import trajectories
from r1s_jax.rollout.loop import Until
from r1s_jax.rollout.session import Session
from r1s_jax.rollout.trajectory import Finish, Position
from r1s_jax.tracking.metrics import trace_rows
from tests.fakes import EchoRetriever
from tests.host_loop import HostLoop
from tests.makers import (
    MODEL,
    QUESTIONS,
    make_engine,
    open_session,
    roll,
    roll_in_pieces,
    searching_params,
)
from tests.makers import ROLLOUT as CONFIG


@pytest.fixture(scope="module")
def engine() -> Engine:
    return make_engine()


@pytest.fixture(scope="module")
def rolled(engine):
    return roll(engine)


def assert_same(a, b, rows=slice(None)):
    """Equal tokens, masks and endings; equal log-probabilities up to the order of reductions."""
    for name in ("tokens", "loss_mask", "lengths", "prompt_lengths", "searches", "finish"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name)[rows], err_msg=name)
    np.testing.assert_array_equal(np.sort(a.kept), np.sort(b.kept[rows]))
    for name in ("sample_logprobs", "policy_logprobs", "log_kept"):
        np.testing.assert_allclose(getattr(a, name), getattr(b, name)[rows], atol=2e-5)


def test_the_batch_exercises_every_ending(rolled):
    endings = set(rolled.trajectory.finish.tolist())
    assert {Finish.FINISHED, Finish.LENGTH, Finish.BAD_QUERY} <= endings
    assert rolled.trajectory.searches.max() >= 2
    assert rolled.outcomes["found"] >= 5


def test_mask_selects_exactly_the_sampled_tokens(engine, rolled):
    """All other tokens are the prompt or the tokenised document blocks."""
    t = rolled.trajectory
    for row in range(len(t.lengths)):
        prompt = engine.encode(engine.render(rolled.questions[row].question))
        expected = list(prompt)
        blocks = [
            engine.broker.document_tokens(s.documents)
            for s in rolled.searches[row]
            if s.outcome == "found"
        ]
        tokens, mask = t.tokens[row, : t.lengths[row]], t.loss_mask[row, : t.lengths[row]]
        assert not t.loss_mask[row, t.lengths[row] :].any()
        assert tokens[: len(prompt)].tolist() == prompt
        forced = tokens[~mask].tolist()
        for block in blocks[: t.searches[row]]:
            expected += block
        assert forced == expected
        assert t.searches[row] <= CONFIG.max_searches


def test_log_probabilities_are_those_of_the_policy(rolled):
    """Against one uncached forward pass over the finished trajectories."""
    t = rolled.trajectory
    logits = jax.jit(lambda p, x: Policy(MODEL, p)(x))(searching_params(), t.tokens)
    logprobs = jax.nn.log_softmax(np.asarray(logits, np.float64), axis=-1)[:, :-1]
    expected = np.take_along_axis(np.asarray(logprobs), t.tokens[:, 1:, None], -1)[..., 0]
    mask = t.loss_mask[:, 1:]
    np.testing.assert_allclose(t.policy_logprobs[:, 1:][mask], expected[mask], atol=2e-5)
    # The nucleus (top-p) can only raise the probability of a token in it.
    assert (t.sample_logprobs[t.loss_mask] >= t.policy_logprobs[t.loss_mask] - 1e-6).all()
    assert (t.sample_logprobs[t.loss_mask] <= 1e-6).all()


@pytest.mark.parametrize(
    ("temperature", "speculative_tokens"),
    [*(pytest.param(t, 0, marks=pytest.mark.slow) for t in (0.0, 1.0)), (1.0, 3)],
)
def test_the_host_driven_loop_agrees(temperature, speculative_tokens):
    """Only the host loop uses `speculative_tokens`."""
    engine = make_engine(dataclasses.replace(CONFIG, temperature=temperature))
    params = searching_params()
    rolled = roll(engine, params=params)
    passes, draw = [], HostLoop._draw

    def counted(loop: HostLoop, key) -> list:
        drawn = draw(loop, key)
        passes.append(len(drawn))
        return drawn

    base = jax.random.fold_in(jax.random.key(1), 2)
    for row in range(len(rolled.questions)):
        question, sample = rolled.questions[row], row % 6
        key = jax.random.fold_in(jax.random.fold_in(base, question.id), sample)
        loop = host_loop(engine, params)
        loop.config = dataclasses.replace(loop.config, speculative_tokens=speculative_tokens)
        loop._draw = partial(counted, loop)
        list(loop.run(engine.encode(engine.render(question.question)), key))
        t, length = rolled.trajectory, len(loop.tokens)
        assert loop.tokens == t.tokens[row, : t.lengths[row]].tolist()
        assert loop.mask == t.loss_mask[row, :length].tolist()
        assert (loop.finish, loop.searches) == (t.finish[row], t.searches[row])
        np.testing.assert_allclose(loop.policy_logprobs, t.policy_logprobs[row, :length], atol=2e-5)
    assert (max(passes) > 1) == (speculative_tokens > 0)


def test_traces_name_every_token_and_its_advantage(engine, rolled):
    t = rolled.trajectory
    advantages = np.arange(t.tokens.size, dtype=np.float32).reshape(t.tokens.shape)
    rewards = [Reward(0.0, {})] * len(t.tokens)
    learned = Learned(advantages, [], 0.0, 1.0, token_kl=0.5 * advantages)
    batch = Rewarded.of(rolled, rewards, AlgorithmConfig())
    rows = list(trace_rows(batch, learned, len(rewards), engine.token_texts))
    ended = 0
    for i, row in enumerate(rows):
        ids = t.tokens[i][t.loss_mask[i]].tolist()
        texts = [text for text, _ in row["token_advantages"]]
        assert len(texts) == row["sampled_tokens"] == len(ids)
        assert "".join(texts) == rolled.solutions[i].written
        expected = ["" if j in engine.eos_ids else engine.decode([j]).strip() for j in ids]
        assert [text.strip() for text in texts] == expected
        ended += ids[-1] in engine.eos_ids
        advantages_of_row = [advantage for _, advantage in row["token_advantages"]]
        np.testing.assert_allclose(advantages_of_row, advantages[i][t.loss_mask[i]], rtol=1e-3)
        np.testing.assert_allclose(row["token_kl"], 0.5 * advantages[i][t.loss_mask[i]], rtol=1e-3)
    assert len(rows) == len(rewards) and 0 < ended < len(rows)


def host_loop(engine: Engine, params) -> HostLoop:
    broker = Broker(
        SearchConfig(),
        decode=engine.decode,
        encode=engine.encode,
        documents_per_query=CONFIG.documents_per_query,
        max_documents_length=CONFIG.max_documents_length,
        clean=engine.foreign,
    )
    broker.begin(EchoRetriever())
    dtype = np.dtype("float32")
    return HostLoop(
        model=MODEL,
        params=params,
        config=engine.config,
        compute_dtype=dtype,
        eos_ids=engine.eos_ids,
        broker=broker,
        decode=engine.decode,
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"slots": 1, "prefill_rows": 1},
        pytest.param({"slots": 24}, marks=pytest.mark.slow),
        pytest.param({"prefill_chunk": 32}, marks=pytest.mark.slow),
        pytest.param({"speculative_tokens": 1}, marks=pytest.mark.slow),
        pytest.param({"speculative_tokens": 5}, marks=pytest.mark.slow),
    ],
)
def test_slots_and_chunks_change_nothing(rolled, changes):
    other = roll(make_engine(dataclasses.replace(CONFIG, **changes)))
    assert_same(other.trajectory, rolled.trajectory)


@pytest.mark.parametrize("temperature", [pytest.param(0.0, marks=pytest.mark.slow), 0.3])
@pytest.mark.slow
def test_speculative_tokens_give_the_same_tokens_in_fewer_passes(temperature):
    """The policy repeats itself, so that at low temperatures most guesses are accepted."""
    config = dataclasses.replace(CONFIG, temperature=temperature)
    plain = roll(make_engine(config))
    speculated = roll(make_engine(dataclasses.replace(config, speculative_tokens=4)))
    assert_same(speculated.trajectory, plain.trajectory)
    assert speculated.counters["decode_steps"] < plain.counters["decode_steps"]


@pytest.mark.slow
def test_an_int8_cache_records_nearly_exact_log_probabilities():
    """The log-probabilities are close to those of an exact cache."""
    rolled = roll(make_engine(dataclasses.replace(CONFIG, cache_dtype="int8")))
    t = rolled.trajectory
    logits = jax.jit(lambda p, x: Policy(MODEL, p)(x))(searching_params(), t.tokens)
    exact = jax.nn.log_softmax(logits)[:, :-1]
    exact = np.take_along_axis(np.asarray(exact), t.tokens[:, 1:, None], -1)[..., 0]
    mask = t.loss_mask[:, 1:]
    gap = np.abs(t.policy_logprobs[:, 1:][mask] - exact[mask])
    assert 1e-5 < gap.max() < 0.05


def test_a_trajectory_alone_is_the_same(engine, rolled):
    alone = roll(engine, questions=QUESTIONS[2:3])
    assert_same(alone.trajectory._replace(groups=None), rolled.trajectory, slice(12, 18))


def test_the_order_of_questions_changes_nothing(engine, rolled):
    turned = roll(engine, questions=QUESTIONS[::-1])
    order = np.arange(24).reshape(4, 6)[::-1].ravel()
    assert_same(turned.trajectory, rolled.trajectory, order)


def test_search_latency_changes_nothing(engine, rolled):
    rng = np.random.default_rng(0)
    slow = roll(engine, EchoRetriever(delay=lambda: time.sleep(rng.uniform(0, 0.05))))
    assert_same(slow.trajectory, rolled.trajectory)
    assert sorted(s.query for r in slow.searches for s in r) == sorted(
        s.query for r in rolled.searches for s in r
    )


def test_waiting_rows_do_not_stop_sampling_rows(engine, monkeypatch):
    """The first search waits until another row has sampled on and searches."""
    monkeypatch.setattr(engine.broker, "config", SearchConfig(timeout_s=120.0))
    second, calls, met = threading.Event(), [], []

    def wait_for_another() -> None:
        calls.append(1)
        if len(calls) == 1:
            met.append(second.wait(timeout=60))
        else:
            second.set()

    roll(engine, EchoRetriever(delay=wait_for_another))
    assert met == [True]


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_leaving_and_entering_again_changes_nothing(engine, rolled, seed):
    assert_same(roll_in_pieces(engine, seed), rolled.trajectory)


def test_a_steady_rollout_does_not_depend_on_time(engine, rolled):
    """Slow or fast, documents arrive at the same decode step, so the tokens so far are equal."""
    rng, cuts = np.random.default_rng(0), []
    slow = EchoRetriever(delay=lambda: time.sleep(rng.uniform(0, 0.1)))
    for retriever in (EchoRetriever(), slow):
        session = open_session(engine, retriever, steady=True)
        for steps in (9, 14, 11):
            session.run(Until(steps=steps))
            cuts.append((*session.results()[0], *session.positions()))
        session.run()
        assert_same(session.results()[0], rolled.trajectory)
    for fast, slow in zip(cuts[:3], cuts[3:], strict=True):
        for a, b in zip(fast, slow, strict=True):
            np.testing.assert_array_equal(a, b)
    assert cuts[0][-1].any() or cuts[1][-1].any(), "no query was out when the loop was left"


def test_the_loop_stops_when_enough_groups_are_complete(engine):
    session = open_session(engine)
    session.run(Until(groups=2))
    t, _ = session.results()
    ended = (t.finish > 0).reshape(4, 6).all(1)
    assert ended.sum() >= 2 and not ended.all()


def test_a_trajectory_resumed_in_another_rollout_ends_the_same(engine, rolled):
    """As in a later step: the text is prefilled again in another order, with its own keys."""
    session = open_session(engine)
    session.run(Until(steps=9))
    t, _ = session.results()
    at = session.positions()
    flights = engine.begin(QUESTIONS, samples=6, step=2)
    for row, flight in enumerate(flights):
        flight.absorb(t, row, step=2, at=at)
    unfinished = [f for f in flights if not f.ended]
    assert any(f.loss_mask.any() for f in unfinished)
    assert any(Position(*f.at).asked for f in unfinished)
    engine.broker.begin(EchoRetriever())
    prompts = engine.prompts(unfinished, 1, engine.config.max_length)
    session = Session(engine.programs, searching_params(), prompts, engine.tag_table)
    session.run()
    t, _ = session.results()
    for row, flight in enumerate(unfinished):
        flight.absorb(t, row, step=3)
    assert all(f.ended for f in flights)
    assert_same(
        trajectories(
            flights,
            CONFIG.max_length,
            rolled.trajectory.groups,
            rolled.trajectory.kept.shape[2],
        ),
        rolled.trajectory,
    )
    for flight in unfinished:
        assert set(flight.drawn[~flight.loss_mask]) == {-1}
        assert set(flight.drawn[flight.loss_mask]) <= {2, 3}


def test_the_limits_hold(rolled):
    t = rolled.trajectory
    assert (t.lengths <= CONFIG.max_length).all()
    for mask in t.loss_mask:
        runs = np.diff(np.flatnonzero(np.diff(np.pad(mask.astype(int), 1))))[::2]
        assert (runs <= CONFIG.max_turn_length).all()


def test_first_search_is_forced_and_carries_no_loss():
    config = dataclasses.replace(CONFIG, retrieve_first=True, max_prompt_length=64)
    rolled = roll(make_engine(config))
    for solution, question in zip(rolled.solutions, rolled.questions, strict=True):
        text, by_policy = solution.spans[0]
        assert not by_policy
        assert question.question.rstrip("?") in text.replace(" ?", "?")
        assert protocol.BEGIN_DOCUMENTS in text
    t = rolled.trajectory
    assert (t.searches >= 1).all() and all(searches for searches in rolled.searches)
    assert not any(t.loss_mask[i, : t.prompt_lengths[i]].any() for i in range(len(t.lengths)))


@pytest.mark.parametrize(
    "kind",
    ["hangs", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("raises", "garbage"))],
)
def test_a_broken_retriever_ends_the_rollout_cleanly(kind):
    engine = make_engine(search=SearchConfig(timeout_s=0.3, retries=0))
    with pytest.raises(SearchFailure, match="searches failed"):
        roll(engine, BrokenRetriever(kind))
    assert engine.broker.failures > 0


class BrokenRetriever:
    def __init__(self, kind: str):
        self.kind = kind

    def search(self, queries, k):
        if self.kind == "raises":
            raise ConnectionError("no route to the index")
        if self.kind == "hangs":
            time.sleep(3600)
        return "what?" if self.kind == "garbage" else [[] for _ in queries]


def test_a_prompt_that_is_too_long_is_named(engine):
    with pytest.raises(ValueError, match=r"question 5 .*more than rollout.max_prompt_length=24"):
        roll(engine, questions=[Question(5, "What is the trade of " * 9, ("x",))])


def test_engines_of_equal_settings_share_their_programs_but_not_their_searches(engine, rolled):
    other = make_engine(CONFIG)
    assert other.programs is engine.programs
    engine.broker.begin(None)
    assert_same(roll(other).trajectory, rolled.trajectory)
    assert other.broker.log and not engine.broker.log
    assert make_engine(dataclasses.replace(CONFIG, top_p=0.5)).programs is not engine.programs


@pytest.mark.slow
def test_the_cache_is_never_copied():
    """The compiled loop holds one cache; all its other memory is small."""
    model = dataclasses.replace(MODEL, num_layers=6, head_dim=32)
    config = dataclasses.replace(CONFIG, slots=8, max_length=1024, prefill_rows=2)
    engine = make_engine(config, model=model)
    flights = engine.begin(QUESTIONS, samples=2, step=0)
    arrays = engine.prompts(flights, 0, config.max_prompt_length)
    params = shard_params(init_params(model, 0), model, engine.mesh)
    compiled = engine.programs.whole.lower(params, arrays, engine.tag_table).compile()
    capacity = config.max_length + config.prefill_chunk
    cache = 2 * 4 * model.num_layers * 8 * model.num_kv_heads * capacity * model.head_dim
    assert compiled.memory_analysis().temp_size_in_bytes < 1.25 * cache
