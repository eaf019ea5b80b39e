"""Greedy decoding with drafts from the text itself, beside decoding without them."""

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from r1s_jax.config import MeshConfig, RolloutConfig
from r1s_jax.data.questions import Question
from r1s_jax.models.params import Params
from r1s_jax.models.pretrained import load_pretrained
from r1s_jax.models.sharding import make_mesh, shard_params
from r1s_jax.models.tokenizer import encode_start
from r1s_jax.perf.bench import peak_memory_gb
from r1s_jax.perf.endless import Endless, NothingToFind
from r1s_jax.rollout.engine import Engine, Rolled

DOCUMENTS = (
    "Vienna is the capital of Austria. It lies in the east of the country, on the river Danube, "
    "and about two million people live there. "
    "The Wien is a river of Austria. It is 34 kilometres long, of which 15 are within Vienna, "
    "where it flows into the Danube canal. "
    "The Danube is the second longest river of Europe, after the Volga. It rises in the Black "
    "Forest of Germany and flows into the Black Sea. "
)
_ASK = "Which rivers flow through Vienna? Answer with the sentences of the documents."


def bench_drafts(
    reference: str, *, drafts: int, batch: int, new_tokens: int, repeats: int = 3
) -> dict[str, Any]:
    """Tokens a forward pass and seconds, greedy, of `batch` answers to a prompt with documents.

    `ratio` is the time without drafts over the time with them; `same_tokens` whether both wrote
    the same.
    """
    policy = load_pretrained(reference)
    prompt = DOCUMENTS + "\n\nQuestion: {question}\n\nAnswer:"
    policy = policy._replace(eos_ids=(-1,), dialect=Endless(prompt=prompt))
    params = shard_params(policy.params, policy.model, make_mesh(MeshConfig()))
    asked = [Question(i, f"{_ASK}{'!' * i}", ("",)) for i in range(batch)]
    longest = prompt.replace("{question}", asked[-1].question)
    length = len(encode_start(policy.tokenizer, longest))
    runs = {
        count: _runner(Engine(policy, _config(count, batch, length, new_tokens)), params, asked)
        for count in (0, drafts)
    }
    times: dict[int, list[float]] = {count: [] for count in runs}
    rolled: dict[int, Rolled] = {count: run() for count, run in runs.items()}  # compiles
    for _ in range(repeats):
        for count, run in runs.items():
            begin = time.perf_counter()
            run()
            times[count].append(time.perf_counter() - begin)
    steps = {count: r.counters["decode_steps"] for count, r in rolled.items()}
    best = {count: min(values) for count, values in times.items()}
    without, with_drafts = rolled[0].trajectory.tokens, rolled[drafts]
    passes = with_drafts.slots_busy * batch * steps[drafts]  # of each trajectory by itself
    return {
        "drafts": drafts,
        "batch": batch,
        "tokens_per_step": with_drafts.sampled_tokens / passes,
        "decode_steps": steps[drafts],
        "same_tokens": bool(np.array_equal(without, with_drafts.trajectory.tokens)),
        "seconds": best[drafts],
        "seconds_without": best[0],
        "ratio": best[0] / best[drafts],
        "peak_memory_gb": peak_memory_gb(),
    }


def _runner(engine: Engine, params: Params, asked: list[Question]) -> Callable[[], Rolled]:
    def run() -> Rolled:
        return engine.run(params, asked, samples=1, seed=0, step=0, retriever=NothingToFind())

    return run


def _config(drafts: int, batch: int, prompt: int, new_tokens: int) -> RolloutConfig:
    return RolloutConfig(
        slots=batch,
        temperature=0.0,
        max_length=prompt + new_tokens,
        max_prompt_length=prompt,
        max_turn_length=new_tokens,
        prefill_rows=1,
        drafts=drafts,
    )
