"""Qwen2.5-3B in Search-R1's dialect with its published numbers (arXiv 2503.09516, GRPO)."""

from r1s_jax.config import (
    AlgorithmConfig,
    Config,
    CorpusConfig,
    MeshConfig,
    OptimizerConfig,
    PolicyConfig,
    ProtocolConfig,
    RolloutConfig,
    StageConfig,
)


def config() -> Config:
    """512 questions x 5 samples a step, 1,005 steps, exact match alone.

    Name your files: `environment.questions=...` and `environment.index=...` (or retriever). The
    numbers are those of the released code (`scripts/nq_hotpotqa/v0.2/train_grpo.sh` and the
    defaults under it), which goes on for 1,005 steps where the paper reports 500. Two things of it
    are missing here: a bonus of 0.001 for entropy, and a context that drops its beginning.
    """
    return Config(
        name="search_r1_3b",
        policy=PolicyConfig(model="hf:Qwen/Qwen2.5-3B", compute_dtype="bfloat16", remat="full"),
        protocol=ProtocolConfig(dialect="search_r1"),
        environment=CorpusConfig(
            questions=("data/nq_hotpotqa_train.parquet",), index="indexes/wiki-18"
        ),
        stage1=StageConfig(steps=0, reward="stage1", questions_per_step=512),
        stage2=StageConfig(steps=1005, reward="search_r1_em", questions_per_step=512),
        rollout=RolloutConfig(
            slots=64,
            top_p=0.95,
            max_length=4096,
            max_prompt_length=512,
            max_turn_length=500,
            max_searches=4,
            documents_per_query=3,
            max_documents_length=500,
            prefill_rows=4,
            prefill_chunk=128,
        ),
        algorithm=AlgorithmConfig(
            estimator="grpo",
            samples_per_question=5,
            updates_per_rollout=10,
            loss_average="token",
            kl_coefficient=0.001,
            kl_penalty="loss",
            kl_estimator="k3",
        ),
        optimizer=OptimizerConfig(
            learning_rate=1e-6, warmup_steps=286, b2=0.999, weight_decay=0.01
        ),
        mesh=MeshConfig(tensor=2),
    )
