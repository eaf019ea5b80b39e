"""Runs every command of docs/coming_from.md, in order, on small data in the forms it names."""

import gzip
import json

import faiss
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from r1s_jax.data.tiny_world import TinyWorld
from r1s_jax.io.journal import rows_so_far
from r1s_jax.models.pretrained import load_pretrained
from r1s_jax.retrieval.encoder import HashEncoder
from tests.makers import CHAT, HERMES_CHAT, run_cli, save_letters_model
from tests.test_docs import ROOT, commands

# Shortens a run of a real recipe to seconds; keeps the page's dialect and files.
SMALL = ["policy.compute_dtype=float32", "policy.remat=none", "mesh.tensor=1", "stage1.steps=0"]
SMALL += ["stage2.steps=1", "stage2.questions_per_step=2", "algorithm.samples_per_question=2"]
SMALL += ["algorithm.updates_per_rollout=1", "rollout.slots=4", "rollout.prefill_rows=2"]
SMALL += ["rollout.max_length=2048", "rollout.max_prompt_length=1536", "rollout.max_turn_length=8"]
SMALL += ["rollout.prefill_chunk=256"]
MODELS = {"search_r1_3b": "search_r1_model", "qwen2_5_0_5b": "search_r1_model"}


def small(words: list[str]) -> list[str]:
    """The same command without the hub and with few steps."""
    words = ["hash" if word.startswith("hf:") else word for word in words]
    if words[0] == "train":
        models = [f"policy.model={MODELS[words[1]]}"] if words[1] in MODELS else []
        first, *rest = words[1:]
        return ["train", first, *models, *SMALL, *rest]
    if words[:2] == ["eval", "run"]:
        return [*words, "rollout.max_length=2048", "rollout.max_turn_length=8", "rollout.slots=2"]
    return words


@pytest.fixture
def others(tmp_path, monkeypatch):
    """The files of users of other libraries."""
    monkeypatch.chdir(tmp_path)
    save_letters_model(tmp_path / "search_r1_model", CHAT)
    save_letters_model(tmp_path / "qwen3_tools", HERMES_CHAT, end="<|im_end|>")
    world = TinyWorld((3,), 12)
    questions = world.questions(8)
    with gzip.open("wiki-18.jsonl.gz", "wt") as file:
        for person in world.people:
            text = person.passage.partition("   ")[2]
            row = {"id": person.name, "contents": f'"{person.name}"\n{text}'}
            file.write(json.dumps(row) + "\n")
    (tmp_path / "passages.tsv").write_text("".join(f"{p.id}\t{p.line}\n" for p in world.passages))
    index = faiss.IndexFlatIP(HashEncoder().dims)
    index.add(HashEncoder().encode([p.line for p in world.passages], kind="passage"))
    faiss.write_index(index, "e5_Flat.index")
    rows = [{"id": f"q{q.id}", "question": q.question, "golden_answers": q.answers}
            for q in questions]  # fmt: skip
    (tmp_path / "nq_test.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (tmp_path / "search_r1.txt").write_text("Search and answer. Question: {question}\n")
    rows = [{"idx": q.id, "question": q.question, "answer": q.answers[0]} for q in questions]
    (tmp_path / "stage_2.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    rows = [
        {
            "data_source": "nq",
            "prompt": [{"role": "user", "content": f"Answer it. Question: {q.question}\n"}],
            "reward_model": {"ground_truth": {"target": list(q.answers)}, "style": "rule"},
            "extra_info": {"index": i, "split": "train"},
        }
        for i, q in enumerate(questions)
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), "nq_hotpotqa_train.parquet")
    return tmp_path


@pytest.mark.slow
def test_every_command_of_the_page_does_its_job(others):
    done = 0
    for words in commands(ROOT / "docs" / "coming_from.md"):
        assert words[0] == "r1s"
        result = run_cli(*small(words[1:]))
        assert result.exit_code == 0, (words, result.output[-2000:], result.exception)
        done += 1
    assert done == 13
    assert len(rows_so_far(others / "nq.jsonl")) == 8
    assert {row["id"][0] for row in rows_so_far(others / "nq_predictions.jsonl")} == {"q"}
    header = json.loads((others / "nq.jsonl.header.json").read_text())
    assert header["dialect"]["dialect"] == "search_r1"
    assert header["dialect"]["prompt"].startswith("Search and answer.")
    for run, dialect in (("search_r1", "search_r1"), ("tools", "tool_call"), ("r1", "r1_searcher")):
        assert load_pretrained(f"runs/{run}").dialect.name == dialect
        (row,) = rows_so_far(others / "runs" / run / "metrics.jsonl")
        assert np.isfinite(row["loss"])
    assert load_pretrained("exported").dialect.name == "search_r1"
