"""From rewards to parameters, with packing and several updates, against NumPy; 1 and 4 devices."""

import subprocess
import sys
from dataclasses import replace
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from r1s_jax.config import AlgorithmConfig, MeshConfig, StageConfig, override
from r1s_jax.configs import tiny_world
from r1s_jax.data.environment import Batch
from r1s_jax.data.questions import Question
from r1s_jax.learning.collect import Collector, Rewarded, learnable, search_costs
from r1s_jax.learning.learner import Learner, LearnerState
from r1s_jax.learning.losses import policy_loss
from r1s_jax.learning.policy_gradient import PolicyGradient, importance_weights
from r1s_jax.models.sharding import make_mesh, place, replicated
from r1s_jax.protocol.solution import Solution
from r1s_jax.rewards.rules import Reward
from r1s_jax.rollout.engine import Rolled, merge
from r1s_jax.rollout.trajectory import Finish, Trajectory, turn_numbers
from r1s_jax.tracking.metrics import rollout_metrics, update_metrics
from tests.learning.test_advantages import ESTIMATORS
from tests.learning.test_advantages import oracle as advantages_oracle
from tests.makers import with_devices

N, W, VOCABULARY, UPDATES, LONGEST = 10, 14, 7, 2, 17
PLAIN = AlgorithmConfig()
SEARCHED = (
    "<|begin_of_query|> q <|end_of_query|>\n\n<|begin_of_documents|>\n(1)a b\n"
    "<|end_of_documents|>\n\n<answer> a </answer>"
)


class TableLearner(Learner):
    """The real update of a tabular policy with a logprob per token, which NumPy can reproduce."""

    def _forward(self, params, batch):
        logprobs = params["table"][batch.tokens]
        return logprobs, -logprobs, jnp.zeros(logprobs.shape)

    def start(self, table: np.ndarray, reference: np.ndarray) -> LearnerState:
        tables = place(
            ({"table": jnp.float32(table)}, {"table": jnp.float32(reference)}),
            replicated(self.mesh),
        )
        return LearnerState(tables[0], self.optimizer.init(tables[0]), tables[1])


def make_batch(seed: int) -> tuple[Trajectory, np.ndarray]:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, W + 1, N).astype(np.int32)
    inside = np.arange(W) < lengths[:, None]
    mask = inside & (rng.random((N, W)) < 0.6)
    mask[rng.random(N) < 0.15] = False
    sampled = rng.normal(-2, 0.3, (N, W)).astype(np.float32)
    trajectory = Trajectory(
        tokens=np.where(inside, rng.integers(0, VOCABULARY, (N, W)), 0).astype(np.int32),
        loss_mask=mask,
        sample_logprobs=sampled,
        policy_logprobs=sampled,
        kept=np.zeros((N, W, 0), np.int32),
        log_kept=np.zeros((N, W), np.float32),
        lengths=lengths,
        prompt_lengths=np.zeros(N, np.int32),
        groups=np.sort(rng.integers(0, 4, N)).astype(np.int32),
        searches=np.zeros(N, np.int32),
        finish=rng.choice([Finish.FINISHED, Finish.FINISHED, Finish.SEARCH_ERROR], N),
        forked=np.zeros(N, np.int32),
    )
    return trajectory, rng.choice([-2, 0, 0.5, 1], N).astype(np.float32)


def rolled_of(trajectory: Trajectory) -> Rolled:
    nothing, said = ((),) * N, (Solution.of_text("<answer> a </answer>"),) * N
    return Rolled(nothing, trajectory, said, nothing, {}, 1.0, {})


def rewarded_of(t: Trajectory, values, algorithm=PLAIN, **changed) -> Rewarded:
    rolled = replace(rolled_of(t), **changed)
    return Rewarded.of(rolled, [Reward(float(v), {}) for v in values], algorithm)


