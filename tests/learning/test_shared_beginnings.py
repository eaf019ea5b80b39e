"""A beginning computed once a row against one trajectory a row: the same losses and gradients."""

import subprocess
import sys
from dataclasses import replace
from functools import partial
from typing import get_args

import jax
import numpy as np
import pytest

from r1s_jax.config import AlgorithmConfig, Loss
from r1s_jax.learning.losses import likelihood_loss, policy_loss
from r1s_jax.learning.packing import PackedBatch, pack, unpack
from tests.makers import LEARNED, make_learner, make_params, step, with_devices

WIDTH = 40
LOSSES = {
    name: policy_loss(
        AlgorithmConfig(loss=name, llds_coefficient=0.3, sequence_mask=5.0, echo_coefficient=1.0)
    )
    for name in get_args(Loss)
} | {"likelihood": likelihood_loss}
ADAPTED = replace(LEARNED, lora_rank=2, lora_alpha=4)


def make_group_batch(seed: int = 0) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Lengths and arrays of 12 trajectories: instructions, three questions, four samples of each.

    Two samples of a question have the same first documents before their first trained token.
    """
    rng = np.random.default_rng(seed)

    def some(n: int) -> list[int]:
        return rng.integers(0, LEARNED.vocab_size, n).tolist()

    instructions, texts, starts = some(5), [], []
    for _ in range(3):
        question, documents = some(rng.integers(2, 6)), some(4)
        for sample in range(4):
            texts.append(instructions + question + (documents if sample < 2 else []))
            starts.append(len(texts[-1]))
            texts[-1] = texts[-1] + some(rng.integers(3, 20))
    lengths = np.array([len(text) for text in texts])
    tokens = np.zeros((12, WIDTH), np.int32)
    for row, text in zip(tokens, texts, strict=True):
        row[: len(text)] = text
    at, shape = np.arange(WIDTH), tokens.shape
    mask = (at > np.array(starts)[:, None]) & (rng.random(shape) < 0.7)
    mask |= at == np.array(starts)[:, None]
    mask &= at < lengths[:, None]
    weights = mask * rng.uniform(0.02, 0.1, shape)
    arrays = dict(tokens=tokens, weights=weights, advantages=rng.normal(size=(12, 1)) + 0 * weights)
    arrays |= dict(old_logprobs=rng.normal(-3.4, 0.4, shape))
    arrays |= dict(reference_logprobs=rng.normal(-3.4, 0.4, shape), kl_weights=0.3 * weights)
    arrays |= dict(fresh=rng.random(shape) < 0.5)
    documents = (at > np.array(starts)[:, None]) & (at < lengths[:, None]) & ~mask
    arrays |= dict(ce_weights=0.01 * documents)
    floats = {n: a if n == "tokens" else a.astype(np.float32) for n, a in arrays.items()}
    return lengths, floats


def make_tree_batch() -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The same with forks: each continues its parent's tokens, trained ones too, with its own.

    Some forks share more with their parent than others; two are forks of forks.
    """
    rng, (lengths, arrays) = np.random.default_rng(5), make_group_batch()
    parents, rows = [], []
    for row in range(len(lengths)):
        parents.append(-1)
        rows.append({name: a[row] for name, a in arrays.items()} | {"length": int(lengths[row])})
        trunk = len(rows) - 1
        for fork in range(row % 4):
            parent = trunk if fork < 2 else len(rows) - 1
            own = {name: a.copy() for name, a in rows[parent].items() if name != "length"}
            first = int((rows[parent]["weights"] > 0).argmax())
            shared = int(rng.integers(first + 1, rows[parent]["length"] + 1))
            length = min(WIDTH, shared + int(rng.integers(1, 8)))
            own["tokens"][shared:] = rng.integers(0, LEARNED.vocab_size, WIDTH - shared)
            for name in ("weights", "kl_weights"):
                own[name][:] = 0
                own[name][min(shared + fork, length - 1) : length] = 0.05
            own["ce_weights"] = own["ce_weights"] * 0
            rows.append(own | {"length": length})
            parents.append(parent)
    sizes = np.array([row.pop("length") for row in rows])
    stacked = {name: np.stack([row[name] for row in rows]) for name in arrays}
    return sizes, stacked | {"parents": np.array(parents)}


