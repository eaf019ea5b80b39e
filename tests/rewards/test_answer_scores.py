import gzip
import json
import os
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from r1s_jax.rewards import answer_scores as answers


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
    assert answers.normalize_answer(text) == normal


def test_f1_counts_repeated_tokens_once_each():
    f1, precision, recall = answers.f1_score("new new york", "New York City")
    assert (precision, recall) == (2 / 3, 2 / 3)
    assert f1 == pytest.approx(2 / 3)


@pytest.mark.parametrize("pair", [("yes sir", "yes"), ("no", "yes"), ("noanswer", "no answer")])
def test_a_longer_answer_than_yes_scores_nothing(pair):
    assert answers.f1_score(*pair) == (0.0, 0.0, 0.0)


def test_the_best_score_over_gold_answers_counts():
    golds = ["Big Apple", "New York"]
    assert answers.f1_score("new york", golds) == (1.0, 1.0, 1.0)
    assert answers.exact_match("New York.", golds)
    assert answers.cover_exact_match("york, new", golds)
    with pytest.raises(ValueError, match="empty list"):
        answers.f1_score("new york", [])


@pytest.mark.parametrize("gold", ["A", "The The", "!!!", "an"])
def test_an_empty_answer_does_not_match_a_gold_answer_that_normalises_to_nothing(gold):
    for wrong in ("", "New York", "..."):
        score = answers.score_answer(wrong, gold)
        assert not (score.exact_match or score.cover_exact_match or score.f1), wrong
    score = answers.score_answer(f" {gold.lower()} ", gold)
    assert score.exact_match and score.cover_exact_match and score.f1 == 1
    assert answers.score_answer("Rome", [gold, "Rome"]).exact_match


@given(st.text(), st.text(min_size=1))
def test_scores_stay_in_range_and_agree(prediction, gold):
    f1, precision, recall = answers.f1_score(prediction, gold)
    assert min(precision, recall) <= f1 + 1e-9 and f1 <= max(precision, recall) + 1e-9
    if answers.exact_match(prediction, gold):
        assert answers.cover_exact_match(prediction, gold)


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("J.R.R. Tolkien", "jrr tolkien"),
        ("Jean-Luc", "jeanluc"),
        ("The  Beatles!", "beatles"),
        ("True", "true"),
        ("the", ""),
    ],
)
def test_the_normaliser_of_squad(text, normal):
    assert answers.squad_normalize_answer(text) == normal


def test_scores_by_the_normaliser_of_squad():
    assert answers.squad_exact_match("JRR Tolkien", ["x", "J.R.R. Tolkien"])
    assert not answers.exact_match("JRR Tolkien", "J.R.R. Tolkien")
    assert answers.squad_f1_score("JRR", "J.R.R. Tolkien") == pytest.approx(2 / 3)
    assert answers.squad_f1_score("yes sir", "yes") == 0
    assert answers.sub_exact_match("It is the J.R.R. Tolkiens.", "JRR Tolkien")
    assert not answers.sub_exact_match("Tolkien JRR", "JRR Tolkien")


@pytest.mark.parametrize("gold", ["A", "!!!"])
def test_wrong_answers_do_not_match_a_gold_answer_that_normalises_to_nothing(gold):
    for wrong in ("", "Banana", "x!!!"):
        assert not answers.sub_exact_match(wrong, gold)
        assert not answers.squad_exact_match(wrong, gold)
        assert not answers.squad_f1_score(wrong, gold)
    assert answers.sub_exact_match(gold.lower(), gold) and answers.squad_exact_match(gold, gold)


@pytest.mark.skipif("R1S_DATA" not in os.environ, reason="R1S_DATA names no data folder")
def test_scores_equal_those_of_search_r1s_code():
    score = {"em": answers.squad_exact_match, "subem": answers.sub_exact_match}
    with gzip.open(Path(os.environ["R1S_DATA"], "search_r1_cases.jsonl.gz")) as lines:
        cases = [case for line in lines if (case := json.loads(line))["variant"] in score]
    pairs = [(re.findall(r"<answer>(.*?)</answer>", c["response"], re.S), c) for c in cases]
    answered = [(texts[-1], case) for texts, case in pairs if texts]
    assert len(answered) > 900
    for answer, case in answered:
        assert score[case["variant"]](answer, case["golden_answers"]) == case["score"], case
