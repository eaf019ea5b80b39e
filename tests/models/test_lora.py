"""Adapters start without effect, are the only trained parameters, and can be merged."""

from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r1s_jax.config import MeshConfig, ModelConfig, OptimizerConfig, PolicyConfig, override
from r1s_jax.configs import tiny_world
from r1s_jax.io.journal import rows_so_far
from r1s_jax.kernels.tuning import CPU
from r1s_jax.learning.learner import make_optimizer
from r1s_jax.models.decoder import Policy
from r1s_jax.models.lora import is_adapter, merge_adapters, trainable
from r1s_jax.models.params import add_adapters, init_params
from r1s_jax.models.pretrained import load_pretrained, make_policy
from r1s_jax.models.sharding import make_mesh
from r1s_jax.rollout.loop import Rollout
from r1s_jax.train import train
from tests import makers
from tests.learning.test_learner import make_learner, make_sequences, packed
from tests.makers import ROLLOUT, SHORT

MODEL = ModelConfig(31, 16, 32, 2, 4, 2, 4, rope_theta=1000.0, qkv_bias=True).with_lora(3, 6.0)
TOKENS = np.random.default_rng(0).integers(0, 31, (2, 9))


@cache
def filled() -> dict:
    """Parameters with nonzero adapters."""
    params, rng = jax.jit(lambda: init_params(MODEL, 0))(), np.random.default_rng(1)
    layers = {
        name: jnp.asarray(rng.normal(0, 0.2, p.shape), jnp.float32) if is_adapter(name) else p
        for name, p in params["layers"].items()
    }
    return params | {"layers": layers}


def test_the_merged_weights_are_w_plus_the_scaled_product():
    params = filled()
    layers, merged = params["layers"], merge_adapters(params, MODEL.lora_scale)["layers"]
    assert not any(map(is_adapter, merged))
    for name, inputs in {"wq": 1, "wo": 2, "w_down": 1}.items():
        for i in range(2):
            w, a, b = (np.asarray(layers[n][i], np.float64) for n in (name, *_pair(name)))
            shape = w.shape
            product = a.reshape(-1, 3) @ b.reshape(3, -1)
            assert a.ndim == inputs + 1
            np.testing.assert_allclose(
                merged[name][i], w + 2.0 * product.reshape(shape), rtol=1e-5, atol=1e-6
            )


def _pair(name: str) -> tuple[str, str]:
    return f"{name}_lora_a", f"{name}_lora_b"


def test_the_policy_with_adapters_is_the_merged_one():
    params = filled()
    merged = Policy(MODEL.without_lora(), merge_adapters(params, MODEL.lora_scale))(TOKENS)
    np.testing.assert_allclose(Policy(MODEL, params)(TOKENS), merged, atol=1e-5)
    plain = {n: p for n, p in params["layers"].items() if not is_adapter(n)}
    without = Policy(MODEL.without_lora(), params | {"layers": plain})(TOKENS)
    assert np.abs(without - merged).max() > 0.1


@pytest.mark.slow
def test_new_adapters_change_nothing():
    base = jax.jit(lambda: init_params(MODEL.without_lora(), 0))()
    adapted = jax.jit(lambda: add_adapters(base, MODEL, 0))()
    before = Policy(MODEL.without_lora(), base)(TOKENS)
    np.testing.assert_allclose(Policy(MODEL, adapted)(TOKENS), before, atol=1e-6)
    assert trainable(adapted).keys() == {"layers"}


def test_sampler_and_learner_use_the_same_weights():
    """Both use the same values of norm gains and adapters that bfloat16 would round."""
    rng, params = np.random.default_rng(2), filled()
    layers = {n: p * (0.01 if n.endswith("_lora_b") else 1) for n, p in params["layers"].items()}
    for name in ("attn_norm", "mlp_norm"):
        layers[name] = layers[name] + jnp.asarray(rng.normal(0, 0.003, layers[name].shape))
    params = params | {"layers": layers, "final_norm": params["final_norm"] * 1.001}
    loop = Rollout(
        model=MODEL,
        config=ROLLOUT,
        mesh=make_mesh(MeshConfig()),
        compute_dtype=jnp.bfloat16,
        eos_ids=(0,),
        num_tag_states=1,
    )

    def logits(params):
        return Policy(MODEL, params, compute_dtype=jnp.bfloat16, tuning=CPU)(TOKENS)

    with makers.tuned_as_accelerator():  # uses the learner's layout of weights
        prepared = loop.prepare(params)
    learned, sampled = logits(params), logits(prepared)
    np.testing.assert_array_equal(sampled, learned)
    plain = {n: p for n, p in layers.items() if not is_adapter(n)}
    assert np.abs(learned - logits(params | {"layers": plain})).max() > 0
    rounded = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
    assert np.abs(learned - logits(rounded)).max() > 0


