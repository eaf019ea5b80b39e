"""Health signals of a run, checked at every step, each with advice.

A signal is judged on means over the last few steps. A `warning` is printed and written to
`metrics.jsonl` (field `health`); a `fatal` one also stops the run, with a checkpoint.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rich.markup import escape

from r1s_jax.io.errors import UserError
from r1s_jax.system.console import console

Row = dict[str, Any]

_WINDOW = 4  # steps of a mean
# Above this F1, low entropy and identical responses are not a problem.
_GOOD_F1 = 0.5
# Mean |log ratio| of a step's updates: below the first they hardly move the policy, above the
# second they move it too far.
_SETTLED, _FAR = 0.02, 0.2


class UnhealthyRun(UserError, RuntimeError):
    """A run that learns nothing any more; its last checkpoint is kept."""

    def __init__(self, step: int, why: str):
        super().__init__(f"the run was stopped after step {step}: {why}")


class History:
    """The metrics of a run's steps so far, the newest last."""

    def __init__(self, rows: Sequence[Row] = ()):
        self.rows = list(rows)

    def add(self, row: Row) -> "History":
        """Adds a step; returns the history."""
        self.rows.append(row)
        return self

    def recent(self, name: str) -> float:
        """Mean over the last steps; NaN where there are too few."""
        return self._mean(name, self.rows[-_WINDOW:])

    def first(self, name: str) -> float:
        """Mean over the first steps of the run."""
        return self._mean(name, self.rows[:_WINDOW])

    def best(self, name: str) -> float:
        """The highest value of any step so far."""
        return max((row[name] for row in self.rows if name in row), default=math.nan)

    def stage(self) -> "History":
        """Only the steps of the stage that the run is in."""
        return History([row for row in self.rows if row["stage"] == self.rows[-1]["stage"]])

    def _mean(self, name: str, rows: Sequence[Row]) -> float:
        values = [row[name] for row in rows if name in row]
        return sum(values) / len(values) if len(values) == _WINDOW else math.nan


@dataclass(frozen=True)
class Signal:
    """A health signal: its `value`, and the thresholds of a warning and of a fatal signal."""

    name: str
    meaning: str
    value: Callable[[History], float]  # NaN: not judged
    warning: float
    advice: str
    fatal: float = math.inf


def _while_wrong(value: Callable[[History], float]) -> Callable[[History], float]:
    """`value` while most answers are wrong, NaN otherwise."""
    return lambda h: value(h) if h.recent("answer_f1") < _GOOD_F1 else math.nan


def _fallen(name: str, least: float) -> Callable[[History], float]:
    """The share of its best value that a metric lost; NaN if that was below `least`."""

    def value(h: History) -> float:
        best = h.best(name)
        return 1 - h.recent(name) / best if best >= least else math.nan

    return value


def _grown(name: str) -> Callable[[History], float]:
    """A metric's recent mean divided by its first one."""
    return lambda h: h.recent(name) / max(h.first(name), 1e-9)


def _empty_share(h: History) -> float:
    queries = h.recent("searches")
    return (h.recent("searches_empty") + h.recent("searches_failed")) / max(queries, 1e-9)


def _drift(h: History) -> float:
    """Mean drift of the last steps; missing steps count as 0, so one large step fires at once."""
    return sum(row.get("ratio_drift", 0.0) for row in h.rows[-_WINDOW:]) / _WINDOW


def _drift_returns(h: History) -> float:
    """The newest step's drift after drift had settled; NaN where `ratio_drift` fires."""
    settled = any(row.get("ratio_drift", 1.0) < _SETTLED for row in h.rows[:-1])
    return h.rows[-1].get("ratio_drift", math.nan) if settled and _drift(h) < _FAR else math.nan


def _reward_without_f1(h: History) -> float:
    """The rise of the reward in this stage; 0 if F1 rose too."""
    stage = h.stage()
    if len(stage.rows) < 2 * _WINDOW or not stage.rows[-1].get("rewards_answers", True):
        return math.nan
    gained = stage.recent("answer_f1") - stage.first("answer_f1")
    return stage.recent("reward") - stage.first("reward") if gained < 0.01 else 0.0


