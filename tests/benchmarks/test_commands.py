"""The commands as users type them, and the printed keys."""

import json

import jax
import numpy as np
import pytest

from benchmarks.__main__ import app
from r1s_jax import cli
from r1s_jax.data.tiny_world import build_tokenizer
from r1s_jax.models.weights import save_params
from tests.benchmarks import run
from tests.makers import MODEL, searching_params

COMMANDS = ("decode", "update", "step", "rollout", "serve", "search", "encode", "attention")
COMMANDS += ("forks",)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command):
    done = run(command, "--help")
    assert done.exit_code == 0 and "--json" in done.output


def test_every_command_is_tested():
    assert {command.callback.__name__ for command in app.registered_commands} == set(COMMANDS)


KEYS = {
    ("decode", "--batch", 2, "--prompt-len", 16, "--new-tokens", 8): "tokens_per_s "
    "prefill_tokens_per_s peak_memory_gb",
    ("update", "--batch", 2, "--length", 32): "tokens_per_s seconds dtype gflops peak_gflops "
    "peak_share peak_memory_gb",
    ("step", "--samples", 2, "--new-tokens", 8): "seconds rollout_s update_s tokens_per_s samples "
    "new_tokens dtype peak_memory_gb",
    ("rollout", "--latency-ms", 1): "sampled_tokens_per_s searches sampled_tokens seconds "
    "latency_ms slots peak_memory_gb",
}


@pytest.mark.slow
@pytest.mark.parametrize("args", KEYS, ids=lambda args: args[0])
def test_keys_of_output(model, args):
    done = run(*args, "--model", model, "--json")
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout.splitlines()[-1])
    keys = KEYS[args].split()
    assert set(keys) <= result.keys()
    assert all(result[key] > 0 for key in keys if key not in ("dtype", "searches"))


def test_the_variance_of_forks(tmp_path):
    tokenizer = build_tokenizer()
    params = jax.tree.map(np.asarray, searching_params())
    eos = (tokenizer.eos_token_id,)
    model = save_params(params, MODEL, tmp_path / "m", tokenizer, "float32", eos_token_ids=eos)
    done = run("forks", str(model), "--questions", 4, "--samples", 4, "--json")
    assert done.exit_code == 0, done.output
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert [row["search"] for row in rows] == ["all", *range(1, len(rows))] and len(rows) > 1
    assert {"ratio", "interval", "variance_forks", "search_worth"} <= rows[0].keys()
    assert all(0 < row["draws_independent"] < 4 for row in rows)


def test_bad_input_is_one_clear_message(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["benchmarks", "search"])
    with pytest.raises(SystemExit) as stop:
        cli.main(app)
    assert stop.value.code == 1
    error = capsys.readouterr().err
    assert "name a built index or --synthetic" in error and "Traceback" not in error
