"""Drawing the next token: temperature, top-p, and the logprobs that learning needs.

Both steps avoid sorting the vocabulary: the nucleus is found by bisection on a probability
threshold and the token by inverting the cumulative distribution with one uniform number.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

# Temperatures below this take the likeliest token, because logits divided by so small a number lose
# their differences to rounding.
GREEDY_BELOW = 1e-5
_BLOCK = 128
# A nucleus is recorded up to this many tokens.
_MOST_KEPT = 32


class Drawn(NamedTuple):
    """The next token of each row, and what learning needs to know of its distributions.

    Under top-p a token is drawn from the nucleus, so importance ratios compare probabilities within
    that set, which must be the one of sampling time. A nucleus of more than `_MOST_KEPT` tokens is
    not recorded; ratios of its token compare the whole distributions.
    """

    token: Int[Array, " S"]
    sample_logprob: Float[Array, " S"]  # under the tempered nucleus that it was drawn from
    policy_logprob: Float[Array, " S"]  # under temperature 1 and top-p 1
    kept: Int[Array, "S C"]  # the nucleus; -1 fills up; C = 0 where it is not recorded
    log_kept: Float[Array, " S"]  # log of its probability under temperature 1; 0: not recorded


def kept_width(temperature: float, top_p: float) -> int:
    """The width C of `Drawn.kept`."""
    return _MOST_KEPT if top_p < 1 and temperature >= GREEDY_BELOW else 0


def trajectory_keys(
    seed: int,
    steps: Int[Array | np.ndarray, " N"] | int,
    questions: Int[Array | np.ndarray, " N"],
    samples: Int[Array | np.ndarray, " N"],
    occurrences: Int[Array | np.ndarray, " N"],
) -> Array:
    """One random key per trajectory, a function of (seed, step, question, sample) alone.

    If a question occurs in a step again, its occurrence (from 0) folds in too, so that it gets
    other samples.
    """
    root = jax.random.key(seed)

    def key(step: Any, question: Any, sample: Any, occurrence: Any) -> Array:
        base = jax.random.fold_in(root, step)
        first = jax.random.fold_in(jax.random.fold_in(base, question), sample)
        again = jax.random.fold_in(first, occurrence)
        return jnp.where(occurrence > 0, again, first)

    steps = jnp.broadcast_to(jnp.asarray(steps, jnp.int32), questions.shape)
    return jax.vmap(key)(steps, questions, samples, occurrences)


def sample(
    logits: Float[Array, "S V"], uniform: Float[Array, " S"], *, temperature: float, top_p: float
) -> Drawn:
    """Draws the next token of each row.

    A temperature below GREEDY_BELOW takes the likeliest token, whose sampling probability is 1.
    """
    if temperature < GREEDY_BELOW:
        token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        return _without_nucleus(token, jnp.zeros(logits.shape[0]), _logprob(logits, token))
    probs = jax.nn.softmax(logits / temperature, axis=-1)
    if top_p < 1:
        probs = _nucleus(probs, top_p)
    drawn = _draw(logits, probs, uniform)
    if not (width := kept_width(temperature, top_p)):
        return drawn
    kept = _kept(probs, min(width, probs.shape[-1]))
    kept = jnp.pad(kept, ((0, 0), (0, width - kept.shape[1])), constant_values=-1)
    return drawn._replace(kept=kept, log_kept=log_mass(logits, kept))


def log_mass(logits: Float[Array, "*B V"], kept: Int[Array, "*B C"]) -> Float[Array, "*B"]:
    """Log of the probability of the tokens `kept` (-1: none); 0 where there are none at all."""
    chosen = jnp.take_along_axis(logits, jnp.maximum(kept, 0), axis=-1)
    inside = jax.nn.logsumexp(jnp.where(kept >= 0, chosen, -1e30), axis=-1)
    mass = inside - jax.nn.logsumexp(logits, axis=-1)
    return jnp.where((kept >= 0).any(-1), mass, 0.0)


def sample_each(
    logits: Float[Array, "S V"],
    uniform: Float[Array, " S"],
    temperature: Float[Array, " S"],
    top_p: Float[Array, " S"],
) -> Drawn:
    """`sample` with a temperature and a top-p per row; does not record nuclei."""
    greedy = temperature < GREEDY_BELOW
    probs = jax.nn.softmax(logits / jnp.where(greedy, 1, temperature)[:, None], axis=-1)
    cut = top_p < 1
    probs = lax.cond(
        jnp.any(cut & ~greedy),
        lambda: jnp.where(cut[:, None], _nucleus(probs, top_p), probs),
        lambda: probs,
    )
    token, drawn, plain, *_ = _draw(logits, probs, uniform)
    best = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    return _without_nucleus(
        jnp.where(greedy, best, token),
        jnp.where(greedy, 0, drawn),
        jnp.where(greedy, _logprob(logits, best), plain),
    )


def _draw(
    logits: Float[Array, "S V"], probs: Float[Array, "S V"], uniform: Float[Array, " S"]
) -> Drawn:
    """See `sample`; `probs` are tempered and cut, but not renormalised."""
    token = invert_cdf(probs, uniform)
    drawn = jnp.take_along_axis(probs, token[:, None], axis=-1)[:, 0]
    sample_logprob = jnp.log(drawn) - jnp.log(probs.sum(-1))
    return _without_nucleus(token, sample_logprob, _logprob(logits, token))


def _without_nucleus(token: Array, sample_logprob: Array, policy_logprob: Array) -> Drawn:
    kept = jnp.zeros((len(token), 0), jnp.int32)
    return Drawn(token, sample_logprob, policy_logprob, kept, jnp.zeros(len(token)))


def _kept(probs: Float[Array, "S V"], width: int) -> Int[Array, "S C"]:
    """The tokens with any probability; all -1 where they are more than `width`."""
    # The TPU sorts a vocabulary slowly; its approximate search is checked by the count below.
    values, ids = lax.platform_dependent(
        probs,
        tpu=lambda p: tuple(lax.approx_max_k(p, width)),
        default=lambda p: tuple(lax.top_k(p, width)),
    )
    found = values > 0
    whole = found.sum(-1, keepdims=True) == (probs > 0).sum(-1, keepdims=True)
    return jnp.where(found & whole, ids, -1).astype(jnp.int32)


def _nucleus(
    probs: Float[Array, "S V"], top_p: Float[Array, " S"] | Float[Array, ""] | float
) -> Float[Array, "S V"]:
    return jnp.where(probs >= nucleus_threshold(probs, top_p)[:, None], probs, 0)


def nucleus_threshold(
    probs: Float[Array, "S V"], top_p: Float[Array, " S"] | Float[Array, ""] | float
) -> Float[Array, " S"]:
    """The largest t such that the tokens of probability >= t hold at least `top_p` of the mass.

    Bisects on the bits of t, since positive floats order like their bits: at most 31 passes
    over the row, exact, with nothing but sums (small all-reduces where the vocabulary is sharded).
    """
    bits = lax.bitcast_convert_type(probs.astype(jnp.float32), jnp.int32)
    # Tokens below (1 - top_p) / V cannot together hold 1 - top_p: a floor for the search.
    floor = jnp.maximum(jnp.float32((1 - top_p) / probs.shape[-1]), 0)
    low = jnp.broadcast_to(lax.bitcast_convert_type(floor, jnp.int32), probs.shape[:1])
    high = bits.max(-1)

    def narrow(bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        middle = low + (high - low + 1) // 2
        mass = jnp.where(bits >= middle[:, None], probs, 0).sum(-1)
        enough = mass >= top_p
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle - 1)

    low, _ = lax.while_loop(lambda b: jnp.any(b[0] < b[1]), narrow, (low, high))
    return lax.bitcast_convert_type(low, jnp.float32)


def invert_cdf(probs: Float[Array, "S V"], uniform: Float[Array, " S"]) -> Int[Array, " S"]:
    """Draws a token for each row from unnormalised `probs` with one uniform number in [0, 1).

    Two levels (blocks of tokens, then tokens of one block), so no cumulative sum runs over the
    whole vocabulary.
    """
    rows, vocab = probs.shape
    probs = jnp.pad(probs, ((0, 0), (0, -vocab % _BLOCK))).reshape(rows, -1, _BLOCK)
    mass = probs.sum(-1)
    target = uniform * mass.sum(-1)
    block, before = _first_above(mass, target)
    inside = jnp.take_along_axis(probs, block[:, None, None], axis=1)[:, 0]
    # Rounding may put the target before the block: below 0 it would hit a token without mass.
    token, _ = _first_above(inside, jnp.maximum(target - before, 0))
    return (block * _BLOCK + token).astype(jnp.int32)


def _first_above(mass: Float[Array, "S M"], target: Float[Array, " S"]) -> tuple[Array, Array]:
    """First index whose cumulative mass exceeds `target`, and the mass before it."""
    cumulative = jnp.cumsum(mass, axis=-1)
    index = (cumulative <= target[:, None]).sum(-1)
    # Rounding may put the target past the end: fall back to the last entry with any mass.
    last = mass.shape[-1] - 1 - jnp.argmax(mass[:, ::-1] > 0, axis=-1)
    index = jnp.minimum(index, last)
    before = jnp.take_along_axis(cumulative - mass, index[:, None], axis=-1)[:, 0]
    return index, before


def _logprob(logits: Float[Array, "S V"], token: Int[Array, " S"]) -> Float[Array, " S"]:
    chosen = jnp.take_along_axis(logits, token[:, None], axis=-1)[:, 0]
    return chosen - jax.nn.logsumexp(logits, axis=-1)