def oracle(a, t, rewards, table, reference, seed, step, rate):
    """All updates in NumPy float64; returns the final table."""
    table = table.astype(np.float64)
    mask = t.loss_mask & (t.finish == Finish.FINISHED)[:, None]
    old = table[t.tokens] if a.tis_cap else t.policy_logprobs
    capped = np.minimum(np.exp(old - t.policy_logprobs), a.tis_cap)
    correction = capped if a.tis_cap else np.ones((N, W))
    gap = reference[t.tokens] - old
    kl = {"k1": -gap, "k2": gap**2 / 2, "k3": np.exp(gap) - gap - 1}[a.kl_estimator]
    in_reward = a.kl_coefficient if a.kl_penalty == "reward" else 0.0
    advantages = advantages_oracle(a.estimator, rewards, t.groups, mask, kl, in_reward)
    inside = np.arange(W) < t.lengths[:, None]
    documents = inside & ~t.loss_mask & mask.any(1, keepdims=True)
    order = np.random.default_rng((seed, step)).permutation(N)
    for part in np.array_split(order, UPDATES):
        gradient, rows = np.zeros(VOCABULARY), max(1, sum(mask[i].any() for i in part))
        for i in part[mask[part].any(1)]:
            at = mask[i]
            share = 1 / (at.sum() * rows)
            if a.loss_average == "token":
                share = 1 / mask[part].sum()
            if a.loss_average == "constant":
                share = 1 / (rows * LONGEST)
            tokens, advantage = t.tokens[i, at], advantages[i, at]
            log_ratio = table[tokens] - old[i, at]
            slope = -correction[i, at] * slopes(a, log_ratio, advantage, old[i, at]) * advantage
            if a.sequence_mask and abs(np.exp(log_ratio.mean()) - 1) > a.sequence_mask:
                slope[:] = 0
            turn = turn_numbers(t.loss_mask)[i, at]
            for k in set(turn) if a.llds_coefficient else ():
                whole = turn == k if a.llds_gate == "action" else turn >= 0
                if log_ratio[whole].sum() < 0:
                    lost = (turn == k) & (log_ratio < 0) & (advantage >= 0)
                    slope -= a.llds_coefficient * lost
            if a.kl_penalty == "loss":
                gap = table[tokens] - reference[tokens]
                slope += a.kl_coefficient * (gap if a.kl_estimator == "k2" else 1 - np.exp(-gap))
            np.add.at(gradient, tokens, share * slope)
            if a.echo_coefficient and documents[part].any():
                each = a.echo_coefficient / documents[part].sum()
                np.add.at(gradient, t.tokens[i, documents[i]], -each)
        table = table - rate * gradient
    return table


def slopes(a, log_ratio, advantage, old):
    """The derivative of a sequence's objective by each log-probability, in units of advantages."""
    ratio, high = np.exp(log_ratio), a.clip_high or a.clip
    if a.loss == "dppo":
        moved = np.exp(old + log_ratio) - np.exp(old)
        return np.where(moved * np.sign(advantage) > a.clip, 0, np.minimum(ratio, 20))
    if a.loss == "reinforce":
        return np.ones(len(ratio))
    if a.loss == "cispo":
        return np.minimum(ratio, 1 + high)
    if a.loss == "gmpo":
        limited = np.where(
            advantage > 0, np.minimum(log_ratio, high), np.maximum(log_ratio, -a.clip)
        )
        return np.exp(limited.mean()) * (limited == log_ratio)
    if a.loss == "gspo":
        ratio = np.full(len(ratio), np.exp(log_ratio.mean()))
    free = np.where(advantage > 0, ratio < 1 + high, ratio > 1 - a.clip)
    if a.dual_clip:
        free &= ~((advantage < 0) & (ratio > a.dual_clip))
    return free * ratio


SETTINGS = [
    f"rollout.max_length={LONGEST}",
    "rollout.max_prompt_length=8",
    "optimizer.micro_batch_rows=1",
]


def table_learner(algorithm: AlgorithmConfig, dtype: str = "float32") -> TableLearner:
    config, mesh = tiny_world.config(), make_mesh(MeshConfig())
    loss, optimizer = policy_loss(algorithm), optax.sgd(0.5)
    model = config.policy.architecture
    return TableLearner(model, mesh, np.dtype(dtype), "none", optimizer, loss)


