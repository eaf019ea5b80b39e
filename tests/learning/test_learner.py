import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from r1s_jax.config import ModelConfig, OptimizerConfig
from r1s_jax.kernels.tuning import ACCELERATOR, CPU
from r1s_jax.learning import logprobs as logprobs_module
from r1s_jax.learning.learner import make_optimizer
from r1s_jax.learning.logprobs import token_logprobs
from r1s_jax.learning.packing import PackedBatch, pack, unpack
from r1s_jax.learning.policy_gradient import Learned
from r1s_jax.models.decoder import Policy
from r1s_jax.models.params import init_params
from r1s_jax.tracking.metrics import update_metrics
from tests.makers import LEARNED as MODEL
from tests.makers import LENGTHS, WIDTH, make_learner, make_params, make_sequences, packed, step

OTHERS = ("reference_logprobs", "kl_weights", "ce_weights", "fresh", "log_kept")


def one_per_row(sequences) -> tuple[PackedBatch, int]:
    """A batch without the packer: one sequence per row, with padding."""
    inside = np.arange(WIDTH) < LENGTHS[:, None]
    arrays = {name: np.where(inside, a, 0)[None] for name, a in sequences.items()}
    arrays |= {name: np.zeros((1, *inside.shape)) for name in OTHERS}
    positions = np.where(inside, np.arange(WIDTH), 0).astype(np.int32)[None]
    last = np.where(inside, LENGTHS[:, None] - 1, -1).astype(np.int32)[None]
    ids = inside.astype(np.int32)[None]
    arrays["kept"] = np.zeros((1, *inside.shape, 0), np.int32)
    return PackedBatch(segment_ids=ids, positions=positions, last_query=last, **arrays), 1


def log_softmax(logits) -> np.ndarray:
    x = np.asarray(logits, np.float64)
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def assert_close(a, b, **tolerance):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), a, b)


@pytest.fixture(scope="module")
def params():
    return make_params()


@pytest.fixture(scope="module")
def learner():
    return make_learner()


@pytest.fixture(scope="module")
def alone(learner):
    return step(learner, *one_per_row(make_sequences()))


@pytest.mark.parametrize(
    ("length", "chunk"),
    [
        (5, 4),
        *(pytest.param(*sizes, marks=pytest.mark.slow) for sizes in ((1, 4), (4, 4), (11, 4))),
        (11, 128),
    ],
)
@pytest.mark.parametrize("tuning", [ACCELERATOR, CPU], ids=["accelerator", "cpu"])
def test_token_logprobs_and_entropies_equal_those_of_full_logits(
    params, monkeypatch, length, chunk, tuning
):
    monkeypatch.setattr(logprobs_module, "_LOGIT_CHUNK", chunk)
    rng, policy = np.random.default_rng(length), Policy(MODEL, params, tuning=tuning)
    tokens = rng.integers(0, MODEL.vocab_size, (3, length))
    hidden = jnp.asarray(rng.normal(size=(3, length, MODEL.d_model)), jnp.float32)
    logprobs, entropies, _ = token_logprobs(policy, jnp.asarray(tokens), hidden, tokens >= 0)
    assert logprobs.shape == entropies.shape == (3, length)
    full = log_softmax(policy.logits(hidden))[:, :-1]
    expected = np.take_along_axis(full, tokens[:, 1:, None], -1)[..., 0]
    np.testing.assert_allclose(logprobs[:, 1:], expected, atol=1e-5)
    np.testing.assert_allclose(entropies[:, 1:], -(np.exp(full) * full).sum(-1), atol=1e-5)
    assert not np.asarray(logprobs)[:, 0].any() and not np.asarray(entropies)[:, 0].any()


