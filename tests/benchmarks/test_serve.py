"""`python -m benchmarks serve`: both engines asked over sockets, where both are there."""

import importlib.util
import json

import pytest

from tests.benchmarks import run


@pytest.mark.slow
def test_answers_a_second_of_both_engines(model):
    done = run("serve", "--model", model, "--clients", 2, "--seconds", 1, "--json")
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["errors"] == 0 and told["ours"]["requests"] >= 2
    assert told["ours"]["tokens_per_s"] > 0
    there = importlib.util.find_spec("jetstream") is not None
    assert (told["ratio"] is not None) == (told["jetstream"] is not None) == there
