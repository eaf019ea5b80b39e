"""The supervised cold start: imitate worked solutions until the policy can speak the protocol."""

from collections.abc import Callable, Sequence

import numpy as np

from r1s_jax.config import ColdStartConfig
from r1s_jax.data.demonstrations import Demonstration
from r1s_jax.learning.packing import PackedBatch, pack
from r1s_jax.protocol import r1_searcher as protocol


def learning_rate_scale(config: ColdStartConfig, step: int, cooldown_from: int | None) -> float:
    """Share of the learning rate at a step: warm-up, constant, then down to a tenth.

    `cooldown_from` is the step at which the policy could read well enough, None before.
    """
    warm = min(1.0, (step + 1) / max(config.warmup_steps, 1))
    if cooldown_from is None:
        return warm
    return warm * (1.0 - 0.9 * min(1.0, (step - cooldown_from) / max(config.cooldown_steps, 1)))


def cooldown_begins(config: ColdStartConfig, step: int, accuracy: float) -> bool:
    """Whether the learning rate should fall from `step` on, given the mean accuracy so far."""
    return accuracy >= config.accuracy or step >= config.steps - config.cooldown_steps


def cold_start_end(config: ColdStartConfig, cooldown_from: int | None) -> int:
    """The step before which the cold start ends: never later than `config.steps`."""
    if cooldown_from is None:
        return config.steps
    return min(cooldown_from + config.cooldown_steps, config.steps)


def demonstration_batch(
    demonstrations: Sequence[Demonstration],
    encode: Callable[[str], list[int]],
    render: Callable[[str], str],
    document_tokens: Callable[[Sequence[str]], list[int]],
    *,
    capacity: int,
    micro_rows: int,
) -> tuple[PackedBatch, int]:
    """Packs demonstrations, the loss on what the policy would have written and nothing else.

    Each span is tokenised by itself, as prompts and documents are in a rollout; a document block
    goes through `document_tokens`, which leaves of its passage lines what a rollout would show.
    What is longer than `capacity` loses its end. Returns the batch and the number of micro-batches
    that hold anything.
    """
    rows = [_tokens(d, encode, render, document_tokens) for d in demonstrations]
    rows = [(ids[:capacity], weights[:capacity]) for ids, weights in rows]
    lengths = np.array([len(tokens) for tokens, _ in rows])
    tokens = np.zeros((len(rows), lengths.max()), np.int32)
    weights = np.zeros(tokens.shape, np.float32)
    for i, (ids, trained) in enumerate(rows):
        tokens[i, : len(ids)], weights[i, : len(ids)] = ids, trained
    weights /= weights.sum()
    unused = np.zeros_like(weights)
    batch, _, micro = pack(
        tokens, lengths, weights, unused, unused, capacity=capacity, micro_rows=micro_rows
    )
    return batch, micro


def _tokens(
    demonstration: Demonstration,
    encode: Callable[[str], list[int]],
    render: Callable[[str], str],
    document_tokens: Callable[[Sequence[str]], list[int]],
) -> tuple[list[int], list[float]]:
    """Token ids and loss weights of prompt and solution."""
    ids = encode(render(demonstration.question))
    weights = [0.0] * len(ids)
    for text, weight in demonstration.spans:
        retrieved = not weight and protocol.BEGIN_DOCUMENTS in text
        span = document_tokens(protocol.documents_of(text)) if retrieved else encode(text)
        ids += span
        weights += [weight] * len(span)
    first = next(i for i, weight in enumerate(weights) if weight)
    weights[first] = demonstration.first_weight
    return ids, weights