@pytest.mark.parametrize("tuning", [ACCELERATOR, CPU], ids=["accelerator", "cpu"])
def test_logits_are_computed_for_selected_tokens_only(params, monkeypatch, tuning):
    monkeypatch.setattr(logprobs_module, "_LOGIT_CHUNK", 4)
    rng, policy = np.random.default_rng(0), Policy(MODEL, params, tuning=tuning)
    tokens = rng.integers(0, MODEL.vocab_size, (3, 14))
    selected = rng.random((3, 14)) < 0.3
    selected[:, 0] = False
    hidden = jnp.asarray(rng.normal(size=(3, 14, MODEL.d_model)), jnp.float32)
    weights = jnp.asarray(rng.normal(size=selected.shape) * selected)

    def ours(hidden):
        logprobs, entropies, _ = token_logprobs(policy, jnp.asarray(tokens), hidden, selected)
        return (weights * logprobs).sum(), (logprobs, entropies)

    def theirs(hidden):
        full = jax.nn.log_softmax(policy.logits(hidden))[:, :-1]
        chosen = jnp.take_along_axis(full, tokens[:, 1:, None], -1)[..., 0]
        return (weights[:, 1:] * chosen).sum()

    (value, (logprobs, entropies)), gradient = jax.value_and_grad(ours, has_aux=True)(hidden)
    expected, right = jax.value_and_grad(theirs)(hidden)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(gradient, right, atol=1e-5)
    # The fullest row needs fewer chunks than all 14 columns in chunks of 4.
    chunks = -(-int(selected.sum(1).max()) // 4)
    assert (np.asarray(entropies) != 0).sum(1).max() <= 4 * chunks < 14
    assert (np.asarray(logprobs)[selected] != 0).all()


@jax.jit
@jax.value_and_grad
def plain_loss(params, s):
    """The clipped loss without packing, chunks or accumulation."""
    logprobs = jax.nn.log_softmax(Policy(MODEL, params)(s["tokens"]))[:, :-1]
    logprobs = jnp.take_along_axis(logprobs, s["tokens"][:, 1:, None], -1)[..., 0]
    ratio, advantages = jnp.exp(logprobs - s["old_logprobs"][:, 1:]), s["advantages"][:, 1:]
    gain = jnp.minimum(ratio * advantages, ratio.clip(0.8, 1.2) * advantages)
    return -(s["weights"][:, 1:] * gain).sum()


def test_the_update_is_the_gradient_of_the_loss_over_full_logits(params, alone):
    sequences = make_sequences()
    value, gradient = plain_loss(params, sequences)
    after, metrics = alone
    assert_close(after, jax.tree.map(jnp.subtract, params, gradient), atol=1e-5)
    norm = np.sqrt(sum(float((g**2).sum()) for g in jax.tree.leaves(gradient)))
    np.testing.assert_allclose(metrics["loss"], value, atol=1e-5)
    np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-4)
    assert metrics["tokens"] == (sequences["weights"] > 0).sum()
    assert metrics["grad_norm"] > 0.1  # so that the comparison above is meaningful


@pytest.mark.parametrize(("capacity", "micro_batch_rows", "micro"), [(16, 1, 3), (24, 2, 1)])
def test_packing_and_micro_batches_change_nothing(
    learner, alone, capacity, micro_batch_rows, micro
):
    batch, used = packed(make_sequences(), capacity, micro_batch_rows)
    assert used == micro
    after, metrics = step(learner, batch, micro)
    assert_close(after, alone[0], atol=1e-5)
    for name, value in alone[1].items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-4, err_msg=name)


@pytest.mark.parametrize("remat", ["attention", "full"])
def test_remat_changes_nothing(alone, remat):
    after, _ = step(make_learner(remat=remat), *one_per_row(make_sequences()))
    assert_close(after, alone[0], atol=1e-5)


@pytest.mark.parametrize(
    ("tied", "remat"),
    [
        (True, "attention"),
        *(
            pytest.param(tied, remat, marks=pytest.mark.slow)
            for tied in (True, False)
            for remat in ("none", "attention", "full")
            if (tied, remat) != (True, "attention")
        ),
    ],
)
@pytest.mark.slow
def test_bfloat16_learns_nearly_the_same_as_float32(remat, tied):
    """Rows are long enough for the matrix units of a CPU."""
    model = ModelConfig(64, 64, 128, 2, 4, 2, 16, tie_embeddings=tied)
    params = init_params(model, 0)
    batch, micro = packed(make_sequences(), capacity=96, micro_batch_rows=2)

    def gradient(dtype) -> np.ndarray:
        learner = make_learner(model=model, remat=remat, compute_dtype=dtype)
        state, _ = learner.update(learner.init(params), batch, micro)
        moved = jax.tree.map(lambda a, b: np.ravel(a - b), params, jax.device_get(state.params))
        return np.concatenate(jax.tree.leaves(moved))

    exact, rounded = gradient(jnp.float32), gradient(jnp.bfloat16)
    assert np.linalg.norm(rounded - exact) < 0.03 * np.linalg.norm(exact)


