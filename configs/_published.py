"""The shared settings of the published runs (R1-Searcher, arXiv 2503.05592); not a recipe itself.

350 questions in stage 1 and 8,148 in stage 2, 64 per step, each seen once.
"""

from typing import Literal

from r1s_jax.config import (
    AlgorithmConfig,
    Config,
    CorpusConfig,
    Estimator,
    MeshConfig,
    OptimizerConfig,
    PolicyConfig,
    RolloutConfig,
    StageConfig,
)

STAGE1, STAGE2 = 350 // 64, 8148 // 64


def published(
    name: str,
    model: str,
    *,
    stage1: int = 0,
    stage2: int = 0,
    prompt: Literal["base", "chat"] = "base",
    estimator: Estimator = "reinforce_baseline",
    kl_coefficient: float = 0.0,
    tensor: int = 1,
) -> Config:
    """A run of `model` with the published numbers.

    Name your files: `environment.questions=...` and `environment.index=...` (or passages). The
    slots, micro-batch rows and remat come from `r1s compile --fit` for a 7B policy on 16 v5p chips;
    call it again for smaller chips.
    """
    return Config(
        name=name,
        policy=PolicyConfig(model=model, compute_dtype="bfloat16", remat="attention"),
        environment=CorpusConfig(
            questions=(f"data/stage_{2 if stage2 else 1}.jsonl",),
            index="indexes/kilt",
            prompt=prompt,
        ),
        stage1=StageConfig(steps=stage1, reward="stage1", questions_per_step=64),
        stage2=StageConfig(steps=stage2, reward="stage2", questions_per_step=64),
        rollout=RolloutConfig(
            slots=256,
            temperature=1.0,
            top_p=0.95,
            max_length=8192,
            max_prompt_length=512,
            max_turn_length=512,
            max_searches=8,
            documents_per_query=3,
            max_documents_length=768,
            prefill_rows=8,
            prefill_chunk=128,
            partial_rollouts=True,
        ),
        algorithm=AlgorithmConfig(
            estimator=estimator,
            samples_per_question=16,
            updates_per_rollout=4,
            clip=0.2,
            kl_coefficient=kl_coefficient,
        ),
        optimizer=OptimizerConfig(
            learning_rate=2e-6, b1=0.9, b2=0.95, grad_clip=1.0, micro_batch_rows=2
        ),
        mesh=MeshConfig(tensor=tensor),
    )
