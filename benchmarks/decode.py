"""Greedy decoding, beside `transformers` where PyTorch is installed."""

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from benchmarks.common import peak_memory_gb, random_tokens, seconds_of, synchronized, torch_model
from r1s_jax.kernels.tuning import default_tuning
from r1s_jax.models.decoder import Policy
from r1s_jax.models.kv_cache import KVCache
from r1s_jax.models.params import unstack_layers
from r1s_jax.models.pretrained import Pretrained, load_pretrained
from r1s_jax.rollout.sampler import sample


def bench_decode(
    reference: str, *, batch: int, prompt_len: int, new_tokens: int, repeats: int = 3
) -> dict[str, Any]:
    """Greedy decoding of random prompts in float32; tokens per second over all rows.

    Where PyTorch is installed, `transformers` generates from the same weights in alternating turns,
    and `ratio` compares the best of `repeats` of each.
    """
    p = load_pretrained(reference)
    tokens = random_tokens(p.model, (batch, prompt_len))
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
            times["other"].append(seconds_of(peer))
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
    """Two functions: prefill of prompts to (token, cache), and greedy decoding from both."""
    tuning = default_tuning()

    @jax.jit
    def prefill(params: Any, tokens: jax.Array) -> tuple[jax.Array, KVCache]:
        policy, batch = Policy(p.model, params, tuning=tuning), tokens.shape[0]
        capacity = prompt_len + new_tokens
        cache = KVCache.empty(p.model, batch, capacity, p.model.num_kv_heads, jnp.float32)
        starts = jnp.zeros(batch, jnp.int32)
        hidden, cache = policy.prefill(tokens, jnp.arange(batch), starts, cache)
        return _greedy(policy.logits(hidden[:, -1])), cache

    @jax.jit
    def decode(params: Any, token: jax.Array, cache: KVCache) -> jax.Array:
        policy, batch = Policy(p.model, params, tuning=tuning), token.shape[0]

        def step(i: jax.Array, carry: tuple) -> tuple:
            token, cache, out = carry
            starts = jnp.full(batch, prompt_len - 1, jnp.int32) + i
            hidden, cache = policy.decode(token[:, None], starts, cache)
            token = _greedy(policy.logits(hidden[:, 0]))
            return token, cache, out.at[:, i].set(token)

        out = jnp.zeros((batch, new_tokens), jnp.int32).at[:, 0].set(token)
        return lax.fori_loop(1, new_tokens, step, (token, cache, out))[2]

    params = jax.device_put(p.params)
    if tuning.unstack:
        params = unstack_layers(params)
    return (
        lambda tokens: prefill(params, tokens),
        lambda token, cache: jax.block_until_ready(decode(params, token, cache)),
    )


def _greedy(logits: jax.Array) -> jax.Array:
    return sample(logits, jnp.zeros(logits.shape[0]), temperature=0.0, top_p=1.0)[0]


def _transformers_generate(
    p: Pretrained, tokens: np.ndarray, new_tokens: int
) -> Callable[[], Any] | None:
    model = torch_model(p)
    if model is None:
        return None
    import torch

    ids = torch.tensor(tokens, dtype=torch.long, device=model.device)
    return synchronized(
        lambda: model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=0,
        )
    )
