"""Rollouts against a retriever of a given latency."""

import time
from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar

import numpy as np

from benchmarks.common import peak_memory_gb
from r1s_jax.config import RolloutConfig
from r1s_jax.data.questions import Question
from r1s_jax.models.pretrained import load_pretrained
from r1s_jax.models.sharding import shard_params
from r1s_jax.protocol.dialect import Call
from r1s_jax.protocol.r1_searcher import R1Searcher
from r1s_jax.retrieval.api import Hit
from r1s_jax.rollout.engine import Engine


class _EveryLine(R1Searcher):
    """A dialect in which every line is a query, because an untrained policy never writes a tag."""

    query_end: ClassVar = "\n"

    def calls(self, turn: str, evaluation: bool = False) -> list[Call]:
        return [Call(turn.strip() or "an empty line")]


class _SleepyRetriever:
    """Returns the same passage for every query after `latency_s` seconds."""

    def __init__(self, latency_s: float):
        self.latency_s = latency_s

    def search(self, queries: Sequence[str], k: int) -> list[list[Hit]]:
        time.sleep(self.latency_s)
        return [[Hit("0", 1.0, "Passage   " + "A line of the passage. " * 12)] * k for _ in queries]


def bench_rollout(
    reference: str, *, latency_ms: float, slots: int = 16, questions: int = 12, samples: int = 4
) -> dict[str, Any]:
    """Rollouts against a retriever that sleeps `latency_ms`.

    The policy need not know the tags of a dialect: each line that it writes is a query.
    """
    p = load_pretrained(reference)
    config = RolloutConfig(
        slots=slots,
        top_p=1.0,
        max_length=640,
        max_prompt_length=192,
        max_turn_length=96,
        max_searches=3,
        documents_per_query=1,
        max_documents_length=160,
        prefill_rows=1,
        prefill_chunk=96,
    )
    engine = Engine(p._replace(dialect=_EveryLine()), config, compute_dtype=np.dtype("float32"))
    params = shard_params(p.params, p.model, engine.mesh)
    batch = [Question(i, f"Which of {i} and {i + 1} is even?", ("",)) for i in range(questions)]
    run = partial(engine.run, params, batch, samples=samples, seed=0, step=0)
    run(retriever=_SleepyRetriever(0.0))  # compiles
    rolled = run(retriever=_SleepyRetriever(latency_ms / 1000))
    return {
        "sampled_tokens_per_s": rolled.sampled_tokens / rolled.seconds,
        "searches": int(rolled.trajectory.searches.sum()),
        "sampled_tokens": rolled.sampled_tokens,
        "seconds": rolled.seconds,
        "latency_ms": latency_ms,
        "slots": slots,
        "peak_memory_gb": peak_memory_gb(),
    }
