"""The recipe over real text with few steps: real model, real encoder, real index."""

import json

import pytest

from r1s_jax.config import override
from r1s_jax.configs import wiki_smollm2
from r1s_jax.io.journal import rows_so_far
from r1s_jax.system.assets import resolve
from r1s_jax.train import train


@pytest.mark.slow
def test_wiki_recipe_learns_a_step(tmp_path, monkeypatch):
    monkeypatch.delenv("R1S_DATA", raising=False)
    summaries = json.loads(resolve(wiki_smollm2.SUMMARIES).read_bytes())
    few = dict(list(summaries.items())[:64])
    path = tmp_path / "summaries_few.json"
    path.write_text(json.dumps(few))
    named = ("questions", "passages", "demonstrations")
    changes = [f"environment.{name}={path}" for name in named]
    changes += ["cold_start.steps=1", "cold_start.batch_size=4", "stage1.steps=0"]
    changes += ["stage2.steps=1", "stage2.questions_per_step=2", "eval.questions=2"]
    changes += ["rollout.retrieve_first=true", "rollout.max_prompt_length=320"]
    changes += ["rollout.max_length=384", "policy.compute_dtype=float32"]  # for comparable logprobs
    changes += ["algorithm.samples_per_question=2", "rollout.max_turn_length=16"]
    result = train(override(wiki_smollm2.config(), changes), tmp_path / "run")
    assert result["steps"] == 1 and result["searches"] >= 4
    (row,) = rows_so_far(tmp_path / "run" / "metrics.jsonl")
    assert row["loss"] == row["loss"] and row["grad_norm"] >= 0
    assert row["logprob_diff_max"] < 1e-2
    trace = rows_so_far(tmp_path / "run" / "traces.jsonl")[0]
    assert "<|begin_of_documents|>" in trace["spans"][0][0] and not trace["spans"][0][1]