def one_a_row(lengths: np.ndarray, arrays: dict[str, np.ndarray]) -> tuple[PackedBatch, int]:
    """A batch without the packer."""
    inside = np.arange(WIDTH) < lengths[:, None]
    return PackedBatch(
        segment_ids=inside.astype(np.int32)[None],
        positions=np.where(inside, np.arange(WIDTH), 0).astype(np.int32)[None],
        last_query=np.where(inside, lengths[:, None] - 1, -1).astype(np.int32)[None],
        kept=np.zeros((1, *inside.shape, 0), np.int32),
        log_kept=np.zeros((1, *inside.shape), np.float32),
        **{n: np.where(inside, a, 0)[None] for n, a in arrays.items() if n != "parents"},
    ), 1


def compare(learner, capacity: int, rows: int, make=make_group_batch) -> int:
    """Compares one SGD step; returns how many tokens were computed."""
    lengths, arrays = make()
    batch, _, micro = pack(**arrays, lengths=lengths, capacity=capacity, micro_batch_rows=rows)
    before = jax.device_get(make_params(learner.model))
    expected, metrics = step(learner, *one_a_row(lengths, arrays))
    got, own_metrics = step(learner, batch, micro)
    moved = [jax.tree.map(np.subtract, before, after) for after in (expected, got)]
    scale = max(np.abs(x).max() for x in jax.tree.leaves(moved[0]))
    assert scale > 1e-3
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5 * scale), *moved)
    for name in metrics.keys() - {"likely", "full"}:  # those count a micro-batch's largest weights
        np.testing.assert_allclose(
            own_metrics[name], metrics[name], rtol=1e-5, atol=1e-6, err_msg=name
        )
    return int((batch.segment_ids > 0).sum())


# One loss by token, one by sequence, one supervised.
QUICK = ("clip", "gspo", "likelihood")


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in LOSSES],
)
def test_gradients_losses_and_metrics_are_those_of_separate_rows(name):
    """In micro-batches of which each repeats some beginnings."""
    assert compare(make_learner(loss=LOSSES[name]), 48, 2) < make_group_batch()[0].sum()


@pytest.mark.slow
@pytest.mark.parametrize("name", LOSSES)
def test_in_one_row_and_in_short_ones(name):
    learner = make_learner(loss=LOSSES[name])
    everything, few = (compare(learner, *size) for size in ((192, 1), (40, 1)))
    assert everything < few < make_group_batch()[0].sum()


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("clip", (48, 2)),
        ("gspo", (400, 1)),
        *(pytest.param(n, (40, 1), marks=pytest.mark.slow) for n in ("clip", "dppo")),
    ],
)
def test_what_a_fork_shares_is_computed_once_and_changes_nothing(name, size):
    learner, (lengths, arrays) = make_learner(loss=LOSSES[name]), make_tree_batch()
    computed = compare(learner, *size, make_tree_batch)
    del arrays["parents"]
    batch, _, _ = pack(**arrays, lengths=lengths, capacity=size[0], micro_batch_rows=size[1])
    assert computed < (batch.segment_ids > 0).sum() < lengths.sum()
    if size[0] == 400:  # all in one row: a fork adds its own tokens, and the one before a trained
        assert computed < 0.6 * lengths.sum()


@pytest.mark.slow
def test_the_logprobs_of_trained_tokens_are_those_of_separate_rows():
    lengths, arrays = make_group_batch()
    learner, params = make_learner(), make_params()
    batch, layout, micro = pack(**arrays, lengths=lengths, capacity=48, micro_batch_rows=2)
    alone = learner.logprobs(params, *one_a_row(lengths, arrays))[0]
    mine = unpack(learner.logprobs(params, batch, micro), layout, lengths, WIDTH)
    trained = arrays["weights"] > 0
    np.testing.assert_allclose(mine[trained], alone[trained], atol=1e-5)


@pytest.mark.slow
def test_with_adapters():
    compare(make_learner(model=ADAPTED, loss=LOSSES["clip"]), 48, 2)


@pytest.mark.parametrize("attention", ["interpret", pytest.param("xla", marks=pytest.mark.slow)])
def test_by_kernels(attention):
    model = replace(LEARNED, head_dim=16)
    compare(make_learner(model=model, attention=attention, loss=LOSSES["clip"]), 192, 1)


ON_DEVICES = """
import jax
from r1s_jax.config import MeshConfig
from r1s_jax.models.sharding import make_mesh
from tests.learning.test_shared_beginnings import LOSSES, compare, make_learner
assert jax.device_count() == 4
for shape in (MeshConfig(data=4), MeshConfig(data=2, fsdp=2)):
    compare(make_learner(mesh=make_mesh(shape), loss=LOSSES["clip"]), 48, 4)
"""


@pytest.mark.slow
def test_on_four_devices():
    run = [sys.executable, "-c", ON_DEVICES]
    done = subprocess.run(run, env=with_devices(4), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
