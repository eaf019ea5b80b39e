"""Rewards of the released servers: one rule at a time, and on 1,800 of their own outputs."""

import gzip
import json
import os
from pathlib import Path

import pytest

from r1s_jax.eval.rewards import reward_file
from r1s_jax.protocol import r1_searcher as protocol
from r1s_jax.protocol.solution import Solution
from r1s_jax.rewards.registry import reward_rule

BLOCK = f"{protocol.BEGIN_QUERY} k {protocol.END_QUERY}" + protocol.document_block(["T   text"])
END = f"</think> <answer> New York {protocol.END_ANSWER}"
# A text and its reward by each server: qwen_zero, llama_stage1, llama_stage2.
CASES = {
    "a search": (BLOCK + END, 1, 2, 1),
    "no search": (END, 1, 1.5, 1),
    "wrong answer": (BLOCK + END.replace("New York", "Rome"), 0, 0, 0),
    "half an answer": (BLOCK + END.replace("New York", "York"), 2 / 3, 0, 2 / 3),
    "no answer": (BLOCK + "</think>", -2, -0.5, -1),
    "answer open": (BLOCK + "</think><answer> New York", -2, -0.5, -1),
    "two answers": (BLOCK + END + "<answer>New York</answer>", -1, 1.5, 0),
    "thinks again": ("<think>" + BLOCK + END, -1, 1.5, 0),
    "query unclosed": (protocol.BEGIN_QUERY + BLOCK + END, -1, 1.5, 0),
    "documents end early": (BLOCK.rstrip() + END, -1, 1.5, 0),
    "no document": (BLOCK.replace("(1)T   text", "None") + END, -1, 1.5, 0),
    "assistant in a passage": (BLOCK.replace("text", "assistant") + END, -1, 2, 1),
    "ASSISTANT is another word": (BLOCK.replace("text", "ASSISTANT") + END, 1, 2, 1),
    "ten words": (END.replace("York", "York" + " York" * 8), 1 / 3, 1.5, 1 / 3),
    "eleven words": (END.replace("York", "York" + " York" * 9), 4 / 13 - 2, 1.5, 4 / 13),
    "a tag's name in the answer": (END.replace("New", "begin_of_query New"), 4 / 7 - 2, 1.5, 4 / 7),
    "Chinese in a passage": (BLOCK.replace("text", "\u4e2d") + END, 1, 2, 1),
    "Chinese of its own": ("\u4e2d" + BLOCK + END, -1, 2, 0),
    "nothing": ("", -2, -1, -1),
}


@pytest.mark.parametrize("name", CASES)
def test_each_rule(name):
    text, *expected = CASES[name]
    for variant, value in zip(("qwen_zero", "llama_stage1", "llama_stage2"), expected, strict=True):
        reward = reward_rule(variant)(Solution.of_text(text), "New York")
        assert reward.value == pytest.approx(value, abs=1e-12), variant


def cases():
    path = Path(os.environ["R1S_DATA"]) / "reward_cases.jsonl.gz"
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


@pytest.mark.skipif("R1S_DATA" not in os.environ, reason="R1S_DATA names no data folder")
@pytest.mark.parametrize("variant", ["qwen_zero", "llama_stage1", "llama_stage2"])
def test_all_published_outputs(variant, tmp_path):
    chosen = [case for case in cases() if case["variant"] == variant]
    assert len(chosen) == 600
    path = tmp_path / "cases.jsonl"
    path.write_text("".join(json.dumps(case | {"reward": None}) + "\n" for case in chosen))
    for case, got in zip(chosen, reward_file(path, variant), strict=True):
        assert round(got["reward"] - case["reward"], 9) == 0, case
