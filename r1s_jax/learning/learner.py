"""Learning: the optimizer and one jitted update.

Shapes: M micro-batches of R packed rows of T tokens (see packing.py), V vocabulary.
"""

from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from r1s_jax.config import Attention, ModelConfig, OptimizerConfig, PolicyConfig, Remat
from r1s_jax.learning.logprobs import token_logprobs
from r1s_jax.learning.losses import Metrics, TokenLoss
from r1s_jax.learning.packing import PackedBatch, Sizes, pack, unpack
from r1s_jax.models.decoder import Policy
from r1s_jax.models.lora import combine, trainable
from r1s_jax.models.params import Params
from r1s_jax.models.sharding import (
    BATCH_AXES,
    attention_impl,
    check_attention,
    mesh_tuning,
    param_shardings,
    place,
    replicated,
    row_attention,
)
from r1s_jax.system.distributed import to_host
from r1s_jax.system.dtype import AUTO, default_dtype

# Named scope of the operations of a micro-batch in the compiled program.
MICRO_SCOPE = "micro_batch"


class LearnerState(NamedTuple):
    """The arrays that a checkpoint keeps.

    `optimizer` and `reference` (for a KL penalty) cover the trained parameters only: all of them,
    or the adapters.
    """

    params: Params
    optimizer: Any
    reference: Params | None = None


@cache
def make_optimizer(
    config: OptimizerConfig, learning_rate: float | None = None
) -> optax.GradientTransformation:
    """Adam after global-norm clipping; AdamW with weight decay. The same object for equal configs,
    so that equal learners share compiled programs."""
    rate = config.learning_rate if learning_rate is None else learning_rate
    clip = config.grad_clip
    return optax.chain(
        optax.clip_by_global_norm(clip) if clip else optax.identity(),
        optax.adamw(
            rate,
            b1=config.b1,
            b2=config.b2,
            weight_decay=config.weight_decay,
            mu_dtype=config.moment_dtype,
        ),
    )