def _likelihood_lost(h: History) -> float:
    """The fall of right answers' likelihood in this stage; NaN if the reward fell too."""
    stage = h.stage()
    if len(stage.rows) < 2 * _WINDOW:
        return math.nan
    ends = range(_WINDOW, len(stage.rows))
    means = [History(stage.rows[:end]).recent("correct_logprob") for end in ends]
    # Windows with a step without right answers are NaN.
    best = max((mean for mean in means if not math.isnan(mean)), default=math.nan)
    rose = stage.recent("reward") >= stage.first("reward")
    return best - stage.recent("correct_logprob") if rose else math.nan


def _not_finite(h: History) -> float:
    names = ("loss", "grad_norm", "entropy", "reward")
    return float(not all(math.isfinite(h.rows[-1].get(name, 0.0)) for name in names))


SIGNALS = (
    Signal(
        "not_finite",
        "loss, gradient, entropy or reward is infinite or not a number",
        _not_finite,
        1.0,
        "the parameters are lost: go back to an older checkpoint, with a lower "
        "optimizer.learning_rate or policy.compute_dtype=float32",
        fatal=1.0,
    ),
    Signal(
        "entropy_collapse",
        "the policy hardly varies while most answers are wrong (1 / entropy in nats)",
        _while_wrong(lambda h: 1 / max(h.recent("entropy"), 1e-9)),
        50.0,
        "nothing new is tried any more: lower optimizer.learning_rate, raise "
        "algorithm.clip_high (0.28) or algorithm.kl_coefficient",
    ),
    Signal(
        "entropy_explosion",
        "entropy of the policy, relative to the first steps",
        lambda h: _grown("entropy")(h) if h.recent("entropy") > 1.0 else math.nan,
        2.0,
        "the policy turns into noise: lower optimizer.learning_rate, raise "
        "algorithm.kl_coefficient, check the reward",
    ),
    Signal(
        "ratio_drift",
        "mean |log ratio| between the policy after a step's updates and the one that sampled",
        _drift,
        _FAR,
        "the updates of a step move the policy too far: lower optimizer.learning_rate or "
        "algorithm.updates_per_rollout",
    ),
    Signal(
        "drift_returns",
        "mean |log ratio| of one step's updates, after they had settled below "
        f"{_SETTLED}: the first sign of a policy that diverges",
        _drift_returns,
        0.06,
        "updates move the policy far again after it settled: lower optimizer.learning_rate (let it "
        "fall: optimizer.decay_to=0.1) or algorithm.updates_per_rollout",
    ),
    Signal(
        "logprob_diff",
        "mean gap between sampling and training log-probabilities before any update",
        lambda h: h.recent("logprob_diff_mean"),
        0.05,
        "learner and sampler compute different probabilities: set "
        "policy.compute_dtype=float32 (algorithm.tis_cap=2 corrects for a small gap)",
        fatal=1.0,
    ),
    Signal(
        "format_falling",
        "share of well-formed answers lost since its best",
        _fallen("format_valid", 0.3),
        0.4,
        "the policy forgets the protocol: take a reward that punishes broken format (stage2), "
        "lower optimizer.learning_rate",
        fatal=0.98,
    ),
    Signal(
        "no_searches",
        "share of searches a question lost since their most",
        _fallen("searches_per_question", 0.2),
        0.9,
        "the policy stopped searching: run stage 1 first (or longer), and look at the documents in "
        "`r1s traces`: useless ones are not worth a search",
    ),
    Signal(
        "search_limit",
        "share of trajectories that end at the limit of searches",
        lambda h: h.recent("finish_search_limit"),
        0.3,
        "the policy searches without end: check that the reward does not pay for searching alone, "
        "or raise rollout.max_searches",
    ),
    Signal(
        "empty_documents",
        "share of searches without documents",
        _empty_share,
        0.1,
        "the policy learns from missing documents: check the retriever and its index",
    ),
    Signal(
        "identical_responses",
        "share of responses that occur twice in their group while most answers are wrong",
        _while_wrong(lambda h: h.recent("identical_responses")),
        0.9,
        "groups of identical responses teach nothing: raise rollout.temperature, lower "
        "optimizer.learning_rate",
    ),
    Signal(
        "reward_without_f1",
        "rise of the reward in this stage while answers became no better",
        _reward_without_f1,
        0.2,
        "the policy may exploit the reward: read its best trajectories with "
        "`r1s traces RUN --min-reward 1`",
    ),
    Signal(
        "likelihood_displaced",
        "nats a token by which right answers are below their best likelihood while the reward does "
        "not fall (arXiv 2512.04220)",
        _likelihood_lost,
        0.5,
        "an early sign of a collapse: set algorithm.llds_coefficient=0.2, lower "
        "optimizer.learning_rate or algorithm.updates_per_rollout, or take "
        "algorithm.estimator=reinforce_baseline",
    ),
    Signal(
        "thoughts_vanish",
        "share of reasoning words a turn lost since their most (arXiv 2602.19526)",
        _fallen("thought_words", 3.0),
        0.8,
        "the policy stops reasoning between its searches: take a reward that asks for the format "
        "(stage2), lower optimizer.learning_rate or raise algorithm.kl_coefficient",
    ),
    Signal(
        "answers_avoided",
        "share of trajectories with an answer lost since its best (arXiv 2602.19526)",
        _fallen("answered", 0.3),
        0.4,
        "the policy learns not to answer: check that no reward is better than a wrong answer's, "
        "or set algorithm.mask_unanswered=true",
    ),
    Signal(
        "repeated_queries",
        "share of searches that a trajectory had made before",
        lambda h: h.recent("repeated_query_share"),
        0.3,
        "the policy repeats its queries: add -0.1*repeated_queries to the reward, and look "
        "at the documents in `r1s traces`",
    ),
    Signal(
        "truncated",
        "share of trajectories cut off by a limit of tokens, searches or staleness",
        lambda h: h.recent("truncated"),
        0.5,
        "most trajectories of a batch are incomplete: raise rollout.max_length or "
        "rollout.max_turn_length, or set algorithm.mask_truncated=true",
    ),
    Signal(
        "no_signal",
        "share of groups whose rewards are all equal, while most answers are wrong",
        _while_wrong(lambda h: h.recent("groups_without_signal")),
        0.95,
        "groups of equal rewards teach nothing: take easier questions (r1s data select), more "
        "algorithm.samples_per_question, or algorithm.dynamic_sampling",
    ),
    Signal(
        "length_blow_up",
        "length of responses, relative to the first steps",
        _grown("response_length"),
        3.0,
        "longer is not better here: check finish_length in metrics.jsonl, lower "
        "rollout.max_turn_length, or take algorithm.loss_average=token",
    ),
)


