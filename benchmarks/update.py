"""One policy update, beside the same update in PyTorch where it is installed."""

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.common import peak_memory_gb, random_tokens, seconds_of, synchronized, torch_model
from r1s_jax.aot.costs import traced_flops
from r1s_jax.config import MeshConfig, ModelConfig, OptimizerConfig
from r1s_jax.kernels.matmul import matmul
from r1s_jax.learning.learner import Learner, LearnerState, make_optimizer
from r1s_jax.learning.losses import clipped_loss
from r1s_jax.learning.packing import PackedBatch, pack
from r1s_jax.models.pretrained import Pretrained, load_pretrained
from r1s_jax.models.sharding import make_mesh, shard_params
from r1s_jax.system.dtype import AUTO, default_dtype

# Of a trajectory of `make wiki`: 127 of 277 tokens.
_PROMPT_SHARE = 0.46


def bench_update(
    reference: str,
    *,
    batch: int = 4,
    length: int = 256,
    group: int = 1,
    dtype: str = AUTO,
    repeats: int = 3,
) -> dict[str, Any]:
    """One policy update over `batch` trajectories of `length` tokens in one pass, Adam.

    If `group` is above 1, so many trajectories are samples of one question: they begin with the
    same prompt, and are trained on the rest. Ours computes a group in one row.

    `peak_gflops` is the rate that a matrix product of the model's shape reaches here in `dtype`;
    `peak_share` is the rate of the update's products as a share of it. Where PyTorch is installed,
    it runs the same update (forward of all trajectories, clipped loss, backward, Adam).
    """
    dtype = default_dtype().name if dtype == AUTO else dtype
    p = load_pretrained(reference)
    mesh = make_mesh(MeshConfig())
    learner = Learner(
        p.model,
        mesh,
        np.dtype(dtype),
        "none",
        make_optimizer(OptimizerConfig()),
        partial(clipped_loss, 0.2),
    )
    prompt = max(1, int(_PROMPT_SHARE * length)) if group > 1 else 1
    tokens = _tokens(p.model, batch, length, prompt, group)
    packed = _packed(tokens, prompt, group)
    peer = _torch_update(p, tokens, prompt, dtype)
    state = learner.init(shard_params(p.params, p.model, mesh))
    flops = _flops(learner, state, packed)
    state, _ = learner.update(state, packed, 1)
    ours, other, peaks = [], [], []
    for _ in range(repeats):
        peaks.append(_product_gflops(p.model, batch * length, dtype))
        begin = time.perf_counter()
        state, _ = learner.update(state, packed, 1)
        ours.append(time.perf_counter() - begin)
        if peer:
            other.append(seconds_of(peer))
    result = {
        "tokens_per_s": batch * length / min(ours),
        "computed_tokens": int((packed.segment_ids > 0).sum()),
        "seconds": min(ours),
        "dtype": dtype,
        "gflops": flops / min(ours) / 1e9,
        "peak_gflops": max(peaks),
        "peak_share": flops / min(ours) / 1e9 / max(peaks),
        "peak_memory_gb": peak_memory_gb(),
    }
    if peer:
        result |= {
            "torch_tokens_per_s": batch * length / min(other),
            "ratio": min(other) / min(ours),
        }
    return result


def _tokens(model: ModelConfig, batch: int, length: int, prompt: int, group: int) -> np.ndarray:
    """int32[batch, length]: random, each `group` rows with the same `prompt` tokens first."""
    tokens = random_tokens(model, (batch, length))
    tokens[:, :prompt] = np.repeat(tokens[::group, :prompt], group, axis=0)[:batch]
    return tokens


def _packed(tokens: np.ndarray, prompt: int, group: int) -> PackedBatch[np.ndarray]:
    """One micro-batch, a row for each group, that trains every token after the prompt."""
    batch, length = tokens.shape
    trained = np.broadcast_to(np.arange(length) >= prompt, tokens.shape).astype(np.float32)
    packed, _, micro = pack(
        tokens,
        np.full(batch, length),
        weights=trained / trained.sum(),
        advantages=trained,
        old_logprobs=-10 * trained,
        fresh=trained,
        # All but a prompt's last token stand once.
        capacity=prompt - 1 + group * (length - prompt + 1),
        micro_batch_rows=-(-batch // group),
    )
    assert micro == 1
    return PackedBatch(*(a[:1] for a in packed))


def _flops(learner: Learner, state: LearnerState, batch: PackedBatch) -> float:
    """Floating-point operations of the matrix products of one update."""
    traced = jax.jit(learner.update_step).trace(state, batch, jnp.int32(1), jnp.float32(1))
    return traced_flops(traced.jaxpr.jaxpr, {})


def _product_gflops(model: ModelConfig, tokens: int, dtype: str, repeats: int = 5) -> float:
    """GFLOP/s of the feed-forward block's matrix product alone."""
    x = jax.random.normal(jax.random.key(0), (tokens, model.d_model), dtype)
    w = jax.random.normal(jax.random.key(1), (model.d_model, model.d_ff), dtype)
    product = jax.jit(matmul)
    # An accelerator finishes one product before the host dispatches the next: time many at once.
    calls = 1 if jax.default_backend() == "cpu" else 50
    jax.block_until_ready(product(x, w))
    best = min(
        seconds_of(lambda: jax.block_until_ready([product(x, w) for _ in range(calls)]))
        for _ in range(repeats)
    )
    return 2 * calls * tokens * model.d_model * model.d_ff / best / 1e9


def _torch_update(
    p: Pretrained, tokens: np.ndarray, prompt: int, dtype: str
) -> Callable[[], Any] | None:
    model = torch_model(p)
    if model is None:
        return None
    import torch

    ids = torch.tensor(tokens, dtype=torch.long, device=model.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-6)

    def update() -> None:
        optimizer.zero_grad()
        with torch.autocast(model.device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
            logits = model(ids, logits_to_keep=ids.shape[1] - prompt + 1).logits[:, :-1]
        targets = ids[:, prompt:, None]
        logprobs = torch.log_softmax(logits.float(), -1).gather(2, targets)[..., 0]
        ratio = torch.exp(logprobs + 10)
        loss = -torch.minimum(ratio, ratio.clamp(0.8, 1.2)).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return synchronized(update)