@dataclass(frozen=True)
class Learner:
    """The jitted update over packed rows, and log-probabilities without an update."""

    model: ModelConfig
    mesh: Mesh
    compute_dtype: Any
    remat: Remat
    optimizer: optax.GradientTransformation
    loss: TokenLoss
    attention: Attention = "auto"
    compiled: dict[tuple[int, ...], jax.stages.Compiled] = field(
        default_factory=dict, compare=False, repr=False
    )

    @staticmethod
    def of(
        policy: PolicyConfig,
        model: ModelConfig,
        mesh: Mesh,
        optimizer: optax.GradientTransformation,
        loss: TokenLoss,
    ) -> "Learner":
        """The learner of a recipe's policy, whose architecture is `model`.

        Raises ConfigError where the recipe's attention backend does not support the model.
        """
        name = policy.compute_dtype
        dtype = default_dtype() if name == AUTO else np.dtype(name)
        check_attention(policy.attention, mesh, model, dtype)
        return Learner(model, mesh, dtype, policy.remat, optimizer, loss, policy.attention)

    def init(self, params: Params, *, keep_reference: bool = False) -> LearnerState:
        """Fresh optimizer state, each moment sharded like its parameter."""
        shardings = param_shardings(self.model, self.mesh)
        moments = self.optimizer_shardings(params)
        optimizer = jax.jit(self.optimizer.init, out_shardings=moments)(trainable(params))

        # Updates donate their input, so the parameters and the reference must be copies.
        def copy(tree: Params, shardings: Any) -> Params:
            return jax.jit(lambda p: jax.tree.map(jnp.copy, p), out_shardings=shardings)(tree)

        reference = copy(trainable(params), trainable(shardings)) if keep_reference else None
        return LearnerState(copy(params, shardings), optimizer, reference)

    def optimizer_shardings(self, params: Params) -> Any:
        """Sharding of every leaf of the optimizer's state."""
        return optax.tree_map_params(
            self.optimizer,
            lambda _, s: s,
            jax.eval_shape(self.optimizer.init, trainable(params)),
            trainable(param_shardings(self.model, self.mesh)),
            transform_non_params=lambda _: replicated(self.mesh),
        )

    def update(
        self, state: LearnerState, batch: PackedBatch[np.ndarray], micro: int, scale: float = 1.0
    ) -> tuple[LearnerState, dict[str, float]]:
        """One optimizer step over the first `micro` micro-batches; donates `state`.

        `scale` multiplies the learning rate. Returns the new state and metrics: `loss`,
        `grad_norm`, `tokens` (trained), their mean `entropy`, and the metrics of the loss.
        """
        update = self.compiled.get(batch.tokens.shape) or self._update
        state, metrics = update(state, self._place(batch), jnp.int32(micro), jnp.float32(scale))
        return state, {name: float(value) for name, value in metrics.items()}

    def compile(
        self, state: LearnerState, batch: PackedBatch[jax.ShapeDtypeStruct]
    ) -> jax.stages.Compiled:
        """Compiles `update` for batches of this shape (see `packed_shapes`); keeps only that."""
        scalars = [
            jax.ShapeDtypeStruct((), dtype, sharding=replicated(self.mesh))
            for dtype in (jnp.int32, jnp.float32)
        ]
        self.compiled.clear()
        program = self._update.lower(self, state, batch, *scalars).compile()
        return self.compiled.setdefault(batch.tokens.shape, program)

    def logprobs(self, params: Params, batch: PackedBatch[np.ndarray], micro: int) -> np.ndarray:
        """float32[M, R, T] log-probability of every token under `params`, within its nucleus where
        the batch records one."""
        return to_host(self._logprobs(params, self._place(batch), jnp.int32(micro)))

    def sequence_logprobs(
        self,
        params: Params,
        tokens: Int[np.ndarray, "N W"],
        lengths: Int[np.ndarray, " N"],
        wanted: Bool[np.ndarray, "N W"],
        sizes: Sizes,
        kept: Int[np.ndarray, "N W C"] | None = None,
    ) -> Float[np.ndarray, "N W"]:
        """Log-probability of the `wanted` tokens of N sequences, which it packs; 0 elsewhere.

        With `kept`, it is that within the nucleus that the token was drawn from.
        """
        nothing = np.zeros(tokens.shape, np.float32)
        batch, layout, micro = pack(
            tokens,
            lengths,
            wanted.astype(np.float32),
            nothing,
            nothing,
            kept=kept,
            **sizes._asdict(),
        )
        packed = self.logprobs(params, batch, micro)
        return np.where(wanted, unpack(packed, layout, lengths, tokens.shape[1]), 0.0)

    def _place(self, batch: PackedBatch[np.ndarray]) -> PackedBatch:
        return place(batch, NamedSharding(self.mesh, P(None, BATCH_AXES)))

    def _forward(self, params: Params, batch: PackedBatch) -> tuple[Array, Array, Array]:
        """Log-probabilities, entropies and log-masses of nuclei: see token_logprobs."""
        impl = attention_impl(self.attention, self.mesh)
        policy = Policy(
            self.model,
            params,
            compute_dtype=self.compute_dtype,
            remat=self.remat,
            impl=impl,
            attend_rows=row_attention(impl, self.mesh),
            tuning=mesh_tuning(self.mesh),
        )
        hidden = policy.hidden(batch.tokens, batch.positions, batch.last_query)
        return token_logprobs(policy, batch.tokens, hidden, _scored(batch), batch.kept)

    def update_step(
        self, state: LearnerState, batch: PackedBatch, micro: Array, scale: Array
    ) -> tuple[LearnerState, Metrics]:
        """The body of `update` for tracing and compiling: not jitted, arrays not placed."""
        trained = trainable(state.params)

        def loss(trained: Params, rows: PackedBatch) -> tuple[Array, Metrics]:
            logprobs, entropies, masses = self._forward(combine(state.params, trained), rows)
            value, metrics = self.loss(logprobs, rows._replace(log_kept=masses))
            mask = (rows.weights > 0).astype(jnp.float32)
            common = {"tokens": mask.sum(), "entropy": (mask * entropies).sum()}
            return value, common | metrics

        def accumulate(i: Array, carry: tuple) -> tuple:
            rows = PackedBatch(*(lax.dynamic_index_in_dim(a, i, keepdims=False) for a in batch))
            (value, metrics), grads = jax.value_and_grad(loss, has_aux=True)(trained, rows)
            total = jax.tree.map(jnp.add, carry[:2], (grads, value))
            return *total, {k: _merge(k, carry[2][k], v) for k, v in metrics.items()}

        rows = PackedBatch(*(a[0] for a in batch))
        zeros = jax.tree.map(
            lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(loss, trained, rows)[1]
        )
        start = (jax.tree.map(jnp.zeros_like, trained), jnp.zeros(()), zeros)
        with jax.named_scope(MICRO_SCOPE):
            if len(batch.tokens) == 1:  # nothing to add up
                (value, metrics), grads = jax.value_and_grad(loss, has_aux=True)(trained, rows)
            else:
                grads, value, metrics = lax.fori_loop(0, micro, accumulate, start)
        tokens = jnp.maximum(metrics["tokens"], 1)
        metrics = {
            k: v if k == "tokens" or k.endswith("max") else v / tokens for k, v in metrics.items()
        }
        metrics |= {"loss": value, "grad_norm": optax.tree.norm(grads)}
        updates, optimizer = self.optimizer.update(grads, state.optimizer, trained)
        updates = jax.tree.map(lambda u: scale * u, updates)
        learned: Any = optax.apply_updates(trained, updates)
        params = combine(state.params, learned)
        return LearnerState(params, optimizer, state.reference), metrics

    _update = partial(jax.jit, static_argnums=0, donate_argnums=1)(update_step)

    @partial(jax.jit, static_argnums=0)
    def _logprobs(self, params: Params, batch: PackedBatch, micro: Array) -> Array:
        def fill(i: Array, out: Array) -> Array:
            rows = PackedBatch(*(lax.dynamic_index_in_dim(a, i, keepdims=False) for a in batch))
            logprobs, _, masses = self._forward(params, rows)
            return out.at[i].set(logprobs - masses)

        return lax.fori_loop(0, micro, fill, jnp.zeros(batch.tokens.shape))


def _scored(batch: PackedBatch) -> Bool[Array, "R T"]:
    """The tokens whose log-probabilities a stream of the loss needs."""
    return (batch.weights > 0) | (batch.kl_weights > 0) | (batch.ce_weights > 0)


def _merge(name: str, total: Array, value: Array) -> Array:
    return jnp.maximum(total, value) if name.endswith("max") else total + value