@pytest.mark.parametrize("remat", ["none", pytest.param("full", marks=pytest.mark.slow)])
def test_only_the_adapters_are_trained_and_with_their_own_gradient(remat):
    learner = make_learner(model=MODEL, remat=remat)
    params, (batch, micro) = filled(), packed(make_sequences())
    state, metrics = learner.update(learner.init(params, keep_reference=True), batch, micro)
    moved = jax.tree_util.tree_map_with_path(
        lambda path, a, b: (is_adapter(path[-1].key), np.abs(a - b).max()), params, state.params
    )
    leaves = jax.tree.leaves(moved, is_leaf=lambda x: isinstance(x, tuple))
    assert all((change > 0) == adapter for adapter, change in leaves)
    assert state.reference.keys() == {"layers"}

    # By hand: the gradients of A and B from that of the merged weight.
    plain = make_learner(model=MODEL.without_lora(), remat=remat)
    merged = merge_adapters(params, MODEL.lora_scale)
    after, _ = plain.update(plain.init(merged), batch, micro)
    gradient = np.asarray(merged["layers"]["w_up"] - after.params["layers"]["w_up"])  # SGD, rate 1
    a, b = (np.asarray(params["layers"][n]) for n in _pair("w_up"))
    layers = state.params["layers"]
    for i in range(2):
        step_a = a[i] - np.asarray(layers["w_up_lora_a"][i])
        step_b = b[i] - np.asarray(layers["w_up_lora_b"][i])
        np.testing.assert_allclose(step_a, 2.0 * gradient[i] @ b[i].T, atol=1e-4)
        np.testing.assert_allclose(step_b, 2.0 * a[i].T @ gradient[i], atol=1e-4)
    assert metrics["grad_norm"] > 0


def test_the_optimizer_knows_only_the_adapters_and_the_weights_may_be_half():
    config = PolicyConfig(architecture=replace(MODEL, vocab_size=156, lora_rank=0), lora_rank=3)
    half = replace(config, param_dtype="bfloat16")
    policy = make_policy(half, 0, tokenizer=makers.build_tokenizer())
    kinds = {n: p.dtype for n, p in policy.params["layers"].items()}
    assert kinds["wq"] == jnp.bfloat16 and kinds["wq_lora_a"] == jnp.float32
    learner = make_learner(
        make_optimizer(OptimizerConfig()), model=policy.model, mesh=make_mesh(MeshConfig())
    )
    state = learner.init(policy.params)
    moments = sum(p.size for p in jax.tree.leaves(state.optimizer))
    adapters = sum(p.size for p in jax.tree.leaves(trainable(policy.params)))
    assert moments == 2 * adapters + 1


@pytest.mark.slow
def test_a_run_with_adapters_resumes_and_its_export_is_merged(tmp_path):
    short = [*SHORT, "policy.lora_rank=4", "cold_start.steps=20", "algorithm.kl_coefficient=0.01"]
    config = override(tiny_world.config(), [*short, "eval.questions=0"])
    train(config, tmp_path / "run")
    rows = rows_so_far(tmp_path / "run" / "metrics.jsonl")
    assert max(row["logprob_diff_max"] for row in rows) < 1e-4, "sampled with the weights trained"
    assert abs(rows[0]["kl"]) < 1e-5 < abs(rows[-1]["kl"])
    policy = load_pretrained(str(tmp_path / "run"))
    assert not policy.model.lora_rank and not any(map(is_adapter, policy.params["layers"]))
    start = init_params(config.policy.architecture, config.seed)
    assert np.abs(policy.params["layers"]["wq"] - start["layers"]["wq"]).max() > 1e-3
    np.testing.assert_array_equal(policy.params["embed"], start["embed"])
    again = train(config, tmp_path / "run", resume=True)
    assert again["steps"] == 6
