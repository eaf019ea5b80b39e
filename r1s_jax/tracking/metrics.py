"""The metrics of a step, and the rows of its traces."""

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np

from r1s_jax.data.traces import ForkRow, SearchRow, TraceRow
from r1s_jax.learning.collect import Rewarded
from r1s_jax.learning.policy_gradient import Learned
from r1s_jax.rollout.broker import FAILED
from r1s_jax.rollout.engine import Rolled
from r1s_jax.rollout.trajectory import Finish, Trajectory
from r1s_jax.system.profiling import Compilations, host_memory_gib, model_flops_utilization
from r1s_jax.tracking.behaviour import behaviour_metrics

# Parts of the names of columns that depend on time, so that they differ between equal runs. Rows go
# on during a search of others, so the number of decode steps depends on the search's duration.
_TIMED = ("seconds", "_per_s", "compilations", "host_memory", "mfu", "seal")
_TIMED += ("decode_steps", "prefill_chunks", "slots_busy")
# Names in `metrics.jsonl` of parts of a reward, where they differ.
_PART_NAMES = {"format": "format_valid"}


def rollout_metrics(batch: Rewarded) -> dict[str, float]:
    """Rewards and their parts, searches and lengths of one rollout batch (means over it)."""
    rolled, rewards, t = batch.rolled, batch.rewards, batch.rolled.trajectory
    judged = [r for r in rewards if not math.isnan(r.value)]
    values = np.array([r.value for r in judged])
    taught = len(np.unique(t.groups[batch.teaches]))
    outcomes = rolled.outcomes
    counters = {k: n for k, n in rolled.counters.items() if not k.startswith("forks")}
    failed = sum(outcomes.get(name, 0) for name in FAILED)
    waits = [s.seconds for searches in rolled.searches for s in searches]
    parts = {
        _PART_NAMES.get(name, name): float(np.mean([r.parts[name] for r in judged]))
        for name in rewards[0].parts
    }
    return {
        "reward": float(values.mean()),
        "reward_std": float(values.std()),
        "groups_without_signal": 1 - taught / len(np.unique(t.groups)),
        "rewards_missing": len(rewards) - len(judged),
        "identical_responses": _identical(rolled),
        **parts,
        "searches": int(t.searches.sum()),
        "searches_per_question": float(t.searches.mean()),
        "searches_empty": outcomes.get("empty", 0),
        "searches_failed": failed,
        "searches_bad_query": outcomes.get("bad_query", 0),
        "searches_long_query": outcomes.get("long_query", 0),
        "searches_invalid_turn": outcomes.get("invalid_turn", 0),
        "search_seconds_mean": float(np.mean(waits)) if waits else 0.0,
        "response_length": float(t.loss_mask.sum(-1).mean()),
        "trajectory_length": float(t.lengths.mean()),
        "sampled_tokens": rolled.sampled_tokens,
        "sampled_tokens_per_s": rolled.sampled_tokens / rolled.seconds,
        **{f"{name}_per_s": n / rolled.seconds for name, n in counters.items()},
        **counters,
        "slots_busy": rolled.slots_busy,
        **behaviour_metrics(rolled, rewards),
        **_ages(rolled),
        **{f"finish_{name}": share for name, share in _finish_shares(t.finish).items()},
    }


def fork_metrics(batch: Rewarded) -> dict[str, float]:
    """With forks: how many there are, their tokens, and what searches were worth (means)."""
    rolled, worth = batch.rolled, batch.worth[batch.rolled.trunks]
    if rolled.parents is None:
        return {}
    own = rolled.trajectory.loss_mask[~rolled.trunks]
    means = {
        f"search_worth_{number + 1}": float(values[~np.isnan(values)].mean())
        for number, values in enumerate(worth.T)
        if not np.isnan(values).all()
    }
    known = worth[~np.isnan(worth)]
    return {
        "forks": len(own),
        "forks_left_out": rolled.counters["forks_left_out"],
        "forks_without_room": int((~own.any(-1)).sum()),
        "fork_tokens": int(own.sum()),
        **({"search_worth": float(known.mean())} if known.size else {}),
        **means,
    }


def _ages(rolled: Rolled) -> dict[str, float]:
    """With partial rollouts: the shares of tokens by staleness in steps."""
    if rolled.ages is None:
        return {}
    ages = rolled.ages[rolled.trajectory.loss_mask]
    shares = np.bincount(ages) / max(len(ages), 1)
    return {
        "partial_trajectories": rolled.carried,
        "token_age_mean": float(ages.mean()) if len(ages) else 0.0,
        **{f"token_age_{age}": float(share) for age, share in enumerate(shares)},
    }


def update_metrics(learned: Learned, seconds: float) -> dict[str, float]:
    """Means over the updates of a step of the metrics of learner and loss.

    `ratio_drift` is from the last update: how far the updates before it moved the policy.
    """
    tokens = sum(u["tokens"] for u in learned.updates)
    names = [name for name in learned.updates[0] if name != "tokens"]
    row = {name: float(np.mean([u[name] for u in learned.updates])) for name in names}
    row |= {name: learned.updates[-1][name] for name in names if name == "ratio_drift"}
    return {
        **row,
        **learned.logprob_diff,
        **learned.credit,
        "kl": learned.kl or 0.0,
        "importance_weight": learned.importance_weight,
        "trained_tokens": tokens,
        "trained_tokens_per_s": tokens / seconds,
    }


