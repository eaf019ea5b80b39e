"""What keeping keys and values in int8 changes, on a text with documents."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from r1s_jax.config import ModelConfig
from r1s_jax.models.decoder import Policy
from r1s_jax.models.kv_cache import KVCache
from r1s_jax.models.params import Params
from r1s_jax.models.pretrained import load_pretrained
from r1s_jax.models.tokenizer import encode_start
from r1s_jax.perf.bench_drafts import DOCUMENTS


def bench_int8(reference: str, *, new_tokens: int) -> dict[str, Any]:
    """Logits with a cache of int8 beside those with one of the parameters' dtype.

    Both are fed the same tokens: a prompt of documents, and what the exact policy says greedily.
    `largest_logit_difference` is over all logits of the answer's tokens, `logit_range` between the
    largest and the smallest of them; `greedy_changed` the share of tokens that int8 would have
    chosen otherwise.
    """
    policy = load_pretrained(reference)
    prompt = np.array([encode_start(policy.tokenizer, DOCUMENTS)], np.int32)
    params = jax.device_put(policy.params)
    run = jax.jit(_both, static_argnums=(0, 3))
    exact, rounded = jax.device_get(run(policy.model, params, prompt, new_tokens))
    return {
        "tokens": prompt.shape[1] + new_tokens,
        "largest_logit_difference": float(np.abs(exact - rounded).max()),
        "mean_logit_difference": float(np.abs(exact - rounded).mean()),
        "logit_range": float(np.ptp(exact)),
        "greedy_changed": float((exact.argmax(-1) != rounded.argmax(-1)).mean()),
        "bytes_a_token_share": _bytes(policy.model, True) / _bytes(policy.model, False),
    }


def _bytes(model: ModelConfig, quantized: bool) -> int:
    cache = jax.eval_shape(
        partial(KVCache.empty, model, 1, 1, model.num_kv_heads, jnp.bfloat16, quantized=quantized)
    )
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache))


def _both(
    model: ModelConfig, params: Params, prompt: Int[Array, "1 T"], new_tokens: int
) -> tuple[Float[Array, "N V"], Float[Array, "N V"]]:
    policy, length = Policy(model, params), prompt.shape[1]
    zero = jnp.zeros(1, jnp.int32)
    caches = [
        KVCache.empty(
            model, 1, length + new_tokens, model.num_kv_heads, jnp.float32, quantized=quantized
        )
        for quantized in (False, True)
    ]
    hidden, caches = zip(*(policy.prefill(prompt, zero, zero, c) for c in caches), strict=True)

    def step(carry: tuple, i: Array) -> tuple:
        token, caches = carry
        hidden, caches = zip(
            *(policy.decode(token, zero + length + i, c) for c in caches), strict=True
        )
        exact, rounded = (policy.logits(h[:, 0]) for h in hidden)
        return (jnp.argmax(exact, -1)[:, None].astype(jnp.int32), caches), (exact[0], rounded[0])

    first = jnp.argmax(policy.logits(hidden[0][:, -1]), -1)[:, None].astype(jnp.int32)
    return jax.lax.scan(step, (first, caches), jnp.arange(new_tokens))[1]
