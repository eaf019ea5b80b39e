"""Forks: equal to what the host loop samples when one search goes otherwise."""

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest

from r1s_jax import presets
from r1s_jax.config import override
from r1s_jax.configs import tiny_world
from r1s_jax.io.errors import ConfigError
from r1s_jax.presets import Settings
from r1s_jax.protocol.tool_call import ToolCall
from r1s_jax.rollout.broker import Search
from r1s_jax.rollout.callback_arrays import Status
from r1s_jax.rollout.engine import Rolled
from r1s_jax.rollout.trajectory import turn_numbers
from tests.fakes import EchoRetriever
from tests.host_loop import HostLoop
from tests.makers import QUESTIONS, make_engine, roll, searching_params
from tests.makers import ROLLOUT as CONFIG

TRUNK = ("tokens", "loss_mask", "sample_logprobs", "policy_logprobs", "lengths", "finish")


def forking(
    kind: str, share: float = 1.0, most: int = 2, depth: int = 1, draws: int = 1, **more: Any
):
    fields = {"forks": share, "fork": kind, "forks_per_trajectory": most, "fork_depth": depth}
    fields["fork_draws"] = draws
    return make_engine(dataclasses.replace(CONFIG, **fields, **more))


def trunks(rolled: Rolled) -> Rolled:
    assert rolled.parents is not None
    return rolled.take(np.flatnonzero(rolled.parents < 0))


class OtherwiseLoop(HostLoop):
    """The host loop in which the searches of some turns go otherwise."""

    def otherwise(
        self, kind: str, turns: set[int], draws: dict[int, int], openings: Any, other: str
    ) -> None:
        """Takes another random key after each turn of `draws`."""
        self._kind, self._turns, self._openings, self._other = kind, turns, openings, other
        self._draws, self._folds = draws, list[int]()
        self._turn, plain = 0, self.broker._run

        def run(retriever: Any, searches: list[Search]) -> None:
            if self._turn in self._turns and self._kind == "random":
                searches[0].sent = self._other
            plain(retriever, searches)

        self.broker._run = run

    def _sample(self, key: Any) -> int:
        for draw in self._folds:
            key = jax.random.fold_in(jax.random.fold_in(key, 2**31 - 2), draw)
        return super()._sample(key)

    def _search(self, turn: list[int]):
        self._folds += filter(None, [self._draws.pop(self._turn, 0)])
        taken = self._turn in self._turns and self._kind != "random"
        self._turn += 1
        if not taken:
            self._turn -= 1
            event = super()._search(turn)
            self._turn += 1
            return event
        count = len(turn)
        if self._kind == "answer":
            self._drawn = []
            for name in ("tokens", "mask", "policy_logprobs"):
                del getattr(self, name)[-count:]
            self._cached = min(self._cached, len(self.tokens))
            # It is not a reply, so the turn goes on as the same.
            reply, self._turn = self._openings(self._turn == 1), self._turn - 1
            self._turns = self._turns - {self._turn}
            self._force(reply)
            return None
        answer = self.broker.answer_now
        calls = self.broker.dialect.calls(self.decode(turn[-CONFIG.max_query_length :]), False)
        bad = any(call.problem for call in calls)
        reply = (Status.EMPTY, 1, self.broker.document_tokens([]), [])
        self.broker.answer_now = lambda *a: answer(*a) if bad else reply
        event = super()._search(turn)
        self.broker.answer_now = answer
        return event


def path(rolled: Rolled, row: int) -> tuple[set[int], dict[int, int]]:
    """Of the trajectories from `row` up: the turns that went otherwise, and the draws of turns."""
    turns, draws, t = set(), {}, rolled.trajectory
    full = full_masks(rolled)
    while rolled.parents[row] >= 0:
        parent = rolled.parents[row]
        turn = int(turn_numbers(full[[parent]])[0, t.forked[row] - 1])
        kin = (rolled.parents == parent) & (t.forked == t.forked[row])
        kin &= rolled.with_search == rolled.with_search[row]
        # The trajectory itself is the first of those with the search.
        draws[turn] = int(kin[:row].sum()) + rolled.with_search[row]
        turns |= set() if rolled.with_search[row] else {turn}
        row = parent
    return turns, draws


def full_masks(rolled: Rolled) -> np.ndarray:
    """The masks of all that was sampled, in a fork's parent too."""
    t, full = rolled.trajectory, rolled.trajectory.loss_mask.copy()
    for row, parent in enumerate(rolled.parents):
        if parent >= 0:
            first = int(t.loss_mask[row].argmax()) if t.loss_mask[row].any() else t.lengths[row]
            n = min(int(first), int(t.forked[row]))
            same = (t.tokens[row, :n] == t.tokens[parent, :n]).cumprod().astype(bool)
            full[row, :n] |= full[parent, :n] & same
    return full


