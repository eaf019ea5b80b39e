import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from r1s_jax.data.results import read_results, score_row, supporting_recall
from r1s_jax.eval.score import compare, summarize
from r1s_jax.io.journal import DataError
from tests.makers import run_cli

ROWS = [
    {"question": "a", "answer": "New York", "pred_ans": " the New York ", "searches": 2},
    {"question": "b", "answer": ["Rome", "Roma"], "pred_ans": "in Roma", "judge": "True"},
    {"question": "c", "answer": "Paris", "pred_ans": "I don't know.", "judge": "unparsable"},
]


def write(path: Path, rows) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_means_are_in_percent(tmp_path):
    s = summarize(read_results(write(tmp_path / "r.jsonl", ROWS)))
    assert (s["n"], s["em"], s["cem"], s["f1"]) == (3, 33.3, 66.7, 55.6)
    assert (s["precision"], s["recall"]) == (50.0, 66.7)
    assert s["exact"]["f1"] == pytest.approx(100 * (1 + 2 / 3) / 3)
    assert (s["acc_l"], s["judged"]) == (100.0, 1)
    assert s["searches"] == 2.0
    assert s["finish"] == {"unknown": 3}


def test_without_verdicts_there_is_no_judged_accuracy(tmp_path):
    s = summarize(read_results(write(tmp_path / "r.jsonl", ROWS[:1])))
    assert s["acc_l"] is None and s["exact"]["acc_l"] is None and s["judged"] == 0


def test_the_interval_is_that_of_the_mean(tmp_path):
    """Compares with the normal approximation on 400 coin throws."""
    rows = [
        {"question": str(i), "answer": "x", "pred_ans": "x" if i % 4 else "y"} for i in range(400)
    ]
    s = summarize(read_results(write(tmp_path / "r.jsonl", rows)))
    half = 196 * np.sqrt(0.75 * 0.25 / 400)
    assert s["interval"]["em"] == pytest.approx([75 - half, 75 + half], abs=0.6)


def test_a_paired_comparison_uses_the_common_questions(tmp_path):
    better = [row | {"pred_ans": "Paris"} for row in ROWS[1:]]
    first = read_results(write(tmp_path / "a.jsonl", ROWS))
    second = read_results(write(tmp_path / "b.jsonl", better))
    gained = compare(first, second)
    assert gained["n"] == 2
    assert gained["em"] == {"difference": 50.0, "interval": [0.0, 100.0], "better": 1, "worse": 0}
    assert (gained["cem"]["better"], gained["cem"]["worse"]) == (1, 1)
    assert compare(first, [r | {"question": "other"} for r in second]) is None


def test_each_score_names_its_normaliser(tmp_path):
    rows = [
        {"question": "a", "answer": "J.R.R. Tolkien", "pred_ans": "JRR Tolkien"},
        {"question": "b", "answer": "York", "pred_ans": "New Yorkshire"},
    ]
    plain = write(tmp_path / "plain.jsonl", ROWS)
    path = write(tmp_path / "r.jsonl", rows)
    s = summarize(read_results(path))
    assert (s["em"], s["em_squad"], s["sub_em"]) == (0.0, 50.0, 100.0)
    assert s["f1_squad"] == 50.0 and s["supporting_recall"] is None
    shown = run_cli("eval", "score", str(path)).stdout
    for title in ("EM (R1-Searcher)", "EM (SQuAD)", "F1 (SQuAD)", "sub-EM (SQuAD)"):
        assert title in shown
    shown = run_cli("eval", "score", str(plain)).stdout
    assert "\n│ EM (SQuAD)" not in shown and "sub-EM (SQuAD)" in shown
    assert "supporting" not in shown


def test_supporting_pages_are_shown_where_rows_have_them(tmp_path):
    rows = [ROWS[0] | {"supporting_recall": 0.5}, ROWS[1] | {"supporting_recall": 1}, ROWS[2]]
    path = write(tmp_path / "r.jsonl", rows)
    assert summarize(read_results(path))["supporting_recall"] == 75.0
    assert "supporting pages found" in run_cli("eval", "score", str(path)).stdout
    for wrong in (2, "1", True, None, float("nan")):
        with pytest.raises(DataError, match="line 1: `supporting_recall` must be"):
            read_results(write(path, [ROWS[0] | {"supporting_recall": wrong}]))


def test_the_share_of_supporting_pages():
    lines = ["New  York   is a city.", "Title: The Who Text: a band", "no title here"]
    assert supporting_recall(["new york", "Who", "Paris"], lines) == pytest.approx(2 / 3)
    assert supporting_recall(["The The"], ["The The   is a band."]) == 1
    assert supporting_recall(["The The"], ["no title"]) == 0


