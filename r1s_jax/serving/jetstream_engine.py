"""The policy as an engine of JetStream (the extra `jetstream`, google-jetstream 0.2.2).

JetStream's orchestrator and gRPC server run on it unchanged. JetStream has neither search nor
sampling: decoding is greedy, and a request ends when the policy ends a query, its answer or the
sequence. The project was archived in February 2026; the workarounds for its age are at the top of
this file.
"""

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int

from r1s_jax.config import Impl
from r1s_jax.io.errors import ConfigError
from r1s_jax.models.decoder import Policy
from r1s_jax.models.kv_cache import KVCache
from r1s_jax.models.params import Params
from r1s_jax.models.sharding import attention_impl, mesh_tuning
from r1s_jax.rollout.engine import Engine
from r1s_jax.rollout.loop import ANSWER_END, QUERY_END

if not hasattr(jax, "tree_map"):  # JAX moved it after JetStream's last release
    jax.tree_map = jax.tree.map  # pyright: ignore[reportAttributeAccessIssue]  # made here
_root = logging.getLogger()
_level, _handlers = _root.level, list(_root.handlers)
from jetstream.core import orchestrator  # noqa: E402
from jetstream.engine import engine_api, token_utils, tokenizer_api, tokenizer_pb2  # noqa: E402

# Importing JetStream sends every library's debug messages to standard output; this undoes it.
_root.setLevel(_level)
for _handler in [h for h in _root.handlers if h not in _handlers]:
    _root.removeHandler(_handler)
logging.getLogger("jetstream").setLevel(logging.WARNING)

Driver = orchestrator.Driver
ActiveRequest = orchestrator.ActiveRequest
# Lengths to which JetStream pads prompts; a program is compiled for each.
_BUCKETS = [2**i for i in range(4, 16)]


class Prefix(NamedTuple):
    """A prompt's keys and values, and where its decoding begins."""

    cache: KVCache  # of one slot
    last: Int[Array, ""]  # the last token
    length: Int[Array, ""]


class DecodeState(NamedTuple):
    """The state of S slots, which a decode step updates."""

    cache: KVCache
    last: Int[Array, " S"]
    length: Int[Array, " S"]  # tokens so far, `last` included
    written: Int[Array, " S"]  # how many of them the policy wrote
    tag_state: Int[Array, " S"]
    over: Bool[Array, " S"]  # whether the request has ended; further tokens are invalid


