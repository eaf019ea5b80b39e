"""The supervised cold start: imitate worked solutions until the policy can speak the protocol."""

from collections.abc import Callable, Sequence

import numpy as np
import optax

from r1s_jax.config import ColdStartConfig
from r1s_jax.environment import Demonstration
from r1s_jax.packing import PackedBatch, pack


def schedule(config: ColdStartConfig) -> optax.Schedule:
    """Linear warm-up, a cosine down to a tenth of the learning rate, which then stays."""
    warmup = min(config.warmup_steps, config.steps - 1)
    return optax.warmup_cosine_decay_schedule(
        0.0, config.learning_rate, warmup, config.steps, end_value=0.1 * config.learning_rate
    )


def finished(config: ColdStartConfig, step: int, accuracy: float) -> bool:
    """Whether the cold start is over after `step` steps with this mean accuracy."""
    return step >= config.steps and (accuracy >= config.accuracy or step >= 3 * config.steps)


def demonstration_batch(
    demonstrations: Sequence[Demonstration],
    encode: Callable[[str], list[int]],
    render: Callable[[str], str],
    *,
    capacity: int,
    micro_rows: int,
) -> tuple[PackedBatch, int]:
    """Packs demonstrations, the loss on what the policy would have written and nothing else.

    Each span is tokenised by itself, as prompts and documents are in a rollout. Returns the batch
    and the number of micro-batches that hold anything.
    """
    rows = [_tokens(d, encode, render) for d in demonstrations]
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
    demonstration: Demonstration, encode: Callable[[str], list[int]], render: Callable[[str], str]
) -> tuple[list[int], list[float]]:
    """Token ids and loss weights of prompt and solution."""
    ids = encode(render(demonstration.question))
    weights = [0.0] * len(ids)
    for text, weight in demonstration.spans:
        span = encode(text)
        ids += span
        weights += [weight] * len(span)
    first = next(i for i, weight in enumerate(weights) if weight)
    weights[first] = demonstration.first_weight
    return ids, weights
