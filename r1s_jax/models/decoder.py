"""The policy: one Flax decoder for Llama 3.x, SmolLM2, Qwen2.5 and Qwen3.

Shapes: B rows, T tokens, D model width, F feed-forward width, H query heads, N key/value heads,
K head width, L layers, V vocabulary, S slots of a KV cache, C its capacity in tokens.

Parameters are a plain nested dict (the pytree that crosses every jit boundary); `Policy` wraps it
as a Flax module for the length of one traced call. Sampling and learning share one block: only the
attention function differs.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from r1s_jax.config import Impl, ModelConfig, Remat
from r1s_jax.kernels.attention.api import attention, decode_attention
from r1s_jax.kernels.matmul import matmul
from r1s_jax.kernels.tuning import ACCELERATOR, Tuning
from r1s_jax.models.kv_cache import KVCache
from r1s_jax.models.lora import adapters_of
from r1s_jax.models.params import Params, as_computed

# Scope in the compiled program that runs once per layer.
LAYERS_SCOPE = "decoder_layer"


# Called like `attention`, with q, k, v and `last_query=` of whole rows.
RowAttention = Callable[..., Array]
_PROJECTED = "projected"  # marks a projection that rematerialisation does not see as a product
_REMAT = {
    "attention": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        jax.checkpoint_policies.save_only_these_names(_PROJECTED),
    ),
    "full": jax.checkpoint_policies.nothing_saveable,
}
# (layer index, q, k, v of the new tokens, carried cache) -> (attention output, cache)
Attend = Callable[[Array, Array, Array, Array, Any], tuple[Array, Any]]


class Policy(nnx.Module):
    """The decoder around one parameter tree.

    `compute_dtype` is that of activations and matmuls; parameters keep their own dtype and are
    cast where they are used. Inside `shard_map`, `tensor_axis` names the mesh axis over which
    heads, feed-forward and vocabulary are split; under plain jit it stays None and XLA places the
    collectives itself. `impl` names the attention backend; `attend_rows`, where given, replaces it
    for whole rows (see sharding.py). `tuning` selects the platform's way to compute
    (kernels/tuning.py).
    """

    def __init__(
        self,
        config: ModelConfig,
        params: Params,
        *,
        compute_dtype: Any = jnp.float32,
        tensor_axis: str | None = None,
        remat: Remat = "none",
        impl: Impl | None = None,
        attend_rows: RowAttention | None = None,
        tuning: Tuning = ACCELERATOR,
    ):
        self.config = config
        self.compute_dtype = compute_dtype
        self.tensor_axis = tensor_axis
        self.remat = remat
        self.impl: Impl | None = impl
        self.tuning = tuning
        self.attend_rows = attend_rows or partial(attention, impl=impl)
        self.embed = nnx.Param(params["embed"])
        # Stacked, or a list (see unstack_layers).
        self.layers = nnx.data(params["layers"])
        self.final_norm = nnx.Param(params["final_norm"])
        self.lm_head = None if config.tie_embeddings else nnx.Param(params["lm_head"])

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"] | None = None,
        last_query: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B T V"]:
        """float32 logits of whole rows."""
        return self.logits(self.hidden(tokens, positions, last_query))

    def hidden(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"] | None = None,
        last_query: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B T D"]:
        """Final hidden states of whole rows (learning).

        `positions` are those in a token's own sequence; `last_query` says who attends to whom (see
        kernels/attention/visibility.py).
        """
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)

        def attend(layer: Array, q: Array, k: Array, v: Array, cache: None) -> tuple[Array, None]:
            return self.attend_rows(q, k, v, last_query=last_query), cache

        return self._stack(tokens, positions, attend, None)[0]

    def decode(
        self, tokens: Int[Array, "S T"], starts: Int[Array, " S"], cache: KVCache
    ) -> tuple[Float[Array, "S T D"], KVCache]:
        """Feeds T tokens to every slot; slot s already holds `starts[s]` tokens.

        Requires `starts + T <= C`.
        """
        at = starts[:, None] + jnp.arange(tokens.shape[1])

        def write(layer: Array, buffer: Array, new: Array) -> Array:
            if len(starts) == 1:  # the CPU's compiler would copy the whole cache at every layer
                at_start = (layer, 0, 0, starts[0], *(0,) * (buffer.ndim - 4))
                return lax.dynamic_update_slice(buffer, new[None], at_start)
            # Slots and heads as one axis: with heads inside the written window, the TPU compiler
            # transposes the whole cache and back at every layer.
            heads, rest = buffer.shape[2], buffer.shape[3:]
            flat = buffer.reshape(buffer.shape[0], -1, *rest)
            rows = jnp.repeat(jnp.arange(flat.shape[1]), at.shape[1])
            where = jnp.repeat(at, heads, axis=0).ravel()
            written = flat.at[layer, rows, where].set(new.reshape(len(rows), *rest[1:]))
            return written.reshape(buffer.shape)

        def attend(layer: Array, q: Array, k: Array, v: Array, cache: KVCache):
            cache = cache.written(k, v, partial(write, layer))
            return self._attend_cache(q, cache, layer, starts + tokens.shape[1]), cache

        return self._stack(tokens, at, attend, cache)

    def prefill(
        self,
        tokens: Int[Array, "R T"],
        rows: Int[Array, " R"],
        starts: Int[Array, " R"],
        cache: KVCache,
    ) -> tuple[Float[Array, "R T D"], KVCache]:
        """Feeds a chunk of T tokens to R of the slots, from position `starts[r]` on.

        Later tokens overwrite the entries of a chunk past its row's text, so a row with nothing to
        feed may take part. Requires `starts + T <= C`.
        """
        length = tokens.shape[1]
        positions = starts[:, None] + jnp.arange(length)

        def write(layer: Array, buffer: Array, new: Array) -> Array:
            # One slice a row keeps the update in place; a gather over rows copies the cache.
            rest = (0,) * (buffer.ndim - 4)
            for r in range(tokens.shape[0]):
                at = (layer, rows[r], 0, starts[r], *rest)
                buffer = lax.dynamic_update_slice(buffer, new[r][None, None], at)
            return buffer

        def attend(layer: Array, q: Array, k: Array, v: Array, cache: KVCache):
            cache = cache.written(k, v, partial(write, layer))
            return self._attend_cache(q, cache, layer, starts + length, rows), cache

        return self._stack(tokens, positions, attend, cache)

    def logits(self, x: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """float32 logits of hidden states, over the whole vocabulary on every device."""
        x = x.astype(self.compute_dtype)
        if self.lm_head is None:
            w, equation = self.embed[...], "...d,vd->...v"
        else:
            w, equation = self.lm_head[...], "...d,dv->...v"
        w = w.astype(self.compute_dtype)
        if self.tuning.cpu_matmul:
            out = matmul(x.reshape(-1, x.shape[-1]), w, self.lm_head is None)
            out = out.reshape(*x.shape[:-1], -1)
        else:
            out = jnp.einsum(equation, x, w, preferred_element_type=jnp.float32)
        if self.tensor_axis:
            out = lax.all_gather(out, self.tensor_axis, axis=out.ndim - 1, tiled=True)
        return out

    def _attend_cache(
        self, q: Array, cache: KVCache, layer: Array, ends: Array, rows: Array | None = None
    ) -> Array:
        operands = q, cache.k, cache.v, layer, ends, rows
        return decode_attention(*operands, scales=cache.scales, impl=self.impl)

    def _stack(self, tokens: Array, positions: Array, attend: Attend, cache: Any):
        """Embedding, all layers (under one scan where they are stacked), final norm."""
        x = self._embed(tokens)
        rope = rope_tables(self.config, positions)

        def layer(carry: tuple, inputs: tuple) -> tuple[tuple, None]:
            (x, cache), (index, w) = carry, inputs
            return self._block(x, w, rope, partial(attend, index), cache), None

        if self.remat != "none":
            layer = jax.checkpoint(layer, policy=_REMAT[self.remat])
        if isinstance(self.layers, list):
            for index, w in enumerate(self.layers):
                (x, cache), _ = layer((x, cache), (jnp.int32(index), w))
        else:
            inputs = (jnp.arange(self.config.num_layers), self.layers)
            unroll = self.tuning.unroll and self.remat == "none"
            with jax.named_scope(LAYERS_SCOPE):
                (x, cache), _ = lax.scan(layer, (x, cache), inputs, unroll=unroll)
        return rms_norm(x, self.final_norm[...], self.config.norm_eps), cache

    def _block(self, x: Array, w: Params, rope: tuple, attend: Callable, cache: Any):
        """One decoder layer: attention and gated feed-forward, each added to the residual."""
        eps, dtype = self.config.norm_eps, self.compute_dtype
        w = as_computed(w, dtype)
        project = partial(self._project, w)

        y = rms_norm(x, w["attn_norm"], eps)
        heads = (*x.shape[:2], -1, self.config.head_dim)
        q, k, v = (project(y, name).reshape(heads) for name in ("wq", "wk", "wv"))
        if self.config.qkv_bias:
            q, k, v = q + w["bq"], k + w["bk"], v + w["bv"]
        if self.config.qk_norm:
            q, k = rms_norm(q, w["q_norm"], eps), rms_norm(k, w["k_norm"], eps)
        out, cache = attend(apply_rope(q, rope), apply_rope(k, rope), v, cache)
        out = out.astype(dtype).reshape(*out.shape[:2], -1)
        x = x + self._sum(project(out, "wo"))

        y = rms_norm(x, w["mlp_norm"], eps)
        gate = jax.nn.silu(project(y, "w_gate"))
        x = x + self._sum(project(gate * project(y, "w_up"), "w_down"))
        return x, cache

    def _embed(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        table = self.embed[...]
        if not self.tensor_axis:
            return table[tokens].astype(self.compute_dtype)
        # Each device holds a slice of the vocabulary: the others contribute zeros.
        local = tokens - lax.axis_index(self.tensor_axis) * table.shape[0]
        mine = (local >= 0) & (local < table.shape[0])
        x = jnp.where(mine[..., None], table[jnp.where(mine, local, 0)], 0)
        return lax.psum(x.astype(self.compute_dtype), self.tensor_axis)

    def _project(self, w: Params, x: Float[Array, "B T D"], name: str) -> Float[Array, "B T F"]:
        """`x @ w[name]`, rows and tokens as one axis, plus the product with its adapters, if any.

        With two axes, a CPU would not compute the gradient of a weight as a matrix product.
        """
        rows = x.reshape(-1, x.shape[-1])
        out = self._product(rows, w[name])
        if (pair := adapters_of(w, name)) is not None:
            inner = self._product(rows, pair[0]).astype(x.dtype)
            out = out + self.config.lora_scale * self._product(inner, pair[1])
        out = out.astype(x.dtype)
        if self.tuning.cpu_matmul:
            out = checkpoint_name(out, _PROJECTED)
        return out.reshape(*x.shape[:-1], -1)

    def _product(self, rows: Float[Array, "M D"], w: Float[Array, "..."]) -> Float[Array, "M F"]:
        """`rows @ w` with the axes of `w` flattened to two; float32 on a CPU."""
        columns = w.reshape(rows.shape[1], -1)
        return matmul(rows, columns) if self.tuning.cpu_matmul else rows @ columns

    def _sum(self, x: Array) -> Array:
        return lax.psum(x, self.tensor_axis) if self.tensor_axis else x


def rms_norm(x: Float[Array, "*B D"], gain: Float[Array, " D"], eps: float) -> Float[Array, "*B D"]:
    """Root-mean-square normalisation, computed in float32 (arXiv 1910.07467)."""
    y = x.astype(jnp.float32)
    y = y * lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
    return (y * gain.astype(jnp.float32)).astype(x.dtype)


def rope_tables(
    config: ModelConfig, positions: Int[Array, "B T"]
) -> tuple[Float[Array, "B T 1 K"], Float[Array, "B T 1 K"]]:
    """Cosines and sines of the rotary embedding (arXiv 2104.09864), float32."""
    angles = positions[..., None].astype(jnp.float32) * jnp.asarray(rope_frequencies(config))
    angles = jnp.concatenate([angles, angles], axis=-1)[:, :, None]
    return jnp.cos(angles), jnp.sin(angles)


def rope_frequencies(config: ModelConfig) -> np.ndarray:
    """float32[K/2] radians a position, Llama 3's scaling applied."""
    exponent = np.arange(0, config.head_dim, 2, dtype=np.float32) / config.head_dim
    freqs = (1.0 / np.float32(config.rope_theta) ** exponent).astype(np.float32)
    s = config.rope_scaling
    if s is None:
        return freqs
    # Long waves are stretched by `factor`, short ones unchanged, the rest interpolated.
    turns = s.original_max_position * freqs / (2 * np.pi)
    smooth = (turns - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)
    smooth = np.clip(smooth, 0.0, 1.0)
    return ((1 - smooth) * freqs / s.factor + smooth * freqs).astype(np.float32)


def apply_rope(x: Float[Array, "B T H K"], rope: tuple) -> Float[Array, "B T H K"]:
    """Rotates each head's halves against each other (the Hugging Face convention)."""
    cos, sin = rope
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([-second, first], axis=-1)
    return (x.astype(jnp.float32) * cos + rotated * sin).astype(x.dtype)
