"""A judge behind a real socket as a reward: cached, limited, and never silently zero."""

import json
import math
import threading

import pytest

from r1s_jax.config import JudgeConfig
from r1s_jax.protocol.r1_searcher import R1Searcher
from r1s_jax.protocol.solution import Solution
from r1s_jax.rewards.judged import JudgeFailure, stage_reward
from r1s_jax.rewards.registry import RewardError
from tests.http_server import LocalServer
from tests.makers import SHORT, run_cli

R1 = R1Searcher()


def says(answer: str) -> Solution:
    return Solution(((f" so </think> <answer> {answer} </answer>", True),), R1)


SOLUTIONS = [says("Rome"), says("Roma"), says("Paris"), Solution(((" hm", True),), R1, False)]
QUESTIONS, GOLDS = ["Which city?"] * 4, [["Rome"]] * 4


def judging(verdict_of, status_of=lambda n: 200):
    """A judge whose replies are a function of the prompt."""
    counter, lock = [0], threading.Lock()

    def answer(path, body):
        with lock:
            counter[0] += 1
            number = counter[0]
        if status_of(number) != 200:
            return status_of(number), {"error": {"message": "busy"}}
        message = {"role": "assistant", "content": verdict_of(body["messages"][0]["content"])}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        return 200, {"id": "x", "object": "chat.completion", "choices": [choice]}

    return LocalServer(answer)


def knows_rome(prompt: str) -> str:
    return str("model: Rom" in prompt)


def config(server: LocalServer, **more) -> JudgeConfig:
    return JudgeConfig(url=f"{server.url}/v1", model="judge", retries=0, **more)


def test_verdicts_are_a_term_of_the_sum_and_kept_on_disk(tmp_path):
    journal = tmp_path / "judged.jsonl"
    with judging(knows_rome) as server:
        reward = stage_reward("f1 + 0.5*judge", config(server), journal)
        got = reward(QUESTIONS, SOLUTIONS, GOLDS)
        assert [r.value for r in got] == [1.5, 0.5, 0.0, 0.0]
        assert [r.parts["judge"] for r in got] == [1.0, 1.0, 0.0, 0.0]
        assert all("answer_f1" in r.parts for r in got)
        assert server.requests == 3  # no request for a solution without an answer
        assert reward(QUESTIONS, SOLUTIONS, GOLDS) == got and server.requests == 3
        again = stage_reward("judge", config(server), journal)
        alone = again(QUESTIONS, SOLUTIONS, GOLDS)
        assert [r.value for r in alone] == [1.0, 1.0, 0.0, 0.0] and server.requests == 3
        assert all({"answer_f1", "format"} <= r.parts.keys() for r in alone)


def test_missing_verdicts_give_nan_rewards_and_too_many_stop_the_run(tmp_path):
    many = [says(f"city {i}") for i in range(10)]
    questions, golds = ["Which city?"] * 10, [["Rome"]] * 10
    with judging(lambda p: "maybe" if "city 3" in p else "False") as server:
        reward = stage_reward("judge", config(server), tmp_path / "a.jsonl")
        values = [r.value for r in reward(questions, many, golds)]
        assert math.isnan(values[3]) and sum(map(math.isnan, values)) == 1
    with judging(knows_rome) as server:  # a working judge; earlier verdicts are kept
        reward = stage_reward("judge", config(server), tmp_path / "a.jsonl")
        assert not any(math.isnan(r.value) for r in reward(questions, many, golds))
        assert server.requests == 1
    with judging(knows_rome, lambda n: 200 if n % 2 else 500) as server:
        reward = stage_reward("judge", config(server), tmp_path / "b.jsonl")
        with pytest.raises(JudgeFailure, match=r"5 of 10 answers got no verdict.*busy.*resume"):
            reward(questions, many, golds)


def test_a_batch_without_any_verdict_always_stops_the_run(tmp_path):
    with judging(lambda prompt: "maybe") as server:
        all_may_fail = config(server, max_failure_rate=1.0)
        reward = stage_reward("judge", all_may_fail, tmp_path / "j.jsonl")
        assert math.isnan(reward(QUESTIONS, SOLUTIONS, GOLDS)[0].value)  # one is 0: no answer
        with pytest.raises(JudgeFailure, match="2 of 2 answers"):
            reward(QUESTIONS[:2], SOLUTIONS[:2], GOLDS[:2])


def test_requests_have_a_limit(tmp_path):
    with judging(knows_rome) as server:
        reward = stage_reward("judge", config(server, most_requests=2), tmp_path / "j.jsonl")
        with pytest.raises(JudgeFailure, match="most_requests=2"):
            reward(QUESTIONS, SOLUTIONS, GOLDS)
        assert server.requests == 0


def test_a_missing_judge_url_is_named_at_once(tmp_path):
    with pytest.raises(RewardError, match=r"judge\.url"):
        stage_reward("stage2 + judge", JudgeConfig(), tmp_path / "j.jsonl")
    with pytest.raises(RewardError, match="expected WEIGHT"):
        stage_reward("judge + f1 f1", JudgeConfig(), tmp_path / "j.jsonl")


RUN = [*SHORT, "cold_start.steps=60", "cold_start.cooldown_steps=30", "stage1.steps=0"]
RUN += ["stage2.steps=3", "stage2.reward=stage2 + judge", "eval.questions=0"]


def trained(server: LocalServer, folder, *more: str):
    where = [f"judge.url={server.url}/v1", "judge.model=judge", "judge.retries=0"]
    return run_cli("train", "tiny_world", *RUN, *where, *more, "--run-dir", str(folder))


@pytest.mark.slow
def test_a_run_is_judged_and_one_whose_judge_fails_ends_with_a_message(tmp_path):
    with judging(lambda prompt: "True") as server:
        done = trained(server, tmp_path / "run")
        assert done.exit_code == 0, done.output
        rows = [json.loads(x) for x in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
        assert len(rows) == 3 and all("judge" in row for row in rows)
        assert all(row["rewards_missing"] == 0 for row in rows)
        assert server.requests == len((tmp_path / "run/judged.jsonl").read_text().splitlines())
    with judging(lambda prompt: "True", lambda n: 200 if n % 2 else 500) as server:
        done = trained(server, tmp_path / "broken")
        assert done.exit_code and isinstance(done.exception, JudgeFailure), done.output
        assert "got no verdict" in str(done.exception)


def test_a_sum_with_zero_weights_is_refused(tmp_path):
    for name in ("0*f1", "0*judge + 0.0*stage2", "1e-400*f1"):
        with pytest.raises(RewardError, match="every weight is 0"):
            stage_reward(name, JudgeConfig(url="http://x", model="j"), tmp_path / "j.jsonl")
    stage_reward("f1 + 0*format", JudgeConfig(), tmp_path / "j.jsonl")
