"""Decode steps of a rollout whose trajectories have given lengths.

A tiny random policy that never ends by itself is cut off at each trajectory's length. This measures
the rollout loop, the use of its slots, and the cost of waiting for the longest trajectories.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.endless import Endless, NothingToFind
from r1s_jax.config import (
    AlgorithmConfig,
    Config,
    ModelConfig,
    PolicyConfig,
    RolloutConfig,
    StageConfig,
    TinyWorldConfig,
)
from r1s_jax.data.environment import Batch
from r1s_jax.data.questions import Question
from r1s_jax.data.tiny_world import build_tokenizer
from r1s_jax.data.traces import read_traces
from r1s_jax.io.errors import ConfigError
from r1s_jax.io.json import decode
from r1s_jax.learning.partial_rollouts import PartialRollouts
from r1s_jax.models.params import Params, init_params
from r1s_jax.models.pretrained import Pretrained
from r1s_jax.models.sharding import shard_params
from r1s_jax.models.tokenizer import encode
from r1s_jax.rollout.engine import Engine, Rolled
from r1s_jax.rollout.in_flight import InFlight
from r1s_jax.rollout.trajectory import Finish
from r1s_jax.system.console import make_progress

_SAMPLES = 16
_PROMPT = 16
_MODEL = ModelConfig(156, 16, 16, 1, 1, 1, 8)


class _Questions(NothingToFind):
    """An environment of questions without answers or documents."""

    def batch(self, step: int, size: int, draw: int = 0) -> Batch:
        first = (2 * step + draw) * size
        return Batch([Question(first + i, "Who ?", ("",)) for i in range(size)], self)

    def retriever_of(self, step: int, draw: int) -> "_Questions":
        return self


class _Cut(Engine):
    """An engine that cuts every trajectory off at the length drawn for it."""

    def __init__(
        self, *args: Any, lengths: np.ndarray, runaway: float, longest: int, **kwargs: Any
    ):
        super().__init__(*args, **kwargs)
        self._lengths, self._runaway, self._longest = lengths, runaway, longest

    def limit(self, flight: InFlight) -> int:
        rng = np.random.default_rng((flight.question.id, flight.sample))
        length = self._longest if rng.random() < self._runaway else int(rng.choice(self._lengths))
        return flight.prompt_length + min(length, self._longest)


def bench_lengths(
    lengths: Sequence[int],
    *,
    runaway: float,
    limit: int = 2048,
    partial_rollouts: bool,
    slots: int = 64,
    batch: int = 256,
    batches: int = 8,
) -> dict[str, Any]:
    """Decode steps of `batches` training steps with `batch` trajectories each.

    Lengths are drawn from `lengths`; a share `runaway` of trajectories runs to `limit`. With
    `partial_rollouts`, twice as many trajectories are in flight, and a step ends when `batch` of
    them are complete. Raises ConfigError unless `batch` is a multiple of 16, the samples per
    question.
    """
    if batch % _SAMPLES:
        raise ConfigError(f"--batch must be a multiple of {_SAMPLES}, got {batch}")
    config = _config(slots, batch, limit, partial_rollouts)
    tokenizer = build_tokenizer()
    policy = Pretrained(_MODEL, {}, tokenizer, (-1,), Endless(prompt="{question}"))
    drawn = {"lengths": np.array(lengths), "runaway": runaway, "longest": limit}
    engine = _Cut(policy, config.rollout, compute_dtype=np.dtype("float32"), **drawn)
    params = shard_params(init_params(_MODEL, 0), _MODEL, engine.mesh)
    step = _steps(config, engine, params, batch // _SAMPLES)
    begin, rolled = time.perf_counter(), []
    with make_progress() as bar:
        task = bar.add_task("Batches", total=batches, info="")
        for number in range(batches):
            rolled.append(step(number))
            bar.update(task, advance=1, info=f"{rolled[-1].counters['decode_steps']} decode steps")
    return _summary(rolled, slots, time.perf_counter() - begin) | {
        "slots": slots,
        "batch": batch,
        "batches": batches,
        "runaway": runaway,
        "limit": limit,
        "partial_rollouts": partial_rollouts,
        "mean_length": float(np.mean(lengths)),
    }


def _steps(
    config: Config, engine: Engine, params: Params, questions: int
) -> Callable[[int], Rolled]:
    world: Any = _Questions()  # has only the methods of an environment that this module calls
    if config.rollout.partial_rollouts:
        carried = PartialRollouts(config, engine, world)
        return lambda step: carried.roll(params, step, questions)

    def roll(step: int) -> Rolled:
        return engine.run(
            params,
            world.batch(step, questions).questions,
            samples=_SAMPLES,
            seed=0,
            step=step,
            retriever=world,
        )

    return roll


def _summary(rolled: Sequence[Rolled], slots: int, seconds: float) -> dict[str, Any]:
    steps = [r.counters["decode_steps"] for r in rolled]
    sampled = sum(r.slots_busy * slots * s for r, s in zip(rolled, steps, strict=True))
    return {
        "decode_steps": sum(steps),
        "busy": sampled / (slots * sum(steps)),
        "ideal_steps": math.ceil(sum(r.sampled_tokens for r in rolled) / slots),
        "seconds": seconds,
        "steps_by_batch": steps,
        "cut_off": int(sum((r.trajectory.finish == Finish.TOO_OLD).sum() for r in rolled)),
    }


def _config(slots: int, batch: int, limit: int, partial_rollouts: bool) -> Config:
    stage = StageConfig(steps=1, reward="stage2", questions_per_step=batch // _SAMPLES)
    return Config(
        name="bench",
        policy=PolicyConfig(architecture=_MODEL),
        environment=TinyWorldConfig(),  # required by Config, unused here
        stage1=replace(stage, steps=0),
        stage2=stage,
        rollout=RolloutConfig(
            slots=slots,
            partial_rollouts=partial_rollouts,
            max_length=_PROMPT + limit + 1,
            max_prompt_length=_PROMPT,
            max_turn_length=limit + 1,
            max_documents_length=16,
            prefill_rows=min(slots, 16),
        ),
        algorithm=AlgorithmConfig(samples_per_question=_SAMPLES),
    )


def read_lengths(path: Path, tokenizer: Callable[[], Any]) -> list[int]:
    """The number of tokens that the policy wrote in each trajectory.

    `path` is a text file of these numbers, or traces in a form that `r1s traces` reads, in which
    the policy's tokens are counted. Raises ConfigError for a word that is no integer, an integer
    outside 1 to 1,000,000, and a file without lengths.
    """
    if not path.exists():
        raise ConfigError(f"{path} does not exist: name a file of integers or of traces")
    if path.is_dir() or {".jsonl", ".json"} & set(path.suffixes):
        counting = tokenizer()
        spans = [[text for text, ours in t.spans if ours] for t in read_traces(path)]
        lengths = [sum(len(encode(counting, text)) for text in texts) for texts in spans]
        lengths = [length for length in lengths if length]
    else:
        lengths = list(_integers(path))
    if not lengths:
        raise ConfigError(f"{path} holds no lengths")
    return lengths


def _integers(path: Path) -> Iterator[int]:
    text = decode(path.read_bytes(), path, ConfigError)
    for number, line in enumerate(text.splitlines(), start=1):
        for word in line.split():
            if not (word.isascii() and word.isdigit() and 1 <= int(word[:12]) <= 10**6):
                raise ConfigError(
                    f"{path}, line {number}: expected a number of tokens from 1 to 1000000, "
                    f"found {word[:40]!r}"
                )
            yield int(word)