@pytest.mark.slow
def test_more_remat_needs_less_memory():
    """Compares the peak bytes of an update on a model with mostly activations."""
    model = ModelConfig(31, 32, 64, 8, 2, 1, 16)
    params = init_params(model, 0)
    batch, micro = packed(make_sequences(), capacity=256, micro_batch_rows=4)

    def held(remat: str) -> int:
        learner = make_learner(model=model, remat=remat)
        arguments = (learner.init(params), batch, jnp.int32(micro), jnp.float32(1))
        lowered = type(learner)._update.lower(learner, *arguments)
        return lowered.compile().memory_analysis().temp_size_in_bytes

    none, attention, full = map(held, ("none", "attention", "full"))
    assert full < attention < none


def test_the_first_moment_may_be_in_bfloat16():
    optimizer = make_optimizer(OptimizerConfig(moment_dtype="bfloat16"))
    adam = optimizer.init({"w": jnp.ones(3)})[1][0]
    assert (adam.mu["w"].dtype, adam.nu["w"].dtype) == (jnp.bfloat16, jnp.float32)


def test_unused_micro_batches_are_not_read(learner):
    batch, micro = packed(make_sequences())
    before, _ = step(learner, batch, micro)
    for array in batch:
        array[micro:] = 1
    after, _ = step(learner, batch, micro)
    assert_close(after, before, rtol=0)


def test_a_segment_does_not_see_its_neighbours(learner, params):
    sequences = make_sequences()
    batch, layout, micro = pack(**sequences, lengths=LENGTHS, capacity=45, micro_batch_rows=1)
    first = unpack(learner.logprobs(params, batch, micro), layout, LENGTHS, WIDTH)
    for i in range(len(LENGTHS)):
        changed = sequences["tokens"].copy()
        changed[i] = (changed[i] + 1) % MODEL.vocab_size
        batch, moved, micro = pack(
            **sequences | {"tokens": changed}, lengths=LENGTHS, capacity=45, micro_batch_rows=1
        )
        second = unpack(learner.logprobs(params, batch, micro), moved, LENGTHS, WIDTH)
        others = np.arange(len(LENGTHS)) != i
        # The entry of an untrained token may depend on the neighbour.
        before, after = (np.where(sequences["weights"] > 0, x, 0) for x in (first, second))
        np.testing.assert_allclose(after[others], before[others], atol=1e-6)
        assert not before[i].any() or np.abs(after[i] - before[i]).max() > 1e-2


def test_logprobs_are_those_of_each_sequence_alone(learner, params):
    sequences = make_sequences()
    batch, layout, micro = pack(**sequences, lengths=LENGTHS, capacity=45, micro_batch_rows=1)
    got = unpack(learner.logprobs(params, batch, micro), layout, LENGTHS, WIDTH)
    logits = jax.jit(lambda p, x: Policy(MODEL, p)(x))(params, sequences["tokens"])
    full = log_softmax(logits)[:, :-1]
    expected = np.take_along_axis(full, sequences["tokens"][:, 1:, None], -1)[..., 0]
    inside = np.arange(1, WIDTH) < LENGTHS[:, None]
    np.testing.assert_allclose(got[:, 1:][inside], expected[inside], atol=1e-5)


def test_documents_carry_no_loss_but_are_read(learner, alone):
    """Advantages of masked tokens have no effect; their ids change the loss of later tokens."""
    sequences = make_sequences()
    masked = sequences["weights"] == 0
    worth = sequences | {
        "advantages": np.where(masked, 1e6, sequences["advantages"]).astype(np.float32),
        "old_logprobs": np.where(masked, -1e6, sequences["old_logprobs"]).astype(np.float32),
    }
    after, metrics = step(learner, *one_per_row(worth))
    assert_close(after, alone[0], rtol=0)
    assert metrics == alone[1]
    ids = sequences["tokens"].copy()
    ids[:, 0] = (ids[:, 0] + 1) % MODEL.vocab_size
    assert step(learner, *one_per_row(sequences | {"tokens": ids}))[1]["loss"] != metrics["loss"]


