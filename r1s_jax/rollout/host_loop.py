"""The search loop driven from the host, one question, one token at a time.

What `r1s ask` streams, and the oracle of the loop inside the program (loop.py): the same
policy and sampler, but tags found in decoded text and control flow in Python.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from r1s_jax.config import ModelConfig, RolloutConfig
from r1s_jax.kernels.attention.api import default_impl
from r1s_jax.kernels.tuning import default_tuning
from r1s_jax.models.decoder import Policy
from r1s_jax.models.kv_cache import KVCache
from r1s_jax.models.params import Params
from r1s_jax.rollout.broker import Broker, Search
from r1s_jax.rollout.exchange import Status
from r1s_jax.rollout.lookup import lookup
from r1s_jax.rollout.sampler import sample
from r1s_jax.rollout.trajectory import Finish

_ENDS = {Status.ERROR: Finish.SEARCH_ERROR, Status.BAD_QUERY: Finish.BAD_QUERY}


@dataclass
class Event:
    """A piece of a trajectory as it comes to be."""

    kind: Literal["policy", "documents"]
    tokens: list[int]
    searches: Sequence[Search] = ()


@dataclass(kw_only=True)
class Turns(ABC):
    """Rolls out one trajectory, whoever samples it; its fields tell afterwards what happened."""

    config: RolloutConfig
    eos_ids: Sequence[int]
    broker: Broker
    decode: Any  # token ids -> text

    tokens: list[int] = field(default_factory=list)
    mask: list[bool] = field(default_factory=list)
    policy_logprobs: list[float] = field(default_factory=list)
    searches: int = 0
    replies: int = 0
    finish: Finish = Finish.NONE

    def run(self, prompt: Sequence[int], key: Any) -> Iterator[Event]:
        """Yields what the policy writes, token by token, and each document block."""
        self._force(list(prompt))
        turn: list[int] = []
        while self.finish == Finish.NONE:
            turn.append(self._sample(key))
            yield Event("policy", turn[-1:])
            self.finish, asks = self._end_of_turn(turn)
            if asks:
                yield self._search(turn)
                turn = []

    @abstractmethod
    def _sample(self, key: Any) -> int:
        """Draws the next token and appends it to `tokens`, `mask` and `policy_logprobs`."""

    def _end_of_turn(self, turn: list[int]) -> tuple[Finish, bool]:
        """How the trajectory ends with this token, and whether the system is to reply to it."""
        c, d, text = self.config, self.broker.dialect, self.decode(turn)
        eos, asked = turn[-1] in self.eos_ids, d.query_end in text
        answered = c.stop_at_answer and bool(d.answer_end) and d.answer_end in text
        full = len(turn) >= c.max_turn_length or len(self.tokens) >= c.max_length
        left = self.replies < c.max_searches
        if asked and eos == d.acts_at_turn_end:
            return (Finish.NONE, True) if left else (Finish.SEARCH_LIMIT, False)
        if d.answers_idle_turns and d.tells_invalid and left and (eos or full) and not answered:
            room = len(self.tokens) < c.max_length
            return (
                (Finish.NONE, True) if room else (Finish.FINISHED if eos else Finish.LENGTH, False)
            )
        if eos or answered:
            return Finish.FINISHED, False
        return (Finish.LENGTH if full else Finish.NONE), False

    def _search(self, turn: list[int]) -> Event:
        """Appends the reply, or ends the trajectory that cannot have it."""
        c = self.config
        width = c.max_turn_length if self.broker.dialect.reads_whole_turn else c.max_query_length
        full = len(turn) >= width
        status, count, reply, searches = self.broker.answer_now(turn[-width:], full)
        if status in _ENDS:
            self.finish, reply = _ENDS[status], []
        elif len(self.tokens) + len(reply) >= c.max_length:
            self.finish, reply = Finish.LENGTH, []
        else:
            self._force(reply)
            self.searches += count
            self.replies += 1
        return Event("documents", reply, searches)

    def _force(self, tokens: list[int]) -> None:
        self.tokens += tokens
        self.mask += [False] * len(tokens)
        self.policy_logprobs += [0.0] * len(tokens)


@dataclass(kw_only=True)
class HostLoop(Turns):
    """A trajectory sampled from a policy here, with a KV cache of its own.

    With `config.drafts` a pass verifies guesses (see lookup.py); its tokens are the same.
    """

    model: ModelConfig
    params: Params
    compute_dtype: Any

    def run(self, prompt: Sequence[int], key: Any) -> Iterator[Event]:
        self._cached, self._drawn = 0, []
        capacity = self.config.max_length + max(self.config.prefill_chunk, self.config.drafts + 1)
        heads = self.model.num_kv_heads
        dtype = default_tuning().cache_dtype or self.compute_dtype
        self._cache = KVCache.empty(self.model, 1, capacity, heads, dtype, default_impl())
        return super().run(prompt, key)

    def _sample(self, key: Any) -> int:
        """Feeds what is not in the cache yet first."""
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
        self._cached += 1  # the token before, or a guess that was right
        return token

    def _search(self, turn: list[int]) -> Event:
        self._drawn = []  # what was drawn behind the turn follows something else now
        return super()._search(turn)

    def _draw(self, key: Any) -> list[tuple[int, float]]:
        """The next token, and those after it whose guesses prove right, with log-probabilities."""
        c, known = self.config, len(self.tokens)
        fed = np.array(self.tokens[-1:], np.int32)
        if c.drafts:
            text = np.zeros((1, c.max_length + c.max_documents_length), np.int32)
            text[0, :known] = self.tokens
            guesses = _lookup(text, jnp.array([known]), c.drafts)[0]
            fed = np.concatenate([fed, np.asarray(guesses)])
        start = jnp.array([self._cached])
        logits, self._cache = _decode(self._static, self.params, fed, start, self._cache)
        places = known + jnp.arange(len(fed))
        uniform = jax.vmap(lambda at: jax.random.uniform(jax.random.fold_in(key, at)))(places)
        tokens, _, logprobs = map(np.asarray, _sample(logits, uniform, c.temperature, c.top_p))
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
