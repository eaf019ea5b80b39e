"""The supervised cold start: imitates demonstrations until the policy can follow the protocol."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated

import msgspec
import numpy as np

from r1s_jax.config import ColdStartConfig, Config, ConfigError
from r1s_jax.data.demonstrations import Demonstration
from r1s_jax.data.environment import Environment
from r1s_jax.learning.learner import Learner, LearnerState
from r1s_jax.learning.micro_batch_rows import micro_batch_rows
from r1s_jax.learning.packing import PackedBatch, pack, row_length
from r1s_jax.models.sharding import batch_shards
from r1s_jax.protocol.dialect import Dialect
from r1s_jax.protocol.solution import R1_SEARCHER
from r1s_jax.rollout.engine import Engine
from r1s_jax.system.console import make_progress


@dataclass
class Standing:
    """The progress of a cold start."""

    step: Annotated[int, msgspec.Meta(ge=0, lt=2**31)] = 0
    accuracy: float = 0.0  # share of demonstrated tokens predicted, a running mean
    cooldown_from: int | None = None  # the step at which the cooldown began


def imitate(
    config: ColdStartConfig,
    learner: Learner,
    state: LearnerState,
    at: Standing,
    batch_of: Callable[[int], tuple[PackedBatch[np.ndarray], int]],
    after_step: Callable[[LearnerState, dict[str, float]], bool],
) -> LearnerState:
    """Runs the cold start from `at` to its end; updates `at` after every step.

    `batch_of` returns the packed demonstrations of a step and their number of micro-batches.
    `after_step` receives the state and the step's row of metrics, and returns whether to stop.
    Donates `state`.
    """
    with make_progress() as bar:
        task = bar.add_task(
            "Cold start",
            total=config.steps,
            completed=at.step,
            info="",
            visible=config.steps > 0,
        )
        while at.step < cold_start_end(config, at.cooldown_from):
            if at.cooldown_from is None and cooldown_begins(config, at.step, at.accuracy):
                at.cooldown_from = at.step
            scale = learning_rate_scale(config, at.step, at.cooldown_from)
            state, row = learner.update(state, *batch_of(at.step), scale)
            row["accuracy"] = row.pop("likely") / max(row.pop("full"), 1e-9)
            at.accuracy = 0.9 * at.accuracy + 0.1 * row["accuracy"]
            at.step += 1
            end = cold_start_end(config, at.cooldown_from)
            info = f"loss {row['loss']:.3f}  accuracy {at.accuracy:.3f}"
            bar.update(task, advance=1, total=end, info=info)
            if after_step(state, {"step": at.step, **row}):
                break
    return state


def demonstrations_of(
    config: Config,
    environment: Environment,
    engine: Engine,
    learner: Learner,
    state: LearnerState,
) -> Callable[[int], tuple[PackedBatch[np.ndarray], int]]:
    """Returns a function from a step to its demonstrations, packed like the rollouts of the run."""
    rows = 1
    if config.cold_start.steps:
        rows = micro_batch_rows(config, learner, state, config.cold_start.batch_size)

    def batch_of(step: int) -> tuple[PackedBatch[np.ndarray], int]:
        return demonstration_batch(
            environment.demonstrations(step, config.cold_start.batch_size),
            engine.encode,
            engine.prompt_tokens,
            engine.document_tokens,
            dialect=engine.dialect,
            capacity=row_length(config),
            micro_batch_rows=rows * batch_shards(engine.mesh),
        )

    return batch_of


def learning_rate_scale(config: ColdStartConfig, step: int, cooldown_from: int | None) -> float:
    """Share of the learning rate at a step: warm-up, constant, then down to a tenth.

    `cooldown_from` is the step at which the cooldown began; None before.
    """
    warm = min(1.0, (step + 1) / max(config.warmup_steps, 1))
    if cooldown_from is None:
        return warm
    return warm * (1.0 - 0.9 * min(1.0, (step - cooldown_from) / max(config.cooldown_steps, 1)))


def cooldown_begins(config: ColdStartConfig, step: int, accuracy: float) -> bool:
    """Whether the cooldown begins at `step`, given the running mean of accuracy."""
    return accuracy >= config.accuracy or step >= config.steps - config.cooldown_steps


def cold_start_end(config: ColdStartConfig, cooldown_from: int | None) -> int:
    """The number of steps of the cold start: at most `config.steps`."""
    if cooldown_from is None:
        return config.steps
    return min(cooldown_from + config.cooldown_steps, config.steps)


def demonstration_batch(
    demonstrations: Sequence[Demonstration],
    encode: Callable[[str], list[int]],
    prompt_tokens: Callable[[str], list[int]],
    document_tokens: Callable[[Sequence[str]], list[int]],
    *,
    capacity: int,
    micro_batch_rows: int,
    dialect: Dialect = R1_SEARCHER,
) -> tuple[PackedBatch[np.ndarray], int]:
    """Packs demonstrations, with loss only on the text that the policy would write.

    Each span is tokenised by itself, as prompts and documents are in a rollout; `document_tokens`
    cuts a document block as a rollout does. Sequences are cut to `capacity` tokens. Returns the
    batch and the number of micro-batches that are not empty. Raises ConfigError where no token
    within `capacity` is trained.
    """
    rows = [_tokens(d, encode, prompt_tokens, document_tokens, dialect) for d in demonstrations]
    rows = [(ids[:capacity], weights[:capacity]) for ids, weights in rows]
    lengths = np.array([len(tokens) for tokens, _ in rows])
    tokens = np.zeros((len(rows), lengths.max()), np.int32)
    weights = np.zeros(tokens.shape, np.float32)
    for i, (ids, trained) in enumerate(rows):
        tokens[i, : len(ids)], weights[i, : len(ids)] = ids, trained
    if not (total := weights.sum()):
        raise ConfigError(
            f"no demonstration has anything to learn within {capacity} tokens: raise "
            "rollout.max_length (or optimizer.pack_length)"
        )
    weights /= total
    unused = np.zeros_like(weights)
    batch, _, micro = pack(
        tokens,
        lengths,
        weights,
        unused,
        unused,
        capacity=capacity,
        micro_batch_rows=micro_batch_rows,
    )
    return batch, micro


def _tokens(
    demonstration: Demonstration,
    encode: Callable[[str], list[int]],
    prompt_tokens: Callable[[str], list[int]],
    document_tokens: Callable[[Sequence[str]], list[int]],
    dialect: Dialect,
) -> tuple[list[int], list[float]]:
    """Token ids and loss weights of prompt and solution."""
    ids = list(prompt_tokens(demonstration.question))
    weights = [0.0] * len(ids)
    for text, weight in demonstration.spans:
        documents = None if weight else dialect.documents_of(text)
        span = encode(text) if documents is None else document_tokens(documents)
        ids += span
        weights += [weight] * len(span)
    first = next(i for i, weight in enumerate(weights) if weight)
    weights[first] = demonstration.first_weight
    return ids, weights
