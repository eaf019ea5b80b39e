"""A policy of 460k random weights learns to search a generated world, in minutes on a laptop."""

from r1s_jax.config import (
    AlgorithmConfig,
    ColdStartConfig,
    Config,
    EvalConfig,
    ModelConfig,
    OptimizerConfig,
    PolicyConfig,
    RolloutConfig,
    StageConfig,
    TinyWorldConfig,
)


def config() -> Config:
    return Config(
        name="tiny_world",
        policy=PolicyConfig(
            architecture=ModelConfig(
                vocab_size=156,
                d_model=128,
                d_ff=256,
                num_layers=3,
                num_heads=4,
                num_kv_heads=2,
                head_dim=32,
                rope_theta=10000.0,
                tie_embeddings=True,
            ),
            compute_dtype="float32",  # as its published numbers
        ),
        environment=TinyWorldConfig(),
        cold_start=ColdStartConfig(
            steps=1500, accuracy=0.995, batch_size=46, learning_rate=2e-3, cooldown_steps=150
        ),
        stage1=StageConfig(steps=4, reward="stage1", questions_per_step=16),
        stage2=StageConfig(steps=30, reward="stage2", questions_per_step=16),
        rollout=RolloutConfig(
            slots=64,
            top_p=1.0,
            max_length=192,
            max_prompt_length=32,
            max_turn_length=32,
            max_searches=4,
            documents_per_query=1,
            max_query_length=24,
            max_documents_length=48,
            prefill_rows=16,
            prefill_chunk=32,
        ),
        algorithm=AlgorithmConfig(samples_per_question=8),
        optimizer=OptimizerConfig(learning_rate=2e-4, decay_to=0.1, b2=0.99, micro_batch_rows=8),
        eval=EvalConfig(questions=200),
    )
