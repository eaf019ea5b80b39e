"""`python -m benchmarks serve`: both engines over sockets, where JetStream is installed."""

import importlib.util
import json

import pytest

from tests.benchmarks import run


@pytest.mark.slow
def test_both_engines_are_measured(model):
    done = run("serve", "--model", model, "--clients", 2, "--seconds", 1, "--json")
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["errors"] == 0 and result["ours"]["requests"] >= 2
    assert result["ours"]["tokens_per_s"] > 0
    installed = importlib.util.find_spec("jetstream") is not None
    assert (result["ratio"] is not None) == (result["jetstream"] is not None) == installed