def check(history: History) -> list[dict[str, Any]]:
    """The signals that fire after the newest step: `signal`, `level`, `value`, `advice`."""
    fired = []
    for signal in SIGNALS:
        value = signal.value(history)
        if value >= signal.warning:
            fired.append(
                {
                    "signal": signal.name,
                    "level": "fatal" if value >= signal.fatal else "warning",
                    "value": value,
                    "advice": signal.advice,
                }
            )
    return fired


def is_fatal(row: Row) -> bool:
    """Whether a signal of this step should end the run."""
    return any(fired["level"] == "fatal" for fired in row["health"])


def is_lost(row: Row) -> bool:
    """Whether the parameters after this step are not finite."""
    return any(fired["signal"] == "not_finite" for fired in row["health"])


def announce(history: History) -> str:
    """Prints signals that are new in the newest step; returns the text of a fatal one, or ""."""
    row, fatal = history.rows[-1], ""
    before = history.rows[-2].get("health", []) if len(history.rows) > 1 else []
    shown = {(fired["signal"], fired["level"]) for fired in before}
    for fired in row["health"]:
        text = f"{fired['signal']} ({fired['value']:.3g}): {fired['advice']}"
        if (fired["signal"], fired["level"]) not in shown:
            console.print(f"[yellow]{fired['level']}:[/] step {row['step']}: {escape(text)}")
        if fired["level"] == "fatal":
            fatal = fatal or text
    return fatal