class SearchEngine(engine_api.Engine):
    """Prefill, insert and generate with the decoder and cache of a rollout's Engine."""

    def __init__(self, engine: Engine, params: Params):
        """`params` are those of Rollout.prepare. Raises ConfigError for more than one device."""
        if engine.mesh.size != 1:
            raise ConfigError(
                f"JetStream serves from one device, not {engine.mesh.size}: hide the others"
            )
        self._engine, self._params = engine, params
        roll = engine.roll
        if roll.config.max_length > max(_BUCKETS):
            raise ConfigError(
                f"rollout.max_length={roll.config.max_length} is too long for JetStream: at most "
                f"{max(_BUCKETS)}"
            )
        self._longest = next(size for size in _BUCKETS if size >= roll.config.max_length)
        self._slots, self._tuning = roll.config.slots, mesh_tuning(roll.mesh)
        self._impl: Impl = attention_impl(roll.attention, roll.mesh)
        self._compute_dtype, self._roll = roll.compute_dtype, roll
        self._prefill = jax.jit(self._run_prefill)
        self._insert = jax.jit(self._run_insert, donate_argnums=1)
        self._generate = jax.jit(self._run_generate, donate_argnums=1)

    def load_params(self, *args: Any, **kwargs: Any) -> Params:
        return self._params

    def prefill(
        self,
        *,
        params: Params,
        existing_prefix: Prefix | None = None,
        padded_tokens: Int[Array, " T"],
        true_length: int,
    ) -> Prefix:
        """Keys and values of all tokens; the first decode step feeds the last token again."""
        if existing_prefix is not None:
            raise NotImplementedError("prefixes are not continued")
        return self._prefill(params, jnp.asarray(padded_tokens), true_length)

    def insert(self, prefix: Prefix, decode_state: DecodeState, slot: int) -> DecodeState:
        """Puts a prompt into a slot."""
        return self._insert(prefix, decode_state, slot)

    def generate(
        self, params: Params, decode_state: DecodeState
    ) -> tuple[DecodeState, engine_api.ResultTokens]:
        """One token for every slot, valid unless the slot's request has ended."""
        state, data = self._generate(params, decode_state, self._engine.tag_table)
        bounds = {"tokens_idx": (0, 1), "valid_idx": (1, 2), "length_idx": (2, 3)}
        return state, engine_api.ResultTokens(data=data, samples_per_slot=1, **bounds)

    def init_decode_state(self, *args: Any, **kwargs: Any) -> DecodeState:
        def zeros() -> Array:  # a new array for each field, since each is donated
            return jnp.zeros(self._slots, jnp.int32)

        return DecodeState(
            cache=self._cache(self._slots, self._longest + 1),
            last=zeros(),
            length=zeros() + 1,
            written=zeros(),
            tag_state=zeros(),
            over=jnp.ones(self._slots, bool),
        )

    def get_tokenizer(self) -> tokenizer_pb2.TokenizerParameters:
        return tokenizer_pb2.TokenizerParameters(path="", extra_ids=0)

    def build_tokenizer(self, metadata: Any) -> "Text":
        return Text(self._engine.decode, self._engine.start_tokens, self._longest)

    def get_prefix_destination_sharding(self) -> Any:
        return jax.sharding.NamedSharding(self.mesh, jax.sharding.PartitionSpec())

    @property
    def max_concurrent_decodes(self) -> int:
        return self._slots

    @property
    def samples_per_slot(self) -> int:
        return 1

    @property
    def max_prefill_length(self) -> int:
        return self._longest

    @property
    def mesh(self) -> jax.sharding.Mesh:
        return self._engine.mesh

    @property
    def colocated_cpus(self) -> None:
        return None

    # Compiled.

    def _cache(self, slots: int, capacity: int) -> KVCache:
        model = self._engine.model
        dtype = self._tuning.cache_dtype or self._compute_dtype
        return KVCache.empty(model, slots, capacity, model.num_kv_heads, dtype, self._impl)

    def _policy(self, params: Params) -> Policy:
        return Policy(
            self._engine.model,
            params,
            compute_dtype=self._compute_dtype,
            impl=self._impl,
            tuning=self._tuning,
        )

    def _run_prefill(self, params: Params, tokens: Array, length: Array) -> Prefix:
        zero = jnp.zeros(1, jnp.int32)
        tokens, cache = tokens.astype(jnp.int32), self._cache(1, tokens.shape[0])
        _, cache = self._policy(params).prefill(tokens[None], zero, zero, cache)
        return Prefix(cache, tokens[length - 1], jnp.int32(length))

    def _run_insert(self, prefix: Prefix, state: DecodeState, slot: Array) -> DecodeState:
        def put(into: Array, new: Array) -> Array:
            return lax.dynamic_update_slice(into, new, (0, slot, *[0] * (into.ndim - 2)))

        return DecodeState(
            cache=jax.tree.map(put, state.cache, prefix.cache),
            last=state.last.at[slot].set(prefix.last),
            length=state.length.at[slot].set(prefix.length),
            written=state.written.at[slot].set(0),
            tag_state=state.tag_state.at[slot].set(0),
            over=state.over.at[slot].set(False),
        )

    def _run_generate(
        self, params: Params, state: DecodeState, tag_table: Array
    ) -> tuple[DecodeState, Int[Array, "S 3"]]:
        policy = self._policy(params)
        fed = jnp.minimum(state.length - 1, self._longest)
        hidden, cache = policy.decode(state.last[:, None], fed, state.cache)
        token = jnp.argmax(policy.logits(hidden[:, 0]), axis=-1).astype(jnp.int32)
        going, states = ~state.over, self._roll.num_tag_states
        tag_state = tag_table[state.tag_state, token].astype(jnp.int32)
        ended = self._ends(tag_state - states, token) | (state.length + 1 >= self._longest)
        written = state.written + 1
        data = jnp.stack([token, going.astype(jnp.int32), written], axis=1)
        return DecodeState(
            cache=cache,
            last=token,
            length=state.length + going,
            written=written,
            tag_state=jnp.where(tag_state >= states, 0, tag_state),
            over=state.over | ended,
        ), data

    def _ends(self, tag: Array, token: Array) -> Array:
        """bool[S]: whether the token ends the request, by ending a tag or the sequence."""
        dialect = self._engine.dialect
        eos = jnp.isin(token, jnp.array(self._engine.eos_ids, jnp.int32))
        query = (tag == QUERY_END) & (not dialect.acts_at_turn_end)
        return eos | query | (tag == ANSWER_END)


class Text(tokenizer_api.Tokenizer):
    """A tokenizer for JetStream without stop tokens, since the engine alone ends requests."""

    def __init__(
        self,
        decode: Callable[[Sequence[int]], str],
        encode: Callable[[str], list[int]],
        longest: int,
    ):
        self._decode, self._encode, self._longest = decode, encode, longest

    def encode(self, s: str, **kwargs: Any) -> tuple[Any, int]:
        pad = partial(token_utils.pad_tokens, bos_id=0, pad_id=0, is_bos=False)
        jax_padding = kwargs.get("jax_padding", True)
        return pad(
            jnp.array(self._encode(s)), max_prefill_length=self._longest, jax_padding=jax_padding
        )

    def decode(self, token_ids: list[int], **kwargs: Any) -> str:
        return self._decode(token_ids)

    @property
    def pad_id(self) -> int:
        return 0

    @property
    def eos_id(self) -> int:
        return -1

    @property
    def bos_id(self) -> int:
        return 0

    @property
    def stop_tokens(self) -> set[int]:
        return set()


def start_driver(engine: SearchEngine) -> Any:
    """JetStream's driver with one engine for prefill and decoding, its threads running."""
    params = engine.load_params()
    return Driver(
        prefill_engines=[engine],
        generate_engines=[engine],
        prefill_params=[params],
        generate_params=[params],
        interleaved_mode=True,
    )
