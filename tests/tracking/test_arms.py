"""Comparisons of settings: the result of a run, and the table over seeds."""

import json
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from r1s_jax.io.journal import DataError
from r1s_jax.tracking.arms import as_markdown, plot_arms, run_result, table_of


def write_run(folder: Path, f1: list[float], after: float | None, signal_at: int = 0) -> Path:
    folder.mkdir(parents=True)
    rows = [
        {
            "step": i,
            "answer_f1": value,
            "answered": 0.75,
            "seconds_rollout": 1.0,
            "seconds_update": 0.5,
            "health": [{"signal": "truncated"}] if signal_at and i >= signal_at else [],
        }
        for i, value in enumerate(f1, start=1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    summary = {"stopped_unhealthy": "lost"}
    if after is not None:
        summary = {"f1_before": 0.1, "f1_after": after, "searches_after": 1.5}
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def test_the_result_of_a_run_comes_from_its_files(tmp_path):
    rising = [0.1, 0.5, 0.8, 0.9, 0.95, 0.95, 0.95]
    got = run_result(write_run(tmp_path / "a", rising, 0.97, signal_at=3))
    # The first four steps whose mean is .9 end with the sixth.
    assert got["steps_to_good"] == 6 and got["seconds_to_good"] == 9.0
    assert got["f1_after"] == 0.97 and got["signals"] == {"truncated": 3}
    assert got["stopped"] is None and got["answered"] == 0.75 and not got["collapsed"]
    falling = run_result(write_run(tmp_path / "c", [*rising, 0.5, 0.3, 0.2, 0.1], 0.1))
    assert falling["collapsed"]  # .275 of .9375
    assert ", 1 collapsed" in as_markdown(table_of({"a": [falling]}))
    got = run_result(write_run(tmp_path / "b", [0.1] * 3, None))
    assert got["steps_to_good"] is None and got["stopped"] == "lost" and got["f1_after"] is None


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("metrics.jsonl", '{"step": 1}\n'),
        ("metrics.jsonl", '{"step": 1, "answer_f1": "x", "seconds_rollout": 1}\n'),
        ("summary.json", '{"f1_after": "x"}'),
        ("summary.json", '{"stopped_unhealthy": []}'),
    ],
)
def test_a_run_whose_files_are_damaged_is_named(tmp_path, name, text):
    (write_run(tmp_path / "a", [0.5], 0.5) / name).write_text(text)
    with pytest.raises(DataError, match=f"{name}[:,] "):
        table_of({"a": [run_result(tmp_path / "a")]})
    if name == "metrics.jsonl":
        with pytest.raises(DataError, match=name):
            plot_arms({"a": [tmp_path / "a"]}, tmp_path / "curves.png")


def test_a_row_holds_means_and_intervals_over_seeds(tmp_path):
    after = [0.8, 0.9, 0.97]
    runs = [
        run_result(write_run(tmp_path / str(i), [0.95] * (4 + i), f1)) for i, f1 in enumerate(after)
    ]
    (row,) = table_of({"a": runs})
    low, high = stats.t.interval(0.95, 2, np.mean(after), stats.sem(after))
    assert row["f1_after"] == pytest.approx(np.mean(after))
    assert row["f1_after_interval"] == (pytest.approx(low, abs=1e-3), min(1.0, high))
    assert row["reached_good"] == 3 and row["steps_to_good"] == 4
    (alone,) = table_of({"a": runs[:1]})
    assert alone["f1_after_interval"] is None
    page = as_markdown([row, alone])
    assert page.count("\n") == 4 and "0.89 (" in page and "4 (3/3)" in page
    assert "stopped" not in page and "where it must" not in page


def test_stopped_runs_and_search_by_need_appear_in_the_table(tmp_path):
    runs = [
        run_result(write_run(tmp_path / n, [0.9] * 4, f1)) for n, f1 in (("a", 0.9), ("b", None))
    ]
    runs[0] |= {"searched_needed_after": 0.98, "searched_memorised_after": 0.25}
    page = as_markdown(table_of({"priced": runs}))
    assert "0.90, 1 stopped" in page
    head, _, line = page.splitlines()
    assert "| searched where it must | and where not |" in head and "| 0.98 | 0.25 |" in line


def test_the_figure_accepts_runs_of_several_lengths(tmp_path):
    runs = [write_run(tmp_path / str(n), [0.1 * n] * n, 0.5) for n in (2, 5, 0)]
    plot_arms({"a": runs[:2], "b": runs[2:]}, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
