"""Losses over packed rows with weights per token: of the policy, and of the cold start.

Shapes: R packed rows of T tokens. Weights of 1 / (tokens of the sequence x sequences of the batch)
give the mean over each sequence's tokens and then over sequences; equal weights give the mean over
all tokens. Neither depends on the packing.

The loss of a policy is the sum of three streams, each with weights of its own, 0 where a token has
no part in it:

- `rl`: `weights`, the policy gradient of the named loss;
- `ref_kl`: `kl_weights`, the KL to the reference or to a teacher;
- `ce`: `ce_weights`, the cross-entropy of tokens that the system wrote.
"""

from collections.abc import Callable
from functools import cache, partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from r1s_jax.config import AlgorithmConfig, KlEstimator, LldsGate
from r1s_jax.learning.packing import PackedBatch

Metrics = dict[str, Array]
# (log-probabilities, micro-batch) -> (loss, metrics). Metrics are summed over micro-batches and
# divided by the number of trained tokens; metrics whose names end in `max` are maxima.
TokenLoss = Callable[[Array, PackedBatch], tuple[Array, Metrics]]

_MOST_DPPO_RATIO = 20.0  # a token of small probability may have any ratio within the trust region

# Estimates of the KL from log q - log p of a sampled token (see advantages.kl_divergence). As a
# loss, the gradient of k2 is that of KL(p || q) and the gradient of k3 is that of KL(q || p).
_KL: dict[KlEstimator, Callable[[Array], Array]] = {
    "k1": lambda gap: -gap,
    "k2": lambda gap: gap**2 / 2,
    "k3": lambda gap: jnp.expm1(gap) - gap,
}


# The fields that a loss depends on: configs that differ in others share a compiled update.
_FIELDS = ("loss", "clip", "clip_high", "dual_clip", "sequence_mask", "kl_estimator")
_FIELDS += ("llds_coefficient", "llds_gate", "echo_coefficient")


def policy_loss(config: AlgorithmConfig) -> TokenLoss:
    """The loss that `config` names, with its bounds; the same object where they are equal."""
    return _policy_loss(AlgorithmConfig(**{name: getattr(config, name) for name in _FIELDS}))


@cache
def _policy_loss(a: AlgorithmConfig) -> TokenLoss:
    limits = {"clip_high": a.clip_high}
    loss: TokenLoss = {
        "clip": partial(clipped_loss, a.clip, dual_clip=a.dual_clip, **limits),
        "dppo": partial(dppo_loss, a.clip),
        "gspo": partial(gspo_loss, a.clip, **limits),
        "cispo": partial(cispo_loss, a.clip, **limits),
        "gmpo": partial(gmpo_loss, a.clip, **limits),
        "reinforce": reinforce_loss,
    }[a.loss]
    if a.sequence_mask:
        loss = partial(_with_sequence_mask, a.sequence_mask, loss)
    loss = partial(_with_kl, _KL[a.kl_estimator], loss)
    if a.llds_coefficient:
        loss = partial(_with_llds, a.llds_coefficient, a.llds_gate, loss)
    if a.echo_coefficient:
        loss = partial(_with_cross_entropy, loss)
    return loss


def clipped_loss(
    clip: float,
    logprobs: Float[Array, "R T"],
    batch: PackedBatch,
    *,
    clip_high: float = 0.0,
    dual_clip: float = 0.0,
) -> tuple[Array, Metrics]:
    """PPO's clipped objective (arXiv 1707.06347, eq. 7).

    Args:
      clip: the ratio is clipped at this distance from 1.
      clip_high: the same above 1, where it differs (DAPO, arXiv 2503.14476); 0: as `clip`.
      dual_clip: a token with a negative advantage costs at most this many times the advantage
        (arXiv 1912.09729, eq. 5); 0: no bound.
    """
    log_ratio = _log_ratio(logprobs, batch)
    ratio = jnp.exp(log_ratio)
    objective, outside = _clipped(ratio, batch.advantages, clip, clip_high or clip)
    if dual_clip:
        bound = dual_clip * batch.advantages
        objective = jnp.where(batch.advantages < 0, jnp.maximum(objective, bound), objective)
    return _loss(objective, batch), _metrics(logprobs, log_ratio, outside, batch)


def gspo_loss(
    clip: float, logprobs: Float[Array, "R T"], batch: PackedBatch, *, clip_high: float = 0.0
) -> tuple[Array, Metrics]:
    """One ratio per sequence (GSPO, arXiv 2507.18071, eq. 5-7).

    It is the geometric mean of the ratios of the sequence's sampled tokens. Such ratios stay near
    1: the paper clips at 3e-4 below and 4e-4 above. Goes with loss_average=sequence.
    """
    log_ratio = _sequence_means(_log_ratio(logprobs, batch), batch)
    ratio = jnp.exp(log_ratio)
    objective, outside = _clipped(ratio, batch.advantages, clip, clip_high or clip)
    return _loss(objective, batch), _metrics(logprobs, log_ratio, outside, batch)


