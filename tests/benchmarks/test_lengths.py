"""Decode steps of rollouts whose trajectories have given lengths."""

import json

import pytest

from benchmarks.lengths import bench_lengths, read_lengths
from r1s_jax.io.errors import ConfigError
from tests.benchmarks import run
from tests.makers import letters


def never():
    raise AssertionError("integers need no tokenizer")


def test_lengths_are_integers_or_counted_in_traces(tmp_path):
    (tmp_path / "lengths.txt").write_text("12 7\n\n300\n")
    assert read_lengths(tmp_path / "lengths.txt", never) == [12, 7, 300]
    row = {"step": 1, "question": "q", "answers": [], "reward": 0.0, "finish": "finished"}
    spans = [["abc", True], ["documents", False], ["de", True]]
    (tmp_path / "traces.jsonl").write_text(
        json.dumps(row | {"spans": spans, "searches": []}) + "\n"
    )
    assert read_lengths(tmp_path / "traces.jsonl", lambda: letters("", bos=False)) == [5]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("12\nx7", r"line 2: expected a number of tokens from 1 to 1000000, found 'x7'"),
        ("-3", "found '-3'"),
        ("0", "found '0'"),
        ("9" * 5000, "found '999"),
        ("\n", "holds no lengths"),
        (b"\xff\xfe", "lengths.txt"),
    ],
)
def test_nonsense_is_refused(tmp_path, text, said):
    path = tmp_path / "lengths.txt"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError, match=said):
        read_lengths(path, never)
    done = run("rollout", "--lengths", path)
    assert done.exit_code == 1 and not done.stdout


def test_a_missing_file_and_an_odd_batch_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="does not exist"):
        read_lengths(tmp_path / "none.txt", never)
    with pytest.raises(ConfigError, match="multiple of 16, got 40"):
        bench_lengths([3], runaway=0, partial_rollouts=False, batch=40)


@pytest.mark.slow
def test_partial_rollouts_keep_the_slots_busy():
    sizes = {"slots": 8, "batch": 64, "batches": 3, "limit": 160, "runaway": 0.05}
    waiting = bench_lengths([10, 20, 30], partial_rollouts=False, **sizes)
    carried = bench_lengths([10, 20, 30], partial_rollouts=True, **sizes)
    for result in (waiting, carried):
        sampled = result["busy"] * 8 * result["decode_steps"]
        assert result["decode_steps"] >= result["ideal_steps"] > 0
        assert sampled / 8 >= result["ideal_steps"] - 1
    assert carried["busy"] > 0.9 > waiting["busy"]
