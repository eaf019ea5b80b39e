"""How noisy the worth of a search is: by forks, and by independent samples of as many tokens.

By forks: the mean reward of `rollout.fork_draws` draws of what follows a search, minus that of as
many draws without it. All begin alike, and what they share is sampled once. By independent samples:
the same means over samples of the question that have nothing in common, each with tokens of its own
before the search, and as many draws as the tokens of the forks would pay for.
"""

from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass, replace
from typing import Any

import numpy as np

from r1s_jax.config import MOST_FORKS, Config, Fork
from r1s_jax.data.environment import open_environment
from r1s_jax.io.errors import UserError
from r1s_jax.models.pretrained import load_pretrained
from r1s_jax.models.sharding import shard_params
from r1s_jax.protocol.solution import R1_SEARCHER
from r1s_jax.rewards.answer_scores import score_answer
from r1s_jax.rollout.engine import Engine, Rolled
from r1s_jax.rollout.trajectory import turn_numbers

_RESAMPLES = 2000


def bench_forks(
    reference: str, config: Config, *, questions: int, samples: int, kind: Fork, draws: int
) -> list[dict[str, Any]]:
    """For `all` searches and for the first, second, ...: variances of the worth, by F1.

    `variance_forks` is that of the worth of a given search, the mean over all searches;
    `variance_independent` that of the difference of independent samples of a question, the mean
    over questions. `draws_independent` is how many draws their tokens pay for. `ratio` is that of
    both variances, with its 95 % bootstrap `interval` over questions.
    """
    policy = load_pretrained(reference)
    environment = open_environment(config, policy.dialect or R1_SEARCHER)
    batch = environment.evaluation(questions)
    most = min(config.rollout.max_searches, MOST_FORKS)
    forks = {"forks": 1.0, "fork": kind, "forks_per_trajectory": most, "fork_draws": draws}
    rollout = replace(config.rollout, **forks)
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
    searches = list(_searches(rolled))
    if not searches:
        raise UserError(f"{reference} makes no searches, so that there is nothing to fork")
    names: list[int | str] = ["all", *sorted({one.search for one in searches})]
    return [
        {"search": name, **_summary([one for one in searches if name in ("all", one.search)])}
        for name in names
    ]


@dataclass(frozen=True)
class _Search:
    """The n-th search of the samples of a question."""

    search: int
    group: int
    forks: float  # variance of its worth by forks
    independent: float  # by independent samples of as many tokens
    draws: float  # which these tokens pay for
    worth: float


def _searches(rolled: Rolled) -> Iterator[_Search]:
    """Every search that two samples of its question made."""
    t, parents, made = rolled.trajectory, rolled.parents, rolled.with_search
    assert parents is not None and made is not None
    pairs = zip(rolled.solutions, rolled.questions, strict=True)
    f1 = np.array([score_answer(s.answer, q.answers).f1 for s, q in pairs])
    tokens, turns = t.loss_mask.sum(1), turn_numbers(t.loss_mask)
    searches: dict[tuple[int, int], dict[int, list[int]]] = {}
    for fork in np.flatnonzero(parents >= 0).tolist():
        at = int(rolled.forked_turns[fork]), int(t.groups[fork])
        searches.setdefault(at, {}).setdefault(int(parents[fork]), []).append(fork)
    for (turn, group), trunks in searches.items():
        if len(trunks) < 2:
            continue
        own, forks = np.array(list(trunks)), np.array(list(trunks.values()))
        again = made[forks[0]]
        with_search = np.concatenate([own[:, None], forks[:, again]], axis=1)
        without, draws = forks[:, ~again], with_search.shape[1]
        before = ((turns[own] >= 0) & (turns[own] <= turn)).sum(1).mean()
        written = (tokens[own] + tokens[forks].sum(1)).mean()
        paid = written / (2 * before + (written - before) / draws)
        apart = sum(np.var(f1[rows], axis=0, ddof=1).mean() for rows in (with_search, without))
        gaps = f1[with_search] - f1[without]
        noise = np.var(gaps, axis=1, ddof=1).mean() / draws
        yield _Search(turn + 1, group, noise, apart / paid, paid, gaps.mean())


def _summary(searches: Sequence[_Search]) -> dict[str, Any]:
    groups, places = np.unique([one.group for one in searches], return_inverse=True)
    columns = np.array([astuple(one)[2:] for one in searches])
    sums = np.zeros((len(groups), columns.shape[1]))
    np.add.at(sums, places, columns)
    draws = np.random.default_rng(0).integers(0, len(groups), (_RESAMPLES, len(groups)))
    totals = sums[draws].sum(1)
    low, high = np.percentile(totals[:, 0] / np.maximum(totals[:, 1], 1e-12), [2.5, 97.5])
    forks, independent, paid, worth = columns.mean(0)
    return {
        "questions": len(groups),
        "search_worth": round(float(worth), 3),
        "variance_forks": round(float(forks), 4),
        "variance_independent": round(float(independent), 4),
        "draws_independent": round(float(paid), 2),
        "ratio": round(float(forks / max(independent, 1e-12)), 2),
        "interval": [round(float(low), 2), round(float(high), 2)],
    }
