"""How noisy the worth of a search is: by forks, and by independent samples of as many tokens.

By a fork: the reward of a trajectory minus that of its own fork. By independent samples: the reward
of a trajectory minus that of the fork of another sample of the question, which has nothing in
common with it, and whose tokens before the search have to be sampled too.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
from jaxtyping import Float

from r1s_jax.config import MOST_FORKS, Config, Fork
from r1s_jax.data.environment import open_environment
from r1s_jax.models.pretrained import load_pretrained
from r1s_jax.models.sharding import shard_params
from r1s_jax.protocol.solution import R1_SEARCHER
from r1s_jax.rewards.answer_scores import score_answer
from r1s_jax.rollout.engine import Engine, Rolled
from r1s_jax.rollout.trajectory import turn_numbers

_RESAMPLES = 2000


def bench_forks(
    reference: str, config: Config, *, questions: int, samples: int, kind: Fork
) -> list[dict[str, Any]]:
    """For a trajectory's first search, its second, ...: the variances of the worth, by F1.

    `variance_forks` and `variance_independent` are means over questions of the variance within a
    question, the second as if it had the tokens of the first; `ratio` is that of both, with its 95
    % bootstrap `interval` over questions.
    """
    policy = load_pretrained(reference)
    environment = open_environment(config, policy.dialect or R1_SEARCHER)
    batch = environment.evaluation(questions)
    rollout = replace(config.rollout, forks=1.0, fork=kind, forks_per_trajectory=MOST_FORKS)
    engine = Engine(policy, rollout, compute_dtype=np.dtype(config.policy.compute_dtype))
    params = shard_params(policy.params, policy.model, engine.mesh)
    rolled = engine.run(
        params,
        batch.questions,
        samples=samples,
        seed=config.seed,
        step=0,
        retriever=batch.retriever,
    )
    return list(_by_search(rolled))


def _by_search(rolled: Rolled) -> Iterator[dict[str, Any]]:
    t, parents = rolled.trajectory, rolled.parents
    assert parents is not None
    pairs = zip(rolled.solutions, rolled.questions, strict=True)
    f1 = np.array([score_answer(s.answer, q.answers).f1 for s, q in pairs])
    tokens, turns = t.loss_mask.sum(1), turn_numbers(t.loss_mask)
    forks = np.flatnonzero(parents >= 0)
    searches = rolled.forked_turns[forks]
    for search in range(searches.max(initial=-1) + 1):
        rows = []
        for group in np.unique(t.groups):
            own = forks[(searches == search) & (t.groups[forks] == group)]
            if len(own) < 2:
                continue
            trunks = parents[own]
            before = ((turns[trunks] >= 0) & (turns[trunks] <= search)).sum(1).mean()
            written = (tokens[trunks] + tokens[own]).mean()
            gap = f1[trunks] - f1[own]
            independent = np.var(f1[trunks], ddof=1) + np.var(f1[own], ddof=1)
            more = (written + before) / written
            rows.append((np.var(gap, ddof=1), independent * more, more, gap.mean()))
        if rows:
            yield {"search": search + 1, **_summary(np.array(rows))}


def _summary(rows: Float[np.ndarray, "Q 4"]) -> dict[str, Any]:
    draws = np.random.default_rng(0).integers(0, len(rows), (_RESAMPLES, len(rows)))
    means = rows[draws, :2].mean(1)
    low, high = np.percentile(means[:, 0] / np.maximum(means[:, 1], 1e-12), [2.5, 97.5])
    forked, independent, more, worth = rows.mean(0)
    return {
        "questions": len(rows),
        "search_worth": round(float(worth), 3),
        "variance_forks": round(float(forked), 4),
        "variance_independent": round(float(independent), 4),
        "tokens_ratio": round(float(more), 2),
        "ratio": round(float(forked / max(independent, 1e-12)), 2),
        "interval": [round(float(low), 2), round(float(high), 2)],
    }