@pytest.mark.parametrize(
    ("kind", "depth", "draws"),
    [("nothing", 1, 1), ("random", 1, 1), ("answer", 1, 3), ("nothing", 2, 1), ("random", 2, 2)],
)
def test_a_fork_is_what_the_host_loop_samples_when_that_search_goes_otherwise(kind, depth, draws):
    """Its own draws too, with the search and without it."""
    most = 2 if draws == 1 else 1
    engine, params = forking(kind, most=most, depth=depth, draws=draws), searching_params()
    rolled = roll(engine, params=params)
    t, forks = rolled.trajectory, np.flatnonzero(rolled.parents >= 0)
    assert len(forks) >= 8
    assert (rolled.parents[rolled.parents[forks]] >= 0).any() == (depth > 1)
    assert rolled.with_search.sum() * (2 * draws - 1) == len(forks) * (draws - 1)
    base, samples, trunk = jax.random.fold_in(jax.random.key(1), 2), {}, 0
    for row in range(len(t.lengths)):
        trunk = row if rolled.parents[row] < 0 else trunk
        samples.setdefault(trunk, len(samples))
        question, sample = rolled.questions[row], samples[trunk] % 6
        if row not in forks[:: 3 if draws > 1 else 1]:
            continue
        single = make_engine()
        single.broker.begin(EchoRetriever())
        loop = OtherwiseLoop.of(single, params)
        after = [q.question for q in QUESTIONS]
        other = after[(after.index(question.question) + 1) % len(after)]
        loop.otherwise(kind, *path(rolled, row), lambda first: engine._openings[first][0], other)
        key = jax.random.fold_in(jax.random.fold_in(base, question.id), sample)
        list(loop.run(engine.encode(engine.render(question.question)), key))
        assert loop.tokens == t.tokens[row, : t.lengths[row]].tolist()
        assert (loop.finish, loop.searches) == (t.finish[row], t.searches[row])
        own = t.loss_mask[row]
        np.testing.assert_array_equal(own[: len(loop.mask)] & ~np.array(loop.mask), False)
        logprobs = np.zeros(own.shape)
        logprobs[: len(loop.tokens)] = loop.policy_logprobs
        np.testing.assert_allclose(logprobs[own], t.policy_logprobs[row][own], atol=2e-5)


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("nothing", {}),
        ("answer", {"speculative_tokens": 3}),
        ("random", {"cache_dtype": "int8", "top_p": 1.0}),
    ],
)
def test_trajectories_are_the_same_with_forks_and_without(kind, more):
    plain = roll(make_engine(dataclasses.replace(CONFIG, **more)))
    rolled = roll(forking(kind, depth=2, **more))
    t = trunks(rolled).trajectory
    for name in TRUNK:
        np.testing.assert_array_equal(getattr(t, name), getattr(plain.trajectory, name), name)
    assert len(rolled.questions) > len(plain.questions)
    assert rolled.counters["forks"] == len(rolled.questions) - len(plain.questions)


def test_forks_do_not_depend_on_slots_or_on_when_the_loop_is_left():
    """What is copied from a slot is what would be computed."""
    assert CONFIG.slots < 6  # samples of a question, and forks beside them
    few = roll(forking("nothing", depth=2))
    many = roll(forking("nothing", slots=64, depth=2))
    for name in ("tokens", "loss_mask", "lengths", "finish", "searches", "forked"):
        np.testing.assert_array_equal(
            getattr(few.trajectory, name), getattr(many.trajectory, name), name
        )
    assert few.solutions == many.solutions


def test_a_share_of_the_queries_is_forked_and_what_has_no_room_is_counted():
    whole = roll(forking("nothing", most=1))
    assert whole.counters["forks_left_out"] > 0
    counts = [roll(forking("nothing", share, most=8)).counters for share in (0.3, 1.0)]
    assert 0 < counts[0]["forks"] < counts[1]["forks"]
    assert counts[1]["forks_left_out"] == 0


def test_the_searches_of_a_fork_are_its_parents_and_its_own():
    for kind, outcome in (("nothing", "withheld"), ("answer", "taken_back")):
        rolled = roll(forking(kind))
        for row, parent in enumerate(rolled.parents):
            if parent < 0:
                continue
            own, before = rolled.searches[row], rolled.searches[parent]
            (turn,) = path(rolled, row)[0]
            assert own[:turn] == before[:turn]
            assert own[turn].outcome in (outcome, "bad_query", "long_query")
        assert rolled.outcomes[outcome] > 0


def test_the_beginning_of_an_answer_counts_as_the_policys_text():
    rolled = roll(forking("answer"))
    forks = [s for s, p in zip(rolled.solutions, rolled.parents, strict=True) if p >= 0]
    begun = [s for s in forks if "<answer>" in s.written]
    assert len(begun) == len(forks)
    assert any(s.answer is not None for s in forks)


def test_forks_that_cannot_be_are_refused():
    with pytest.raises(ConfigError, match="only one"):
        roll(forking("random"), questions=QUESTIONS[:1])
    assert CONFIG.tree_rows == 1
    engine = forking("answer")
    engine.dialect = ToolCall()
    with pytest.raises(ConfigError, match="no tag begins an answer in the dialect tool_call"):
        engine._check_forks()
    for preset in (presets.serving, presets.selection):
        with pytest.raises(ConfigError, match="only r1s train and r1s eval run make forks"):
            Settings(preset, ["rollout.forks=1"]).config()
    for changes, message in {
        ("algorithm.credit=fork",): "set rollout.forks above 0",
        ("algorithm.forks_teach=true",): "set rollout.forks above 0",
        ("rollout.forks=1", "rollout.fork=random", "stage2.questions_per_step=1"): "at least 2",
        ("rollout.fork=everything",): "rollout.fork",
        ("rollout.forks=1", "rollout.fork_draws=16", "rollout.fork_depth=3"): "lower one of them",
    }.items():
        with pytest.raises(ConfigError, match=message):
            override(tiny_world.config(), changes)


def test_forks_without_room_are_said_once(capsys):
    engine = forking("nothing", most=1)
    for _ in range(2):
        roll(engine)
    assert capsys.readouterr().err.replace("\n", " ").count("forks already") == 1
