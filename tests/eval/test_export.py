"""Files for other scorers, whose scores must equal ours."""

import json
import re
import string
from collections import Counter

import pytest

from r1s_jax.data.results import read_results
from r1s_jax.eval.export import export
from r1s_jax.io.errors import ConfigError
from r1s_jax.io.journal import DataError
from tests.makers import run_cli

PAIRS = [
    ("yes", "Yes."), ("yes", "yes, they are"), ("no", "yes"), ("J.R.R. Tolkien", "JRR Tolkien"),
    ("Jean-Luc Picard", "Jean Luc Picard"), ("the New York City", "New York"), ("a b", "c"),
    ("noanswer", "no answer"), ("3 November 1929", "November 3, 1929"), ("Rome", ""), ("no", "No"),
    ("O'Neil", "ONeil of the Sea"), ("x x y", "x y y"), ("True", "yes"),
]  # fmt: skip


@pytest.fixture
def answers(tmp_path):
    rows = [
        {"id": f"5a{i}", "question": f"q{i}", "answer": gold, "pred_ans": predicted}
        for i, (gold, predicted) in enumerate(PAIRS)
    ]
    path = tmp_path / "answers.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def plain(text: str) -> str:
    letters = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(?:a|an|the)\b", " ", letters).split())


def official(golds: dict[str, str], answers: dict[str, str]) -> tuple[float, float]:
    """(EM, F1) from 0 to 1, as in HotpotQA's scorer, which divides by all gold answers."""
    em = f1 = 0.0
    for id, gold in golds.items():
        predicted, expected = plain(answers[id]), plain(gold)
        em += predicted == expected
        if predicted != expected and {predicted, expected} & {"yes", "no", "noanswer"}:
            continue
        ours, theirs = predicted.split(), expected.split()
        same = sum((Counter(ours) & Counter(theirs)).values())
        if same:
            precision, recall = same / len(ours), same / len(theirs)
            f1 += 2 * precision * recall / (precision + recall)
    return em / len(golds), f1 / len(golds)


def test_scores_equal_those_of_hotpotqas_scorer(answers, tmp_path):
    assert export(answers, "hotpotqa", tmp_path / "deep" / "pred.json") == len(PAIRS)
    predicted = json.loads((tmp_path / "deep" / "pred.json").read_text())
    assert predicted["sp"] == {id: [] for id in predicted["answer"]}
    golds = {f"5a{i}": gold for i, (gold, _) in enumerate(PAIRS)}
    scores = [row["scores"] for row in read_results(answers)]
    ours = [sum(s[name] for s in scores) / len(scores) for name in ("em_squad", "f1_squad", "f1")]
    assert official(golds, predicted["answer"]) == pytest.approx(tuple(ours[:2]))
    assert ours[1] != pytest.approx(ours[2])  # R1-Searcher's F1 differs


def test_other_forms(answers, tmp_path):
    for form in ("2wiki", "musique", "search_r1"):
        export(answers, form, tmp_path / form)
    wiki = json.loads((tmp_path / "2wiki").read_text())
    assert wiki.keys() == {"answer", "sp", "evidence"} and wiki["evidence"]["5a0"] == []
    musique, ours = ((tmp_path / n).read_text().splitlines()[1] for n in ("musique", "search_r1"))
    assert json.loads(musique) == {
        "id": "5a1", "predicted_answer": "yes, they are", "predicted_support_idxs": [],
        "predicted_answerable": True,
    }  # fmt: skip
    assert json.loads(ours) == {
        "id": "5a1", "question": "q1", "golden_answers": ["yes"], "prediction": "yes, they are"
    }  # fmt: skip


def test_results_that_cannot_be_exported_are_refused(answers, tmp_path):
    out = tmp_path / "pred.json"
    with pytest.raises(ConfigError, match="format 'squad': take hotpotqa, 2wiki"):
        export(answers, "squad", out)
    row = {"question": "q", "answer": "x", "pred_ans": "x"}
    for rows, message in (
        ([row], "row 1: no `id`"),
        ([row | {"id": 3, "sample": i} for i in (0, 1)], "row 2: another answer to id 3"),
    ):
        path = tmp_path / "other.jsonl"
        path.write_text("".join(json.dumps(r) + "\n" for r in rows))
        with pytest.raises(DataError, match=rf"other.jsonl, {message}"):
            export(path, "hotpotqa", out)
    out.write_text("mine")
    with pytest.raises(DataError, match=r"pred.json is there already"):
        export(answers, "hotpotqa", out)
    assert out.read_text() == "mine"


def test_the_command(answers, tmp_path):
    out = tmp_path / "pred.jsonl"
    done = run_cli("eval", "export", str(answers), "--format", "search_r1", "--out", str(out))
    assert json.loads(done.stdout) == {"file": str(out), "answers": len(PAIRS)}