class StepClock:
    """Measures the time that a run's steps take, their compilations and the host's memory."""

    def __init__(self) -> None:
        names = ["collect", "update", "digests", "checkpoint"]
        self.seconds = dict.fromkeys(names, 0.0)  # of the latest of each
        self._compilations = Compilations()

    @contextmanager
    def time(self, phase: str) -> Iterator[None]:
        """Measures one phase of a step."""
        begin = time.perf_counter()
        yield
        self.seconds[phase] = time.perf_counter() - begin

    def metrics(self, seconds_rollout: float, params: Any, learned_tokens: int) -> dict[str, float]:
        """Metrics of the latest step, whose update took `learned_tokens` tokens."""
        collect, update = self.seconds["collect"], self.seconds["update"]
        share = model_flops_utilization(params, learned_tokens, update)
        return {
            **({} if share is None else {"mfu_update": share}),
            "compilations": self._compilations.take(),
            "host_memory_gib": host_memory_gib(),
            # Until writing the latest one began: it continues during the next step.
            "seconds_checkpoint": self.seconds["checkpoint"],
            "seconds_rollout": seconds_rollout,
            "seconds_reward": collect - seconds_rollout,
            "seconds_update": update,
            "seconds_digests": self.seconds["digests"],
        }


def without_times(row: Mapping[str, Any]) -> dict[str, Any]:
    """The columns of a row of metrics that are the same in every run of one config on one machine.

    Not so health, which may judge times, and the digest of traces, which hold times.
    """
    same = {k: v for k, v in row.items() if k != "health" and not any(t in k for t in _TIMED)}
    if digests := row.get("digests"):
        same["digests"] = {k: v for k, v in digests.items() if k != "traces"}
    return same


def headline(row: dict[str, Any]) -> str:
    """The main metrics of a step in one line."""
    return (
        f"reward {row['reward']:+.2f}  f1 {row['answer_f1']:.2f}  "
        f"searches {row['searches_per_question']:.2f}  {row['sampled_tokens_per_s']:.0f} tok/s"
    )


def trace_rows(
    batch: Rewarded,
    learned: Learned,
    count: int,
    token_texts: Callable[[Trajectory[np.ndarray], int], list[str]],
) -> Iterator[TraceRow]:
    """The rows of `traces.jsonl` of a step: `count` trajectories, spread over the batch.

    Trajectories without a reward (no verdict of the judge) are left out; forks stand with their
    trajectories. `token_texts` returns the text of each token that the policy wrote (see Engine).
    """
    rolled, rewards = batch.rolled, batch.rewards
    trunks = np.flatnonzero(rolled.trunks).tolist()
    rows = [i for i in trunks if not math.isnan(rewards[i].value)]
    # Learned from are all rows, or the trajectories alone.
    alone = len(learned.advantages) < len(rewards)
    learned_row = np.cumsum(rolled.trunks) - 1 if alone else np.arange(len(rewards))
    places = np.linspace(0, len(rows) - 1, min(count, len(rows))).round().astype(int)
    for i in (rows[place] for place in np.unique(places)):
        question, t = rolled.questions[i], rolled.trajectory
        mask = t.loss_mask[i]
        advantages = learned.advantages[learned_row[i]][mask]
        texts = zip(token_texts(t, i), advantages, strict=True)
        kl = [] if learned.token_kl is None else learned.token_kl[learned_row[i]][mask].tolist()
        row = TraceRow(
            question_id=question.id,
            question=question.question,
            answers=list(question.answers),
            reward=rewards[i].value,
            parts=rewards[i].parts,
            advantage=float(advantages.mean()) if mask.any() else 0.0,
            finish=Finish(int(t.finish[i])).name.lower(),
            spans=list(rolled.solutions[i].spans),
            token_advantages=[(text, float(f"{value:.4g}")) for text, value in texts],
            searches=[
                SearchRow(
                    query=s.query,
                    outcome=s.outcome,
                    documents=list(s.documents),
                    seconds=s.seconds,
                )
                for s in rolled.searches[i]
            ],
            prompt_tokens=int(t.prompt_lengths[i]),
            sampled_tokens=int(mask.sum()),
            tokens=int(t.lengths[i]),
        )
        if kl:
            row["token_kl"] = [float(f"{value:.4g}") for value in kl]
        if forks := list(_fork_rows(batch, i)):
            row["forks"] = forks
        yield row


def _fork_rows(batch: Rewarded, row: int) -> Iterator[ForkRow]:
    """The forks of trajectory `row`, in the order of its searches."""
    rolled, t = batch.rolled, batch.rolled.trajectory
    if rolled.parents is None or rolled.with_search is None:
        return
    for fork in np.flatnonzero(rolled.parents == row).tolist():
        yield ForkRow(
            turn=int(rolled.forked_turns[fork]),
            reward=_number(batch.rewards[fork].value),
            finish=Finish(int(t.finish[fork])).name.lower(),
            spans=list(rolled.solutions[fork].spans),
            with_search=bool(rolled.with_search[fork]),
        )


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value


def _finish_shares(finish: np.ndarray) -> dict[str, float]:
    reasons = [reason for reason in Finish if reason != Finish.NONE]
    return {reason.name.lower(): float(np.mean(finish == reason)) for reason in reasons}


def _identical(rolled: Rolled) -> float:
    """Share of responses that another sample of the same question repeats exactly."""
    texts = [
        (int(group), solution.written)
        for group, solution in zip(rolled.trajectory.groups, rolled.solutions, strict=True)
    ]
    times = Counter(texts)
    return float(np.mean([times[text] > 1 for text in texts]))
