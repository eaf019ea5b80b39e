"""Rewards from a real server: the released contract, and replies that break it."""

import pytest

from r1s_jax.config import override
from r1s_jax.configs import tiny_world
from r1s_jax.io.journal import rows_so_far
from r1s_jax.protocol.solution import Solution
from r1s_jax.rewards.http import RewardServerError
from r1s_jax.rewards.registry import batch_reward
from r1s_jax.train import train
from tests.http_server import LocalServer
from tests.makers import SHORT

SOLUTIONS = [Solution.of_text(f"thought {i}</think><answer> {i} </answer>") for i in range(3)]
PROMPTS, GOLDS = ["P0 ", "P1 ", "P2 "], [("0",), ("1",), ("x",)]


def test_a_server_sees_prompt_and_solution_and_its_rewards_count():
    requests = []

    def answer(path, body):
        requests.append((path, body))
        return 200, {"rewards": [0.5 * i for i in range(len(body["query"]))]}

    with LocalServer(answer) as server:
        rewards = batch_reward(f"{server.url}/get_reward")(PROMPTS, SOLUTIONS, GOLDS)
    texts = [p + s.text for p, s in zip(PROMPTS, SOLUTIONS, strict=True)]
    assert requests == [("/get_reward", {"query": texts})]
    assert [r.value for r in rewards] == [0.0, 0.5, 1.0]
    assert [r.parts["answer_f1"] for r in rewards] == [1.0, 1.0, 0.0]


def test_a_busy_server_is_retried():
    answers = iter([(503, {}), (502, {}), (200, {"rewards": [1, 2, 3]})])
    with LocalServer(lambda path, body: next(answers)) as server:
        rewards = batch_reward(server.url)(PROMPTS, SOLUTIONS, GOLDS)
    assert [r.value for r in rewards] == [1, 2, 3]


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        ((400, {}), "status 400"),
        ((200, {"scores": [1, 2, 3]}), "missing required field `rewards`"),
        ((200, {"rewards": [1, 2]}), "2 rewards for 3"),
        ((200, {"rewards": [1, 2, float("nan")]}), "not finite"),
        ((200, {"rewards": ["a", 1, 2]}), "Expected `float`"),
        ((200, b"<html>"), "gave no rewards"),
    ],
)
def test_invalid_replies_are_named(reply, message):
    with LocalServer(lambda path, body: reply) as server:
        with pytest.raises(RewardServerError, match=message) as error:
            batch_reward(server.url)(PROMPTS, SOLUTIONS, GOLDS)
        assert server.url in str(error.value) and "--resume" in str(error.value)


@pytest.mark.slow
def test_a_run_may_be_rewarded_by_a_server(tmp_path):
    few = [*SHORT, "cold_start.steps=0", "stage1.steps=0", "stage2.steps=2", "eval.questions=0"]

    def answer(path, body):
        return 200, {"rewards": [text.count("a") / 10 for text in body["query"]]}

    with LocalServer(answer) as server:
        config = override(tiny_world.config(), [*few, f"stage2.reward={server.url}/get_reward"])
        train(config, tmp_path / "http")
        assert server.requests == 2
    rows = rows_so_far(tmp_path / "http" / "metrics.jsonl")
    assert len(rows) == 2 and all(0 < row["reward"] < 9 for row in rows)
