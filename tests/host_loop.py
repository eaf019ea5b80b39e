"""Samples a trajectory on the host, token by token: the oracle of the compiled rollout loop."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np

from r1s_jax.config import ModelConfig
from r1s_jax.kernels.attention.api import default_impl
from r1s_jax.kernels.tuning import default_tuning
from r1s_jax.models.decoder import Policy
from r1s_jax.models.kv_cache import KVCache
from r1s_jax.models.params import Params
from r1s_jax.rollout.engine import Engine
from r1s_jax.rollout.lookup import lookup
from r1s_jax.rollout.sampler import sample
from r1s_jax.serving.turns import Event, Turns


@dataclass(kw_only=True)
class HostLoop(Turns):
    """Samples one trajectory from a policy on the host, with its own KV cache.

    With `config.speculative_tokens` a pass verifies several tokens (see lookup.py); the sampled
    tokens are the same.
    """

    model: ModelConfig
    params: Params
    compute_dtype: Any

    @classmethod
    def of(cls, engine: Engine, params: Params) -> Self:
        """The loop of an engine in float32, with its broker, which must have begun."""
        return cls(
            model=engine.model,
            params=params,
            config=engine.config,
            compute_dtype=np.dtype("float32"),
            eos_ids=engine.eos_ids,
            broker=engine.broker,
            decode=engine.decode,
        )

    def run(self, prompt: Sequence[int], key: Any) -> Iterator[Event]:
        self._cached, self._drawn = 0, []
        capacity = self.config.max_length + max(
            self.config.prefill_chunk, self.config.speculative_tokens + 1
        )
        heads = self.model.num_kv_heads
        dtype = default_tuning().cache_dtype or self.compute_dtype
        self._cache = KVCache.empty(self.model, 1, capacity, heads, dtype, default_impl())
        return super().run(prompt, key)

    def _sample(self, key: Any) -> int:
        """Samples a token after feeding all tokens that are not in the cache yet."""
        chunk = self.config.prefill_chunk
        while len(self.tokens) - self._cached > 1:
            new = self.tokens[self._cached : -1][:chunk]
            padded = np.zeros((1, chunk), np.int32)
            padded[0, : len(new)] = new
            start = jnp.array([self._cached])
            self._cache = _prefill(self._static, self.params, padded, start, self._cache)
            self._cached += len(new)
        if not self._drawn:
            self._drawn = self._draw(key)
        token, logprob = self._drawn.pop(0)
        self.tokens.append(token)
        self.mask.append(True)
        self.policy_logprobs.append(logprob)
        self._cached += 1  # the previous token, or an accepted guess
        return token

    def _search(self, turn: list[int]) -> Event:
        self._drawn = []  # tokens drawn beyond the turn had another context
        return super()._search(turn)

    def _draw(self, key: Any) -> list[tuple[int, float]]:
        """The next token and the accepted guesses after it, with log-probabilities."""
        c, length = self.config, len(self.tokens)
        fed = np.array(self.tokens[-1:], np.int32)
        if c.speculative_tokens:
            text = np.zeros((1, c.max_length + c.max_documents_length), np.int32)
            text[0, :length] = self.tokens
            guesses = _lookup(text, jnp.array([length]), c.speculative_tokens)[0]
            fed = np.concatenate([fed, np.asarray(guesses)])
        start = jnp.array([self._cached])
        logits, self._cache = _decode(self._static, self.params, fed, start, self._cache)
        places = length + jnp.arange(len(fed))
        uniform = jax.vmap(lambda at: jax.random.uniform(jax.random.fold_in(key, at)))(places)
        drawn = _sample(logits, uniform, c.temperature, c.top_p)
        tokens, logprobs = np.asarray(drawn.token), np.asarray(drawn.policy_logprob)
        right = next((n for n, guess in enumerate(fed[1:]) if guess != tokens[n]), len(fed) - 1)
        return [(int(tokens[n]), float(logprobs[n])) for n in range(right + 1)]

    @property
    def _static(self) -> tuple[ModelConfig, Any]:
        return self.model, np.dtype(self.compute_dtype)


@partial(jax.jit, static_argnums=0, donate_argnums=4)
def _prefill(static, params: Params, tokens, starts, cache: KVCache) -> KVCache:
    one = jnp.zeros(1, jnp.int32)
    return _policy(static, params).prefill(tokens, one, starts, cache)[1]


@partial(jax.jit, static_argnums=0, donate_argnums=4)
def _decode(static, params: Params, tokens, starts, cache: KVCache):
    policy = _policy(static, params)
    hidden, cache = policy.decode(tokens[None], starts, cache)
    return policy.logits(hidden[0]), cache


def _policy(static, params: Params) -> Policy:
    model, compute_dtype = static
    return Policy(
        model,
        params,
        compute_dtype=compute_dtype,
        impl=default_impl(),
        tuning=default_tuning(),
    )


_lookup = jax.jit(lookup, static_argnums=2)


@partial(jax.jit, static_argnums=(2, 3))
def _sample(logits, uniform, temperature: float, top_p: float):
    return sample(logits, uniform, temperature=temperature, top_p=top_p)