def test_without_trained_tokens_nothing_changes(learner, params):
    sequences = make_sequences()
    sequences["weights"][:] = 0
    after, metrics = step(learner, *packed(sequences))
    assert_close(after, jax.device_get(params), rtol=0)
    assert metrics["grad_norm"] == metrics["loss"] == 0
    assert all(np.isfinite(value) for value in metrics.values())


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("grad_clip", [0.5, 1e9])
def test_the_optimizer_is_adam_after_clipping_the_global_norm(weight_decay, grad_clip):
    config = OptimizerConfig(
        learning_rate=0.01, b1=0.8, b2=0.95, weight_decay=weight_decay, grad_clip=grad_clip
    )
    rng = np.random.default_rng(0)
    shapes = {"a": (3, 4), "b": (5,)}
    params = {name: rng.normal(size=shape) for name, shape in shapes.items()}
    optimizer = make_optimizer(config)
    ours = jax.tree.map(jnp.asarray, params)
    state, move = optimizer.init(ours), jax.jit(optimizer.update)
    m = {name: np.zeros(shape) for name, shape in shapes.items()}
    v = {name: np.zeros(shape) for name, shape in shapes.items()}
    for t in range(1, 5):
        grads = {name: rng.normal(size=shape) * t for name, shape in shapes.items()}
        updates, state = move(jax.tree.map(jnp.asarray, grads), state, ours)
        ours = optax.apply_updates(ours, updates)
        norm = np.sqrt(sum((g**2).sum() for g in grads.values()))
        for name in shapes:
            g = grads[name] * min(1.0, grad_clip / norm)
            m[name] = 0.8 * m[name] + 0.2 * g
            v[name] = 0.95 * v[name] + 0.05 * g * g
            change = m[name] / (1 - 0.8**t) / (np.sqrt(v[name] / (1 - 0.95**t)) + 1e-8)
            params[name] = params[name] - 0.01 * (change + weight_decay * params[name])
        assert_close(ours, params, atol=1e-6)


def test_updates_in_a_row_are_optax_applied_by_hand(params):
    config = OptimizerConfig(learning_rate=1e-3, grad_clip=0.5)
    learner = make_learner(make_optimizer(config))
    state = learner.init(params)
    by_hand, optimizer = params, make_optimizer(config)
    moments, move = optimizer.init(by_hand), jax.jit(optimizer.update)
    for seed in range(2):
        sequences = make_sequences(seed)
        _, gradient = plain_loss(by_hand, sequences)
        updates, moments = move(gradient, moments, by_hand)
        by_hand = optax.apply_updates(by_hand, updates)
        state, _ = learner.update(state, *one_per_row(sequences))
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), by_hand, params)
    assert min(jax.tree.leaves(moved)) > 5e-4
    assert_close(state.params, by_hand, atol=2e-5)


def test_updates_do_not_change_the_given_parameters_and_the_reference(learner, params):
    before = jax.device_get(params)
    state = learner.init(params, keep_reference=True)
    state, _ = learner.update(state, *packed(make_sequences()))
    assert_close(params, before, rtol=0)
    assert_close(state.reference, before, rtol=0)
    assert learner.init(params).reference is None


def test_a_loss_names_its_own_metrics():
    """A new loss needs no change in the learner or in the metrics of a step."""

    def other(logprobs, batch):
        trained = batch.weights > 0
        surprise = jnp.where(trained, -logprobs, 0.0)
        return (batch.weights * surprise).sum(), {
            "surprise": surprise.sum(),
            "surprise_max": surprise.max(),
        }

    sequences = make_sequences()
    _, metrics = step(make_learner(loss=other), *packed(sequences))
    assert metrics["tokens"] == (sequences["weights"] > 0).sum()
    assert 0 < metrics["entropy"] < np.log(MODEL.vocab_size) + 1e-6
    assert metrics["surprise"] < metrics["surprise_max"] < 10
    learned = Learned(np.zeros((1, 1)), [metrics, metrics], kl=0.0, importance_weight=1.0)
    row = update_metrics(learned, seconds=2.0)
    assert row["surprise"] == metrics["surprise"] and row["trained_tokens"] == 2 * metrics["tokens"]
    assert "clip_fraction" not in row and "ratio_drift" not in row
