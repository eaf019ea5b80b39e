import gzip
import json
import os
from pathlib import Path

import pytest

from r1s_jax.eval.metrics import score_answers


def test_means_are_in_percent():
    rows = [
        {"question": "q", "answer": "New York", "pred_ans": " the New York "},
        {"question": "q", "answer": ["Rome", "Roma"], "pred_ans": "in Roma"},
        {"question": "q", "answer": "Paris", "pred_ans": "I don't know."},
    ]
    scores = score_answers(rows)
    assert scores == pytest.approx({"em": 100 / 3, "cem": 200 / 3, "f1": 100 * (1 + 2 / 3) / 3})


def test_no_rows_have_no_score():
    with pytest.raises(ValueError, match="no rows"):
        score_answers([])


@pytest.mark.skipif("R1S_DATA" not in os.environ, reason="R1S_DATA names no data folder")
@pytest.mark.parametrize(
    ("traces", "published"),
    [
        ("hotpotqa_qwen", {"em": 58.0, "cem": 65.4, "f1": 71.9}),
        ("bamboogle_qwen", {"em": 45.6, "cem": 52.8, "f1": 57.7}),
    ],
)
def test_published_traces_score_as_published(traces, published):
    path = Path(os.environ["R1S_DATA"]) / "traces" / f"{traces}.jsonl.gz"
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        scores = score_answers(json.loads(line) for line in lines)
    assert {name: round(value, 1) for name, value in scores.items()} == published