OPTIONS = {
    "plain": {},
    "asymmetric": {"clip": 0.05, "clip_high": 0.1},
    "dual": {"clip": 0.1, "dual_clip": 1.2},
    "by token": {"loss_average": "token"},
    "by one length": {"loss_average": "constant"},
    "importance": {"tis_cap": 1.1},
    "kl k1": {"kl_coefficient": 0.1},
    "kl k3": {"kl_coefficient": 0.1, "kl_estimator": "k3"},
    "kl loss": {"kl_coefficient": 0.3, "kl_penalty": "loss", "kl_estimator": "k3"},
    "gspo": {"loss": "gspo", "clip": 0.02, "clip_high": 0.03},
    "cispo": {"loss": "cispo", "clip": 0.05},
    "gmpo": {"loss": "gmpo", "clip": 0.05},
    "reinforce": {"loss": "reinforce"},
    "dppo": {"loss": "dppo", "clip": 0.01},
    "sequence mask": {"sequence_mask": 0.15},
    "likelihood": {"llds_coefficient": 0.5},
    "likelihood by response": {"llds_coefficient": 0.5, "llds_gate": "response"},
    "kl k2": {"kl_coefficient": 0.3, "kl_penalty": "loss", "kl_estimator": "k2"},
    "echo": {"echo_coefficient": 0.3},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_learning_equals_its_oracle(name):
    algorithm = AlgorithmConfig(updates_per_rollout=UPDATES, **OPTIONS[name])
    rate, learner = 0.5, table_learner(algorithm)
    config = override(tiny_world.config(), SETTINGS)
    for estimator, seed in product(ESTIMATORS, range(3)):
        a = replace(algorithm, estimator=estimator)
        t, rewards = make_batch(seed)
        rng = np.random.default_rng((seed, 1))
        table, reference = rng.normal(-2, 0.3, (2, VOCABULARY)).astype(np.float32)
        state, learned = PolicyGradient(replace(config, algorithm=a), learner).learn(
            learner.start(table, reference),
            rewarded_of(t, rewards),
            step=seed,
            kl_coefficient=a.kl_coefficient,
            learning_rate_scale=1.0,
        )
        expected = oracle(a, t, rewards, table, reference, config.seed, seed, rate)
        np.testing.assert_allclose(state.params["table"], expected, rtol=1e-6, atol=1e-6)
        assert len(learned.updates) == UPDATES
        assert seed == 2 or np.abs(expected - table).max() > 1e-2


@pytest.mark.slow
def test_learning_equals_its_oracle_on_four_devices():
    code = "import jax, pytest, sys; assert len(jax.devices()) == 4; sys.exit(pytest.main("
    code += f"[{__file__!r}, '-k', 'test_learning_equals_its_oracle and not four', '-p', "
    code += "'no:cacheprovider']))"
    done = subprocess.run(
        [sys.executable, "-c", code], env=with_devices(4), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert "." * len(OPTIONS) in done.stdout


def test_each_option_has_an_effect():
    """Each option changes the result; otherwise its comparison would be void."""
    t, rewards = make_batch(0)
    rng = np.random.default_rng(0)
    table, reference = rng.normal(-2, 0.3, (2, VOCABULARY)).astype(np.float32)

    def learned(**options):
        a = AlgorithmConfig(updates_per_rollout=UPDATES, **options)
        return oracle(a, t, rewards, table, reference, 0, 0, 0.5)

    plain = learned()
    for name, options in OPTIONS.items():
        assert name == "plain" or np.abs(learned(**options) - plain).max() > 1e-4, name


def test_importance_weights_are_truncated_from_above():
    got = importance_weights(np.log([0.2, 0.5, 0.9]), np.log([0.4, 0.5, 0.1]), cap=2.0)
    np.testing.assert_allclose(got, [0.5, 1.0, 2.0])


def test_groups_without_signal_are_replaced_and_the_number_stays():
    t, _ = make_batch(0)
    groups = np.repeat(np.arange(5), 2)
    t = t._replace(
        groups=groups, loss_mask=np.ones((N, W), bool), finish=np.full(N, Finish.FINISHED)
    )
    rewards = np.array([0, 0, 0, 1, 1, 1, 1, 0, 2, 2.0])

    def chosen(count: int, *, unanswered=False, **finish) -> list[int]:
        said = [
            Solution.of_text("?" if v else "<answer> a </answer>")
            for v in unanswered | (groups < 0)
        ]
        a = AlgorithmConfig(mask_truncated=True, mask_unanswered=True)
        batch = rewarded_of(t._replace(**finish), rewards, a, solutions=tuple(said))
        metrics = rollout_metrics(batch)
        assert metrics["groups_without_signal"] == 1 - len(set(groups[batch.teaches])) / 5
        return batch.first_groups(count).groups.tolist()

    assert chosen(2) == [1, 1, 3, 3]
    assert chosen(3) == [0, 0, 1, 1, 3, 3]
    assert chosen(5) == groups.tolist()
    for reason in (Finish.SEARCH_ERROR, Finish.LENGTH, Finish.SEARCH_LIMIT, Finish.TOO_OLD):
        ended = np.where(groups == 3, reason, Finish.FINISHED)
        assert chosen(1, finish=ended) == [1, 1], "nothing to learn there"
    assert chosen(1, unanswered=groups == 1) == [3, 3]


def test_truncated_and_unanswered_trajectories_are_trained_unless_masked():
    t, _ = make_batch(0)
    ends = [Finish.FINISHED, Finish.LENGTH, Finish.SEARCH_LIMIT, Finish.TOO_OLD, Finish.BAD_QUERY]
    ends += [Finish.SEARCH_ERROR, Finish.ABORTED]
    t = t._replace(
        finish=np.resize(ends, N), loss_mask=np.ones((N, W), bool), groups=np.zeros(N, int)
    )
    unanswered = t.finish == Finish.FINISHED

    def finishes_trained(**options) -> set[int]:
        mask = learnable(t, AlgorithmConfig(**options), unanswered, np.zeros(N))
        assert (mask.all(-1) == mask.any(-1)).all()
        return set(t.finish[mask.any(-1)].tolist())

    assert finishes_trained() == set(ends[:5])
    assert finishes_trained(mask_truncated=True) == {Finish.FINISHED, Finish.BAD_QUERY}
    assert finishes_trained(mask_unanswered=True) == set(ends[1:5])


@pytest.mark.parametrize(
    ("options", "dtype"),
    [
        ({}, "float32"),
        ({"tis_cap": 2.0}, "float32"),
        ({"loss": "gspo", "clip": 3e-4}, "bfloat16"),
    ],
)
@pytest.mark.parametrize("aged", [False, True])
def test_the_logprob_difference_is_to_the_sampler_whatever_the_ratios(options, dtype, aged):
    """The sampler differs by 3 nats; tokens of older parameters differ more and are excluded."""
    t, rewards = make_batch(0)
    rng = np.random.default_rng(0)
    table = rng.normal(-2, 0.3, VOCABULARY).astype(np.float32)
    ages = rng.integers(0, 2, (N, W)) if aged else np.zeros((N, W), int)
    sampled = (table[t.tokens] - 3 - 5 * ages).astype(np.float32)
    t = t._replace(sample_logprobs=sampled, policy_logprobs=sampled)
    a = AlgorithmConfig(updates_per_rollout=UPDATES, **options)
    config = replace(override(tiny_world.config(), SETTINGS), algorithm=a)
    learner = table_learner(a, dtype)
    _, learned = PolicyGradient(config, learner).learn(
        learner.start(table, table),
        rewarded_of(t, rewards, ages=ages if aged else None),
        step=0,
        kl_coefficient=0.0,
        learning_rate_scale=1.0,
    )
    row = update_metrics(learned, seconds=1.0)
    assert row["logprob_diff_mean"] == pytest.approx(3, rel=1e-4)
    assert row["logprob_diff_max"] == pytest.approx(3, rel=1e-4)
    drift = learned.updates[0]["ratio_drift"]
    assert drift == 0 if options else drift >= 3, "ratios to the learner's own begin at 1"


def test_without_fresh_tokens_there_is_no_logprob_difference():
    t, rewards = make_batch(0)
    learner = table_learner(PLAIN)
    state = learner.start(np.zeros(VOCABULARY), np.zeros(VOCABULARY))
    config = override(tiny_world.config(), SETTINGS)
    old = rewarded_of(t, rewards, ages=np.ones((N, W), int))
    _, learned = PolicyGradient(config, learner).learn(
        state, old, step=0, kl_coefficient=0.0, learning_rate_scale=1.0
    )
    assert not learned.logprob_diff
    assert "logprob_diff_mean" not in update_metrics(learned, seconds=1.0)


def test_dynamic_sampling_draws_until_enough_groups_have_signal():
    """Groups whose only wrong trajectory is cut off, and so masked, have no signal."""
    t, _ = make_batch(0)
    t = t._replace(groups=np.repeat(np.arange(5), 2), loss_mask=np.ones((N, W), bool))
    flat = np.where(np.arange(N) % 2, Finish.LENGTH, Finish.FINISHED)
    values = np.where(flat == Finish.LENGTH, 0.0, 1.0)
    batches = [(flat, values), (flat, values), (np.full(N, Finish.FINISHED), values)]
    drawn = []

    class Fake:
        def batch(self, step, size, draw):
            return Batch([], None)

        def run(self, params, questions, *, draw, **_):
            drawn.append(draw)
            return rolled_of(t._replace(finish=batches[draw][0]))

        def render(self, question):
            return question

        def note(self, questions, rewards):
            assert len(questions) == len(rewards)

    def reward(questions, solutions, golds):
        return [Reward(float(v), {}) for v in batches[drawn[-1]][1]]

    a = AlgorithmConfig(dynamic_sampling=3, mask_truncated=True)
    config = replace(tiny_world.config(), algorithm=a)
    fake = Fake()
    questions = (Question(0, "?", ("a",)),) * N
    fake.run, run = lambda *p, **k: replace(run(*p, **k), questions=questions), fake.run
    collector = Collector(config, fake, fake, {"stage2": reward})
    batch = collector.collect({}, 0, "stage2", StageConfig(1, "f1", questions_per_step=5))
    assert drawn == [0, 1, 2]
    assert set(batch.groups[batch.teaches]) == set(range(10, 15))
    assert set(batch.first_groups(5).groups) == set(range(10, 15))


def test_merged_batches_keep_their_groups_apart():
    t, _ = make_batch(0)
    one = rolled_of(t._replace(groups=np.repeat(np.arange(5), 2)))
    whole = merge([one, one])
    assert whole.trajectory.groups.tolist() == np.repeat(np.arange(10), 2).tolist()
    np.testing.assert_array_equal(whole.trajectory.tokens[N:], t.tokens)
    np.testing.assert_array_equal(whole.take(np.array([3, 12])).trajectory.tokens, t.tokens[[3, 2]])
    assert jax.tree.structure(merge([one])) == jax.tree.structure(one)


def test_searches_cost_little_where_questions_are_hard():
    groups = np.repeat([0, 1, 2], 3)
    rewards = np.array([1, 1, 0, 0, 0, 0, -2, 1, np.nan], np.float32)
    searches = np.array([2, 1, 0, 4, 2, 0, 3, 1, 9])
    got = search_costs(rewards, searches, groups, np.full(9, True))
    np.testing.assert_allclose(got, [2 / 3, 1 / 3, 0, 0, 0, 0, 0, 0, 0], rtol=1e-6)
    t, _ = make_batch(0)
    said = tuple(Solution.of_text(SEARCHED if i % 2 else "<answer> a </answer>") for i in range(N))
    t = t._replace(groups=np.zeros(N, int))
    batch = rewarded_of(t, np.ones(N), replace(PLAIN, search_price=0.5), solutions=said)
    np.testing.assert_allclose(batch.values, np.where(np.arange(N) % 2, 0.5, 1))
    assert all(reward.value == 1 for reward in batch.rewards)


def test_groups_of_equal_rewards_may_teach_otherwise():
    t, _ = make_batch(0)
    t = t._replace(groups=np.zeros(N, int))

    def teaches(algorithm=PLAIN, **parts) -> bool:
        rewards = [Reward(1.0, {}, **parts)] * N
        return bool(Rewarded.of(rolled_of(t), rewards, algorithm).teaches.any())

    assert not teaches()
    others = [
        {"credit": "igpo"},
        {"echo_coefficient": 0.1},
        {"teacher": "gold", "kl_coefficient": 0.1},
    ]
    assert all(teaches(AlgorithmConfig(**options)) for options in others)
    assert teaches(turns=(0.5,))
    gdpo = AlgorithmConfig(estimator="gdpo")
    assert teaches(gdpo, terms=((1.0, 3.0), (1.0, -2.0))) and not teaches(gdpo)


def test_a_search_price_is_a_term_of_its_own():
    t, _ = make_batch(0)
    said = tuple(Solution.of_text(SEARCHED if i % 2 else "<answer> a </answer>") for i in range(N))
    algorithm = replace(PLAIN, search_price=0.5, estimator="gdpo")
    t = t._replace(groups=np.zeros(N, int))
    batch = rewarded_of(t, np.ones(N), algorithm, solutions=said)
    np.testing.assert_array_equal(batch.terms.weights, np.tile([1.0, -0.5], (N, 1)))
    np.testing.assert_array_equal(batch.terms.values[:, 1], np.arange(N) % 2)
