"""Log-probabilities of tokens from hidden states, with the logits of a few tokens at a time.

Shapes: R packed rows of T tokens, D model width.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Shaped

from r1s_jax.kernels.token_logprobs import logprobs_and_entropies
from r1s_jax.models.decoder import Policy
from r1s_jax.rollout.sampler import log_mass

# Logits of this many tokens of a row exist at a time; the backward pass recomputes them.
_LOGIT_CHUNK = 128
# Where the logits of all rows take at most this many bytes, they are kept instead.
_KEPT_LOGITS = 2**29
# Named scope of the operations of a chunk of logits in the compiled program.
LOGITS_SCOPE = "logits_chunk"


def logit_chunks(length: int) -> int:
    """The number of chunks into which the logits of a row of `length` tokens are cut."""
    return -(-length // min(_LOGIT_CHUNK, length))


def token_logprobs(
    policy: Policy,
    tokens: Int[Array, "R T"],
    hidden: Float[Array, "R T D"],
    trained: Bool[Array, "R T"],
    kept: Int[Array, "R T C"] | None = None,
) -> tuple[Float[Array, "R T"], Float[Array, "R T"], Float[Array, "R T"]]:
    """Log-probability of every token given the tokens before it, its distribution's entropy, and
    the log of the probability of the tokens that `kept` names (see sampler.log_mass).

    Column 0 has no token before it and is 0. Logits are computed in chunks that take a row's
    `trained` tokens first. Chunks without any are skipped, because most of a trajectory is prompt
    and documents: tokens that are not `trained` may be 0.
    """
    length = tokens.shape[1]
    if kept is None:
        kept = jnp.zeros((*tokens.shape, 0), jnp.int32)
    targets, trained, kept = (
        jnp.pad(x[:, 1:], ((0, 0), (0, 1)) + ((0, 0),) * (x.ndim - 2))
        for x in (tokens, trained, kept)
    )
    order = jnp.argsort(~trained, axis=1, stable=True)
    back = jnp.argsort(order, axis=1)
    pad = -length % min(_LOGIT_CHUNK, length)
    chunks = logit_chunks(length)

    def split(x: Array) -> Array:
        x = jnp.pad(permuted(x, order, back), ((0, 0), (0, pad)) + ((0, 0),) * (x.ndim - 2))
        return x.reshape(x.shape[0], chunks, (length + pad) // chunks, *x.shape[2:]).swapaxes(0, 1)

    def join(x: Array) -> Array:
        x = x.swapaxes(0, 1).reshape(tokens.shape[0], -1)[:, :length]
        return jnp.pad(permuted(x, back, order)[:, :-1], ((0, 0), (1, 0)))

    def chunk(args: tuple[Array, ...]) -> tuple[Array, ...]:
        hidden, targets, trained, kept = args
        zeros = jnp.zeros(targets.shape, jnp.float32)
        nothing = (zeros, zeros, zeros)[: 3 if kept.shape[-1] else 2]
        return lax.cond(
            trained.any(), lambda: _measure(policy, hidden, targets, kept), lambda: nothing
        )

    parts = split(hidden), split(targets), split(trained), split(kept)
    with jax.named_scope(LOGITS_SCOPE):
        if 4 * tokens.size * policy.config.vocab_size > _KEPT_LOGITS:
            measured = lax.map(jax.checkpoint(chunk), parts)
        else:
            each = [chunk(tuple(x[i] for x in parts)) for i in range(chunks)]
            measured = tuple(map(jnp.stack, zip(*each, strict=True)))
    logprobs, entropies, *masses = map(join, measured)
    return logprobs, entropies, masses[0] if masses else jnp.zeros_like(logprobs)


def _measure(policy: Policy, hidden: Array, targets: Array, kept: Array) -> tuple[Array, ...]:
    """Log-probabilities and entropies, and the masses of `kept` where it has any columns."""
    logits = policy.logits(hidden)
    masses = (log_mass(logits, kept),) if kept.shape[-1] else ()
    return *_logprobs_and_entropies(policy, logits, targets), *masses


def _logprobs_and_entropies(policy: Policy, logits: Array, targets: Array) -> tuple[Array, Array]:
    if policy.tuning.fused_logprobs:
        return logprobs_and_entropies(logits, targets)
    normalizer = jax.nn.logsumexp(logits, axis=-1)
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    # The entropy is a metric: its gradient would keep the probabilities beside the logits.
    fixed, total = lax.stop_gradient((logits, normalizer))
    entropy = total - (jnp.exp(fixed - total[..., None]) * fixed).sum(-1)
    return chosen - normalizer, entropy


@jax.custom_vjp
def permuted(
    x: Shaped[Array, "R T *D"], order: Int[Array, "R T"], back: Int[Array, "R T"]
) -> Shaped[Array, "R T *D"]:
    """Each row's tokens in `order`; `back` is the inverse permutation.

    The gradient is a gather by `back`. The compiler would scatter it, since it does not know that
    `order` is a permutation.
    """
    return jnp.take_along_axis(x, order.reshape(*order.shape, *[1] * (x.ndim - 2)), axis=1)


def _permuted(x: Array, order: Array, back: Array) -> tuple[Array, tuple[Array, Array]]:
    return permuted(x, order, back), (order, back)


def _unpermuted(orders: tuple[Array, Array], g: Array) -> tuple[Array, None, None]:
    order, back = orders
    return permuted(g, back, order), None, None


permuted.defvjp(_permuted, _unpermuted)
