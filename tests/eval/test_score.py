import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from r1s_jax.data.results import read_results
from r1s_jax.data.rows import DataError
from r1s_jax.eval.score import compare, summarize

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


def test_without_a_verdict_there_is_no_judged_accuracy(tmp_path):
    s = summarize(read_results(write(tmp_path / "r.jsonl", ROWS[:1])))
    assert s["acc_l"] is None and s["exact"]["acc_l"] is None and s["judged"] == 0


def test_the_interval_is_that_of_the_mean(tmp_path):
    """Against the normal approximation, on a coin of 400 throws."""
    rows = [
        {"question": str(i), "answer": "x", "pred_ans": "x" if i % 4 else "y"} for i in range(400)
    ]
    s = summarize(read_results(write(tmp_path / "r.jsonl", rows)))
    half = 196 * np.sqrt(0.75 * 0.25 / 400)
    assert s["interval"]["em"] == pytest.approx([75 - half, 75 + half], abs=0.6)


def test_a_paired_comparison_takes_the_questions_in_common(tmp_path):
    better = [row | {"pred_ans": "Paris"} for row in ROWS[1:]]
    first = read_results(write(tmp_path / "a.jsonl", ROWS))
    second = read_results(write(tmp_path / "b.jsonl", better))
    gained = compare(first, second)
    assert gained["n"] == 2
    assert gained["em"] == {"difference": 50.0, "interval": [0.0, 100.0], "better": 1, "worse": 0}
    assert (gained["cem"]["better"], gained["cem"]["worse"]) == (1, 1)
    assert compare(first, [r | {"question": "other"} for r in second]) is None


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
