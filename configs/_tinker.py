"""The settings of tinker-cookbook's search recipe (`recipes/search_tool`); not a recipe itself.

REINFORCE with one update a rollout, groups of 8, adapters, exact match. Its questions are those of
Search-R1.
"""

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


def tinker_search(name: str, model: str, slots: int) -> Config:
    """512 questions x 8 samples a step, each question once; a broken format costs 0.1.

    Name your files: `environment.questions=...` and `environment.index=...` (or retriever). A
    trajectory has room for five full turns and their documents; the published run, whose limit is
    32,768 tokens, cuts none either. There the answer follows "Answer:"; here it is the whole last
    turn, or stands in answer tags with a prompt that asks for them (`protocol.prompt`).
    """
    return Config(
        name=name,
        policy=PolicyConfig(
            model=model,
            compute_dtype="bfloat16",
            param_dtype="bfloat16",
            remat="full",
            lora_rank=32,
        ),
        protocol=ProtocolConfig(dialect="tool_call"),
        environment=CorpusConfig(
            questions=("data/nq_hotpotqa_train.parquet",), index="indexes/wiki-18"
        ),
        stage1=StageConfig(steps=0, reward="stage1", questions_per_step=512),
        stage2=StageConfig(steps=331, reward="em + 0.1*format", questions_per_step=512),
        rollout=RolloutConfig(
            slots=slots,
            top_p=1.0,
            max_length=8192,
            max_prompt_length=512,
            max_turn_length=1024,
            max_searches=5,
            documents_per_query=3,
            max_documents_length=512,
            prefill_rows=4,
            prefill_chunk=128,
        ),
        algorithm=AlgorithmConfig(
            estimator="dr_grpo",
            loss="reinforce",
            loss_average="constant",
            samples_per_question=8,
            updates_per_rollout=1,
        ),
        optimizer=OptimizerConfig(learning_rate=4e-5, grad_clip=0.0),
        mesh=MeshConfig(tensor=4),
    )