def cispo_loss(
    clip: float, logprobs: Float[Array, "R T"], batch: PackedBatch, *, clip_high: float = 0.0
) -> tuple[Array, Metrics]:
    """REINFORCE weighted by the ratio, which is clipped above and not differentiated (CISPO,
    arXiv 2506.13585, eq. 4-5), so that no token drops out of the gradient.

    As in the paper, the ratio has no lower bound. Goes with loss_average=token.
    """
    log_ratio = _log_ratio(logprobs, batch)
    ratio, most = jnp.exp(log_ratio), 1 + (clip_high or clip)
    weight = lax.stop_gradient(jnp.minimum(ratio, most))
    objective = weight * batch.advantages * (logprobs - batch.log_kept)
    return _loss(objective, batch), _metrics(logprobs, log_ratio, ratio > most, batch)


def gmpo_loss(
    clip: float, logprobs: Float[Array, "R T"], batch: PackedBatch, *, clip_high: float = 0.0
) -> tuple[Array, Metrics]:
    """The geometric mean of a sequence's ratios, each clipped by itself (GMPO, arXiv 2507.20673,
    eq. 4).

    The logarithm of a ratio is at most `clip_high` where the advantage is positive, and at least
    -`clip` elsewhere; the paper uses 0.4 for both. Goes with loss_average=sequence.
    """
    log_ratio, up = _log_ratio(logprobs, batch), batch.advantages > 0
    limited = jnp.where(
        up, jnp.minimum(log_ratio, clip_high or clip), jnp.maximum(log_ratio, -clip)
    )
    objective = jnp.exp(_sequence_means(limited, batch)) * batch.advantages
    outside = limited != log_ratio
    return _loss(objective, batch), _metrics(logprobs, log_ratio, outside, batch)


def dppo_loss(
    bound: float, logprobs: Float[Array, "R T"], batch: PackedBatch
) -> tuple[Array, Metrics]:
    """The ratio times the advantage, without tokens that left the trust region (DPPO with total
    variation, arXiv 2602.04879).

    A token is left out where its probability, not its logarithm, moved by more than `bound` in the
    direction of its advantage; the paper takes 0.2. The ratio is a weight, cut at
    `_MOST_DPPO_RATIO` and not differentiated.
    """
    log_ratio = _log_ratio(logprobs, batch)
    moved = jnp.exp(batch.old_logprobs + log_ratio) - jnp.exp(batch.old_logprobs)
    outside = moved * jnp.sign(batch.advantages) > bound
    weight = jnp.where(outside, 0.0, jnp.minimum(jnp.exp(log_ratio), _MOST_DPPO_RATIO))
    objective = lax.stop_gradient(weight) * batch.advantages * (logprobs - batch.log_kept)
    return _loss(objective, batch), _metrics(logprobs, log_ratio, outside, batch)


def reinforce_loss(logprobs: Float[Array, "R T"], batch: PackedBatch) -> tuple[Array, Metrics]:
    """Williams' REINFORCE (1992): log-likelihood times advantage, without ratio or bound.

    Correct only on-policy, which means one update per rollout.
    """
    log_ratio = _log_ratio(logprobs, batch)
    objective = batch.advantages * (logprobs - batch.log_kept)
    nothing = jnp.zeros(logprobs.shape, bool)
    return _loss(objective, batch), _metrics(logprobs, log_ratio, nothing, batch)


def _with_sequence_mask(
    width: float, loss: TokenLoss, logprobs: Float[Array, "R T"], batch: PackedBatch
) -> tuple[Array, Metrics]:
    """`loss` without sequences whose geometric mean of ratios is further than `width` from 1.

    Such sequences are too far from the policy that sampled them for their ratios to be trusted.
    """
    ratio = jnp.exp(_sequence_means(_log_ratio(logprobs, batch), batch))
    outside = lax.stop_gradient(jnp.abs(ratio - 1)) > width
    masked = (outside & (batch.weights > 0)).astype(jnp.float32)
    value, _ = loss(logprobs, batch._replace(weights=batch.weights * (1 - masked)))
    _, metrics = loss(logprobs, batch)  # of all sequences: the masked ones drift most
    return value, metrics | {"sequence_masked": masked.sum()}


def _with_kl(
    estimate: Callable[[Array], Array],
    loss: TokenLoss,
    logprobs: Float[Array, "R T"],
    batch: PackedBatch,
) -> tuple[Array, Metrics]:
    """`loss` plus the stream `ref_kl`: an estimate of the KL from a token's log-ratio."""
    value, metrics = loss(logprobs, batch)
    # Without a KL term there may be no reference: its zeros must not reach exp.
    gap = jnp.where(batch.kl_weights > 0, batch.reference_logprobs - logprobs, 0.0)
    return value + (batch.kl_weights * estimate(gap)).sum(), metrics


def _with_cross_entropy(
    loss: TokenLoss, logprobs: Float[Array, "R T"], batch: PackedBatch
) -> tuple[Array, Metrics]:
    """`loss` plus the stream `ce`: the cross-entropy of the documents (ECHO)."""
    value, metrics = loss(logprobs, batch)
    documents = (batch.ce_weights > 0).astype(jnp.float32)
    metrics |= {"documents_nll": -(documents * logprobs).sum(), "documents": documents.sum()}
    return value - (batch.ce_weights * logprobs).sum(), metrics


