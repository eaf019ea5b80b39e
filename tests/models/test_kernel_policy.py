"""The policy with interpreted accelerator kernels samples and learns as with XLA."""

import dataclasses
import subprocess
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from r1s_jax.config import ConfigError, MeshConfig, PolicyConfig
from r1s_jax.kernels.tuning import ACCELERATOR, CPU, default_tuning
from r1s_jax.learning.learner import Learner
from r1s_jax.learning.losses import likelihood_loss
from r1s_jax.models.params import init_params
from r1s_jax.models.sharding import attention_impl, make_mesh, mesh_tuning, row_attention
from tests import makers

# The narrowest heads that a kernel supports.
LEARNING = dataclasses.replace(makers.LEARNED, head_dim=16, vocab_size=32)
SAMPLING = dataclasses.replace(makers.MODEL, head_dim=16)


def as_its_platform(run):
    """`run(impl, ...)` with the tuning of the platform of `impl`."""

    def tuned(impl: str, *args):
        with makers.tuned_as_accelerator() if impl == "interpret" else nullcontext():
            return run(impl, *args)

    return tuned


@as_its_platform
def learning_step(impl: str, mesh) -> dict[str, np.ndarray]:
    """Loss and gradients (as a step of SGD) of one packed batch."""
    learner = makers.make_learner(
        optax.sgd(1.0), model=LEARNING, mesh=mesh, attention=impl, remat="full"
    )
    params = init_params(LEARNING, 0)
    batch, micro = makers.packed(makers.make_sequences(), micro_batch_rows=2)
    state, metrics = learner.update(learner.init(params), batch, micro)
    moved = jax.tree.map(lambda a, b: np.asarray(a - b), params, jax.device_get(state.params))
    leaves, _ = jax.tree_util.tree_flatten_with_path(moved)
    steps = {jax.tree_util.keystr(path): leaf for path, leaf in leaves}
    return {"loss": np.asarray(metrics["loss"])} | steps


@as_its_platform
def sampled(impl: str, mesh=None) -> np.ndarray:
    engine = makers.make_engine(model=SAMPLING, attention=impl, mesh=mesh)
    return makers.roll(engine, samples=2).trajectory.tokens


def assert_same_step(got, expected):
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(got[name], value, atol=1e-5, err_msg=name)
    assert any(np.abs(v).max() > 1e-3 for name, v in expected.items() if name != "loss")


@pytest.fixture(scope="module")
def plain():
    return learning_step("xla", make_mesh(MeshConfig()))


@pytest.fixture(scope="module")
def plain_tokens():
    return sampled("xla")


def test_learning_is_the_same(plain):
    assert_same_step(learning_step("interpret", make_mesh(MeshConfig())), plain)


def test_sampling_is_the_same(plain_tokens):
    np.testing.assert_array_equal(sampled("interpret"), plain_tokens)


@pytest.mark.slow
def test_on_a_mesh_each_device_runs_the_kernel_on_its_rows_and_heads(plain, plain_tokens, tmp_path):
    code = (
        f"import sys, numpy as np, {__name__} as t\n"
        "from r1s_jax.config import MeshConfig\n"
        "mesh = t.make_mesh(MeshConfig(fsdp=2, tensor=2))\n"
        "step = t.learning_step('interpret', mesh)\n"
        f"np.savez({str(tmp_path / 'out.npz')!r}, tokens=t.sampled('interpret', mesh), **step)\n"
    )
    command = [sys.executable, "-c", code]
    subprocess.run(command, check=True, env=makers.with_devices(4), timeout=300)
    step = dict(np.load(tmp_path / "out.npz"))
    np.testing.assert_array_equal(step.pop("tokens"), plain_tokens)
    assert_same_step(step, plain)


def test_a_backend_that_does_not_support_the_policy_is_named():
    narrow = dataclasses.replace(makers.MODEL, head_dim=24)
    with pytest.raises(ConfigError, match=r"policy.attention=gpu: head width 24.*powers of two"):
        makers.make_engine(model=narrow, attention="gpu")
    policy = PolicyConfig(architecture=narrow, attention="tpu")
    with pytest.raises(ConfigError, match=r"policy.attention=tpu: head width 24"):
        Learner.of(policy, narrow, make_mesh(MeshConfig()), optax.sgd(1.0), likelihood_loss)


def test_auto_takes_the_backend_of_the_mesh():
    mesh = make_mesh(MeshConfig())
    assert attention_impl("auto", mesh) == "xla"
    assert attention_impl("interpret", mesh) == "interpret"
    with pytest.raises(ValueError, match="impl='cuda' is not an attention backend"):
        q = np.zeros((1, 2, 1, 16), np.float32)
        row_attention("cuda", mesh)(q, q, q, last_query=np.ones((1, 2), np.int32))


def test_tuning_follows_from_the_platform_not_from_the_attention_backend():
    """XLA's attention on an accelerator uses a bfloat16 cache and a scan over layers."""
    tpu = SimpleNamespace(devices=np.array([SimpleNamespace(platform="tpu")]))
    assert mesh_tuning(tpu) == ACCELERATOR and mesh_tuning(make_mesh(MeshConfig())) == CPU
    assert default_tuning() == CPU and default_tuning("cuda") == ACCELERATOR
    engine = makers.make_engine(model=SAMPLING, attention="xla")
    roll = dataclasses.replace(engine.roll, compute_dtype=jnp.bfloat16)
    prompts, params = engine.prompts([None], 0, 8), init_params(SAMPLING, 0)

    def form() -> tuple[np.dtype, bool]:
        """The dtype of the cache, and whether layers are unstacked."""
        cache = jax.eval_shape(roll.start, prompts).cache.k
        return cache.dtype, isinstance(roll.prepare(params)["layers"], list)

    assert form() == (jnp.float32, True)
    with makers.tuned_as_accelerator():
        assert form() == (jnp.bfloat16, False)
