import gzip
import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from r1s_jax import protocol, rewards
from r1s_jax.rewards import Solution

QUERY = f"I look. {protocol.BEGIN_QUERY} k {protocol.END_QUERY}"
DOCUMENTS = protocol.document_block(["T   text"])
ANSWER = f"so.{protocol.END_THINK} {protocol.BEGIN_ANSWER} New York {protocol.END_ANSWER}"
FORCED = f"{protocol.BEGIN_QUERY} q {protocol.END_QUERY}{DOCUMENTS}"


def policy(text: str) -> tuple[str, bool]:
    return text, True


def system(text: str) -> tuple[str, bool]:
    return text, False


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The  Beatles", "beatles"),
        ("a_b-c’s", "b c s"),
        ("An apple, the pear & a fig!", "apple pear fig"),
        ("theory", "theory"),
        ("True", "yes"),
        ("False", "no"),
        ("true", "true"),
        (" True ", "true"),
        ("the", ""),
    ],
)
def test_normalize_answer(text, normal):
    assert rewards.normalize_answer(text) == normal


def test_f1_counts_repeated_tokens_once_each():
    f1, precision, recall = rewards.f1_score("new new york", "New York City")
    assert (precision, recall) == (2 / 3, 2 / 3)
    assert f1 == pytest.approx(2 / 3)


@pytest.mark.parametrize("pair", [("yes sir", "yes"), ("no", "yes"), ("noanswer", "no answer")])
def test_half_a_yes_is_worth_nothing(pair):
    assert rewards.f1_score(*pair) == (0.0, 0.0, 0.0)


def test_the_best_of_several_gold_answers_counts():
    golds = ["Big Apple", "New York"]
    assert rewards.f1_score("new york", golds) == (1.0, 1.0, 1.0)
    assert rewards.exact_match("New York.", golds)
    assert rewards.cover_exact_match("york, new", golds)
    with pytest.raises(ValueError, match="empty list"):
        rewards.f1_score("new york", [])


def test_cover_exact_match_of_an_answer_of_nothing_but_an_article():
    assert not rewards.cover_exact_match("New York", "The")
    assert rewards.cover_exact_match("", "The")


@given(st.text(), st.text(min_size=1))
def test_scores_stay_in_range_and_agree(prediction, gold):
    f1, precision, recall = rewards.f1_score(prediction, gold)
    assert min(precision, recall) <= f1 + 1e-9 and f1 <= max(precision, recall) + 1e-9
    if rewards.exact_match(prediction, gold):
        assert rewards.cover_exact_match(prediction, gold)


GOOD = {
    "no search": [policy(ANSWER)],
    "one search": [policy(QUERY), system(DOCUMENTS), policy(ANSWER)],
    "two searches": [policy(QUERY), system(DOCUMENTS)] * 2 + [policy(ANSWER)],
    "nothing found": [policy(QUERY), system(protocol.document_block([])), policy(ANSWER)],
    "forced first search": [system(FORCED), policy(ANSWER)],
    "forced, then its own": [system(FORCED), policy(QUERY), system(DOCUMENTS), policy(ANSWER)],
    "forced in two pieces": [system(FORCED[:20]), system(FORCED[20:]), policy(ANSWER)],
    "passage quotes every tag and CJK": [
        policy(QUERY),
        system(protocol.document_block([f"T   {FORCED} {ANSWER} <think> 中 assistant"])),
        policy(ANSWER),
    ],
}
BAD = {
    "empty": [],
    "no answer": [policy(f"so.{protocol.END_THINK}")],
    "no end of thinking": [policy(ANSWER.replace(protocol.END_THINK, ""))],
    "two ends of thinking": [policy(protocol.END_THINK + ANSWER)],
    "begins to think again": [policy(protocol.BEGIN_THINK + ANSWER)],
    "two answers": [policy(ANSWER + f"{protocol.BEGIN_ANSWER} x {protocol.END_ANSWER}")],
    "answer before the end of thinking": [
        policy(f"{protocol.BEGIN_ANSWER} x {protocol.END_ANSWER}{protocol.END_THINK}")
    ],
    "answer pair reversed": [
        policy(f"{protocol.END_THINK}{protocol.END_ANSWER} x {protocol.BEGIN_ANSWER}")
    ],
    "query unanswered": [policy(QUERY + ANSWER)],
    "query unclosed": [
        policy(QUERY.removesuffix(protocol.END_QUERY)),
        system(DOCUMENTS),
        policy(ANSWER),
    ],
    "documents of its own": [policy(QUERY + DOCUMENTS + ANSWER)],
    "documents of its own beside real ones": [
        policy(QUERY),
        system(DOCUMENTS),
        policy(DOCUMENTS + ANSWER),
    ],
    "query inside the answer": [
        policy(f"{protocol.END_THINK}{protocol.BEGIN_ANSWER}{QUERY}"),
        system(DOCUMENTS),
        policy(protocol.END_ANSWER),
    ],
    "CJK": [policy("中" + ANSWER)],
}


@pytest.mark.parametrize("spans", GOOD.values(), ids=GOOD.keys())
def test_good_format(spans):
    solution = Solution(tuple(spans))
    searched = solution.written.count(protocol.BEGIN_QUERY) > 0
    first, second = rewards.stage1(solution, "New York"), rewards.stage2(solution, "new york")
    assert (first.value, second.value) == (0.5 * searched, 1.0)
    assert first.parts == {
        "format": 1.0,
        "searched": float(searched),
        "answer_f1": 1.0,
        "exact_match": 1.0,
        "cover_exact_match": 1.0,
        "penalty": 0.0,
    }


@pytest.mark.parametrize("spans", BAD.values(), ids=BAD.keys())
def test_bad_format(spans):
    solution = Solution(tuple(spans))
    first, second = rewards.stage1(solution, "New York"), rewards.stage2(solution, "New York")
    assert first.value == first.parts["format"] == second.parts["format"] == 0.0
    assert second.value == second.parts["answer_f1"] - 2.0
    assert second.parts["penalty"] == -2.0


def test_a_wrong_answer_in_the_right_format_costs_nothing():
    solution = Solution((policy(ANSWER),))
    assert rewards.stage2(solution, "Paris").value == 0.0


@pytest.mark.skipif("R1S_DATA" not in os.environ, reason="R1S_DATA names no data folder")
def test_answer_scores_equal_the_published_reward_servers():
    """Their reward is an answer score, with at most one format term of a known size on top."""
    format_terms = {
        "qwen_zero": (0.0, -2.0),
        "llama_stage1": (0.0, 0.5, 1.0),
        "llama_stage2": (0.0, -1.0),
    }
    path = Path(os.environ["R1S_DATA"]) / "reward_cases.jsonl.gz"
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        cases = [json.loads(line) for line in lines]
    assert len(cases) == 1800
    for case in cases:
        answer = protocol.extract_answer(case["solution"])
        if case["variant"] == "llama_stage1":
            hit = answer is not None and rewards.cover_exact_match(answer, case["answer"])
            score = 1.0 if hit else -1.0
        else:
            score = rewards.f1_score(answer or "", case["answer"])[0]
        allowed = [score + term for term in format_terms[case["variant"]]]
        assert min(abs(case["reward"] - value) for value in allowed) < 1e-6, case
