"""Log-probabilities of tokens from hidden states, without the logits of all of them at once.

Shapes: R packed rows of T tokens, D model width.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Shaped

from r1s_jax.kernels.token_logprobs import logprobs_and_entropies
from r1s_jax.models.decoder import Policy

# Logits of this many tokens of a row exist at a time; the rest are recomputed when needed.
_LOGIT_CHUNK = 128
# Unless those of all rows together take no more than so many bytes: then they are kept.
_KEPT_LOGITS = 2**29
# Name in the compiled program of what runs once a chunk of logits.
LOGITS_SCOPE = "logits_chunk"


def logit_chunks(length: int) -> int:
    """Into how many chunks the logits of a row of `length` tokens are cut."""
    return -(-length // min(_LOGIT_CHUNK, length))


def token_logprobs(
    policy: Policy,
    tokens: Int[Array, "R T"],
    hidden: Float[Array, "R T D"],
    wanted: Bool[Array, "R T"],
) -> tuple[Float[Array, "R T"], Float[Array, "R T"]]:
    """Log-probability of every token given those before it, and the entropy it was drawn with.

    Column 0 has no token before it and is 0. The vocabulary-wide logits are made chunk by chunk,
    a row's `wanted` tokens first, and a chunk with none of them not at all: most of a trajectory is
    prompt and documents. What is not wanted may be 0.
    """
    length = tokens.shape[1]
    targets, wanted = (jnp.pad(x[:, 1:], ((0, 0), (0, 1))) for x in (tokens, wanted))
    order = jnp.argsort(~wanted, axis=1, stable=True)
    back = jnp.argsort(order, axis=1)
    pad = -length % min(_LOGIT_CHUNK, length)
    chunks = logit_chunks(length)

    def split(x: Array) -> Array:
        x = jnp.pad(permuted(x, order, back), ((0, 0), (0, pad)) + ((0, 0),) * (x.ndim - 2))
        return x.reshape(x.shape[0], chunks, -1, *x.shape[2:]).swapaxes(0, 1)

    def join(x: Array) -> Array:
        x = x.swapaxes(0, 1).reshape(tokens.shape[0], -1)[:, :length]
        return jnp.pad(permuted(x, back, order)[:, :-1], ((0, 0), (1, 0)))

    def chunk(args: tuple[Array, ...]) -> tuple[Array, Array]:
        hidden, targets, wanted = args
        zeros = jnp.zeros(targets.shape, jnp.float32)
        return lax.cond(
            wanted.any(), lambda: _measure(policy, hidden, targets), lambda: (zeros, zeros)
        )

    parts = split(hidden), split(targets), split(wanted)
    with jax.named_scope(LOGITS_SCOPE):
        if 4 * tokens.size * policy.config.vocab_size > _KEPT_LOGITS:
            logprobs, entropies = lax.map(jax.checkpoint(chunk), parts)
        else:
            each = [chunk(tuple(x[i] for x in parts)) for i in range(chunks)]
            logprobs, entropies = map(jnp.stack, zip(*each, strict=True))
    return join(logprobs), join(entropies)


def _measure(policy: Policy, hidden: Array, targets: Array) -> tuple[Array, Array]:
    logits = policy.logits(hidden)
    if policy.tuning.fused_logprobs:
        return logprobs_and_entropies(logits, targets)
    normalizer = jax.nn.logsumexp(logits, axis=-1)
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    # Measured only: its gradient would keep the probabilities beside the logits.
    fixed, total = lax.stop_gradient((logits, normalizer))
    entropy = total - (jnp.exp(fixed - total[..., None]) * fixed).sum(-1)
    return chosen - normalizer, entropy


@jax.custom_vjp
def permuted(
    x: Shaped[Array, "R T *D"], order: Int[Array, "R T"], back: Int[Array, "R T"]
) -> Shaped[Array, "R T *D"]:
    """Each row's tokens in the order given; `back` is the permutation that undoes it.

    The gradient is read by `back` too: the compiler would scatter it, since it does not know that
    no token is read twice.
    """
    return jnp.take_along_axis(x, order.reshape(*order.shape, *[1] * (x.ndim - 2)), axis=1)


def _permuted(x: Array, order: Array, back: Array) -> tuple[Array, tuple[Array, Array]]:
    return permuted(x, order, back), (order, back)


def _unpermuted(orders: tuple[Array, Array], g: Array) -> tuple[Array, None, None]:
    order, back = orders
    return permuted(g, back, order), None, None


permuted.defvjp(_permuted, _unpermuted)