def _with_llds(
    coefficient: float,
    gate: LldsGate,
    loss: TokenLoss,
    logprobs: Float[Array, "R T"],
    batch: PackedBatch,
) -> tuple[Array, Metrics]:
    """`loss` plus a penalty on lost likelihood (LLDS, arXiv 2512.04220).

    It applies to actions (the text of a turn), or to responses (the text of a trajectory), whose
    advantage is not negative and that became less likely as a whole: each of their tokens that
    became less likely costs its loss of log-probability.
    """
    value, metrics = loss(logprobs, batch)
    log_ratio = _log_ratio(logprobs, batch)
    lost = jnp.maximum(-log_ratio, 0) * (batch.advantages >= 0)
    means = _turn_means if gate == "action" else _sequence_means
    lost = jnp.where(means(log_ratio, batch) < 0, lost, 0.0)
    mask = (batch.weights > 0).astype(jnp.float32)
    metrics = metrics | {"likelihood_lost": (mask * lost).sum()}
    return value + coefficient * (batch.weights * lost).sum(), metrics


def _log_ratio(logprobs: Array, batch: PackedBatch) -> Float[Array, "R T"]:
    """log(new / old probability) of every trained token within its nucleus; 0 elsewhere."""
    drawn = logprobs - batch.log_kept
    return jnp.where(batch.weights > 0, drawn - batch.old_logprobs, 0.0)


def _clipped(ratio: Array, advantages: Array, low: float, high: float) -> tuple[Array, Array]:
    """The clipped objective, and where the clip is active."""
    clipped = jnp.clip(ratio, 1 - low, 1 + high) * advantages
    return jnp.minimum(ratio * advantages, clipped), ratio * advantages > clipped


def _sequence_means(values: Float[Array, "R T"], batch: PackedBatch) -> Float[Array, "R T"]:
    """Mean over the trained tokens of each token's sequence. No sequence spans two rows."""
    ids = batch.segment_ids
    return _means(values, jnp.pad(ids[:, 1:] != ids[:, :-1], ((0, 0), (1, 0))), batch)


def _turn_means(values: Float[Array, "R T"], batch: PackedBatch) -> Float[Array, "R T"]:
    """Mean over the trained tokens of each token's turn: those without another between them."""
    ids, trained = batch.segment_ids, batch.weights > 0
    first = (ids[:, 1:] != ids[:, :-1]) | (trained[:, 1:] & ~trained[:, :-1])
    return _means(values, jnp.pad(first, ((0, 0), (1, 0))), batch)


def _means(
    values: Float[Array, "R T"], first: Bool[Array, "R T"], batch: PackedBatch
) -> Float[Array, "R T"]:
    """Mean over the trained tokens of each span; `first` marks the beginnings of spans."""
    place, mask = jnp.cumsum(first, axis=1), (batch.weights > 0).astype(values.dtype)

    def row(values: Array, mask: Array, place: Array) -> Array:
        total, count = (
            jax.ops.segment_sum(x, place, values.shape[0]) for x in (values * mask, mask)
        )
        return (total / jnp.maximum(count, 1))[place]

    return jax.vmap(row)(values, mask, place)


def _loss(objective: Array, batch: PackedBatch) -> Float[Array, ""]:
    """Minus the objective, weighted by token."""
    objective = jnp.where(batch.weights > 0, objective, 0.0)
    return -(batch.weights * objective).sum()


def _metrics(logprobs: Array, log_ratio: Array, outside: Array, batch: PackedBatch) -> Metrics:
    """`log_ratio` is by token or by sequence, as in the loss. `logprob_diff_*` cover `fresh` tokens
    only: older parameters sampled the others, so their difference is staleness."""
    mask = (batch.weights > 0).astype(jnp.float32)
    fresh = mask * batch.fresh
    gap = fresh * jnp.abs(_log_ratio(logprobs, batch))
    return {
        "clip_fraction": (mask * outside).sum(),
        "ratio": (mask * jnp.exp(log_ratio)).sum(),
        "ratio_drift": (mask * jnp.abs(log_ratio)).sum(),
        "logprob_diff_mean": gap.sum(),
        "logprob_diff_max": gap.max(),
        "fresh": fresh.sum(),
    }


def likelihood_loss(logprobs: Float[Array, "R T"], batch: PackedBatch) -> tuple[Array, Metrics]:
    """Negative log-likelihood, weighted by token (the supervised cold start).

    Metrics: `full` counts the tokens of full weight; `likely` counts the tokens of full weight with
    a probability above 0.5. The accuracy is `likely` / `full`.
    """
    full = (batch.weights > 0.99 * batch.weights.max()).astype(jnp.float32)
    metrics = {
        "likely": (full * (logprobs > jnp.log(0.5))).sum(),
        "full": full.sum(),
    }
    return -(batch.weights * logprobs).sum(), metrics