def sampled(*right: str) -> list[dict]:
    """Questions with one sample per letter; x is right."""
    return [
        {"id": f"q{i}", "question": "who?", "answer": "x", "pred_ans": letter, "sample": j}
        for i, letters in enumerate(right)
        for j, letter in enumerate(letters)
    ]


def test_several_samples_per_question(tmp_path):
    path = write(tmp_path / "r.jsonl", sampled("xx", "xn", "nn", "nn", "x"))
    s = summarize(read_results(path))
    assert (s["n"], s["samples"], s["questions"]) == (9, 2, 4)  # one question is incomplete
    assert s["avg@k"]["em"]["mean"] == 37.5 and s["pass@k"]["em"]["mean"] == 50.0
    assert s["avg@k"].keys() == {"em", "cem", "f1"} and s["pass@k"].keys() == {"em", "cem"}
    assert s["avg@k"]["f1"]["interval"] == s["avg@k"]["em"]["interval"]
    shown = run_cli("eval", "score", str(path)).stdout
    assert "EM (R1-Searcher) pass@k" in shown and "4, 2 samples each" in shown
    for row, message in (
        (sampled("xx") + sampled("x"), r"line 3: id 'q0', sample 0 again, as in line 1"),
        ([sampled("x")[0] | {"sample": -1}], "line 1: `sample` must be a whole number"),
        ([sampled("x")[0] | {"sample": [0]}], "line 1: `sample` must be a whole number"),
    ):
        with pytest.raises(DataError, match=message):
            read_results(write(path, row))


def test_the_interval_is_over_questions(tmp_path):
    """Four equal answers to each of 100 questions give the same interval as one answer to each."""
    once = sampled(*("x" if i % 4 else "n" for i in range(100)))
    again = sampled(*("xxxx" if i % 4 else "nnnn" for i in range(100)))
    one = summarize(read_results(write(tmp_path / "a.jsonl", once)))
    four = summarize(read_results(write(tmp_path / "b.jsonl", again)))
    assert one["interval"]["em"] == four["interval"]["em"] == four["avg@k"]["em"]["interval"]
    assert "samples" not in one and four["em"] == one["em"]


def scored(rows):
    return [row | {"scores": score_row(row)} for row in rows]


def test_samples_are_compared_by_their_mean():
    first, second = map(scored, (sampled("xn", "nn", "xx"), sampled("xx", "nx", "xn", "xx")))
    gain = compare(first, second)
    assert gain["n"] == 3
    assert gain["em"] | {"interval": 0} == {
        "difference": pytest.approx(16.67), "interval": 0, "better": 2, "worse": 1
    }  # fmt: skip
    assert compare(first, second[::2])["n"] == 3  # some samples, or one


def test_files_with_different_ids_share_no_questions():
    rows = [row | {"id": f"dev_{i}"} for i, row in enumerate(scored(ROWS))]
    assert compare(rows, rows)["n"] == 3
    assert compare(rows, [row | {"id": "x" + row["id"]} for row in rows]) is None


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "q", "answer": "x"}, "line 2: `pred_ans` must be a text"),
        ({"question": "q", "pred_ans": "x"}, "line 2: `answer` must be a text, or a list"),
        ([1], "line 2: expected a JSON object"),
    ],
)
def test_a_broken_row_is_named(tmp_path, row, message):
    with pytest.raises(DataError, match=message):
        read_results(write(tmp_path / "r.jsonl", [ROWS[0], row]))
    with pytest.raises(DataError, match="no results"):
        read_results(write(tmp_path / "r.jsonl", []))


@pytest.mark.skipif("R1S_DATA" not in os.environ, reason="R1S_DATA names no data folder")
def test_published_traces_score_as_published():
    traces = Path(os.environ["R1S_DATA"]) / "traces"
    files = [str(traces / f"{name}_qwen.jsonl.gz") for name in ("hotpotqa", "bamboogle")]
    out = subprocess.run(
        [sys.executable, "-m", "r1s_jax.cli", "eval", "score", *files, "--json"],
        capture_output=True,
        text=True,
        check=True,
    )
    hotpotqa, bamboogle = map(json.loads, out.stdout.splitlines())
    names = ("n", "em", "cem", "f1", "acc_l", "searches")
    assert tuple(hotpotqa[k] for k in names) == (500, 58.0, 65.4, 71.9, 75.0, 2.11)
    assert tuple(bamboogle[k] for k in names) == (125, 45.6, 52.8, 57.7, 54.4, 1.98)
