"""`r1s replay`: one trajectory of a run again, as it was and with one thing changed."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from r1s_jax.audit.execute import Again, AuditError, again, compared, other_facts
from r1s_jax.config import Config
from r1s_jax.data.traces import Trace
from r1s_jax.io.errors import ConfigError
from r1s_jax.io.json import decode
from r1s_jax.learning.collect import Rewarded
from r1s_jax.learning.learner import LearnerState
from r1s_jax.models.checkpoint import checkpoint_directory
from r1s_jax.models.checkpoint_owner import saved_in
from r1s_jax.protocol.solution import Solution
from r1s_jax.retrieval.api import Hit, Retriever
from r1s_jax.retrieval.references import open_saved_index, read_corpus
from r1s_jax.rewards.rules import Reward
from r1s_jax.rollout.engine import Engine, Rolled
from r1s_jax.rollout.trajectory import Finish
from r1s_jax.system.facts import facts
from r1s_jax.tracking.digests import batch_digests, first_difference
from r1s_jax.tracking.journal import learning_rows
from r1s_jax.tracking.record import RECORD, read_record, starts
from r1s_jax.tracking.run_dir import read_config


@dataclass(frozen=True)
class Change:
    """The one thing that is changed; with none of them the trajectory is only shown again."""

    documents: str = ""  # passages that every search finds
    index: str = ""  # another index that is searched
    without_search: bool = False  # every search finds nothing
    prompt: str = ""  # a file with another prompt
    checkpoint: str = ""  # another checkpoint of the run: its number
    temperature: float | None = None

    def __post_init__(self) -> None:
        if len(self.named) > 1:
            raise ConfigError(
                f"--{' and --'.join(self.named)}: change one thing at a time, so that the "
                "difference has one cause"
            )

    @property
    def named(self) -> list[str]:
        """The option that is given, as a list."""
        values = dataclasses.asdict(self)
        return [n.replace("_", "-") for n, v in values.items() if v not in ("", False, None)]


@dataclass(frozen=True)
class Told:
    """One trajectory and its reward."""

    trace: Trace
    tokens: list[int]
    parts: dict[str, float]


@dataclass(frozen=True)
class Replayed:
    """A trajectory as it was and, if something was changed, as it is then."""

    step: int
    question_id: int
    sample: int
    then: Told
    now: Told | None
    change: str
    notes: list[str]

    @property
    def same(self) -> str:
        """The text that both begin with, after the prompt."""
        if self.now is None:
            return self.then.trace.solution.text
        texts = self.then.trace.solution.text, self.now.trace.solution.text
        pairs = zip(*texts, strict=False)
        count = next((i for i, (a, b) in enumerate(pairs) if a != b), min(map(len, texts)))
        return texts[0][:count]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        told = {"then": self.then} | ({"now": self.now} if self.now else {})
        return {
            "step": self.step,
            "question_id": self.question_id,
            "sample": self.sample,
            "change": self.change,
            "same_characters": len(self.same),
            "notes": self.notes,
            **{name: _as_dict(one) for name, one in told.items()},
        }


def _as_dict(told: Told) -> dict[str, Any]:
    trace = told.trace
    return {
        "question": trace.question,
        "answers": list(trace.answers),
        "reward": trace.reward,
        "parts": told.parts,
        "searches": trace.searches,
        "finish": trace.finish,
        "spans": [list(span) for span in trace.spans],
        "tokens": told.tokens,
    }


def replay(
    run: Path,
    step: int,
    question: str = "",
    sample: int = 0,
    change: Change = Change(),
    progress: Callable[[str], None] = lambda text: None,
) -> Replayed:
    """Executes step `step` again up to its rollout, and takes one trajectory of it.

    `question` is its number in traces.jsonl or a part of its text; "": the first. The changed
    trajectory has the same parameters and draws. Raises AuditError for a step before which no
    checkpoint is left, and for a question or sample that the step does not have.
    """
    if not (run / "config.json").exists():
        raise AuditError(f"{run} is no run: it holds no config.json")
    run = run.resolve()  # it is executed from where it was begun
    config = read_config(run)
    rows = {row["step"]: row for row in learning_rows(run)}
    checkpoint = _before(run, config, step, max(rows, default=0))
    change = _absolute(change)
    progress("Loading the run")
    with again(run, config) as machinery:
        state, notes = _go_to(machinery, checkpoint, config, step, rows, progress)
        if (run / RECORD).exists():
            here = facts(dict(machinery.run.mesh.shape), config.policy.compute_dtype)
            notes += other_facts(starts(read_record(run)), step, here)
        progress(f"Rolling out step {step}")
        name, stage = machinery.run.progress.stage(config)
        batch = machinery.run.collector.collect(state.params, step - 1, name, stage)
        differs = first_difference(
            {k: v for k, v in rows[step].get("digests", {}).items() if k in batch_digests(batch)},
            batch_digests(batch),
        )
        if differs:
            notes.append(f"this is not the run's own trajectory: {differs} of step {step} differ")
        row = _row_of(batch, question, sample, step)
        then = _told(batch.rolled, batch.rewards[row], row, step)
        now = None
        if change.named:
            progress("Rolling out the changed trajectory")
            now = _changed(machinery, state, checkpoint.parent, batch, row, change, step)
            if batch.rolled.ages is not None and batch.rolled.ages[row].any():
                notes.append(
                    "older parameters sampled a part of the trajectory; the changed one is wholly "
                    f"of the parameters of step {step}"
                )
        origin = batch.rolled.origins[row]
        number = batch.rolled.questions[row].id
        return Replayed(step, number, origin.sample, then, now, " ".join(change.named), notes)


def _absolute(change: Change) -> Change:
    """Its paths as they are seen from here: the run is executed where it was begun."""
    names = ("documents", "index", "prompt")
    paths = {n: str(Path(v).resolve()) for n in names if (v := getattr(change, n))}
    if missing := [path for path in paths.values() if not Path(path).exists()]:
        raise AuditError(f"{missing[0]} does not exist")
    return dataclasses.replace(change, **paths)


def _before(run: Path, config: Config, step: int, last: int) -> epath.Path:
    """The newest checkpoint before a step."""
    if not 1 <= step <= last:
        raise AuditError(f"{run} has steps 1 to {last}, not {step}")
    offset = config.cold_start.steps + 1
    folders = saved_in(checkpoint_directory(run, config.run.checkpoint_dir))
    before = [f for f in folders if offset <= int(f.name) < offset + step]
    if not before:
        raise AuditError(
            f"no checkpoint from before step {step} of {run} is left: a run keeps "
            "run.keep_checkpoints, and with run.keep_for_audit=K every Kth"
        )
    return before[0]


def _go_to(
    machinery: Again,
    checkpoint: epath.Path,
    config: Config,
    step: int,
    rows: dict[int, dict[str, Any]],
    progress: Callable[[str], None],
) -> tuple[LearnerState, list[str]]:
    """The state before `step`, and what differed on the way."""
    state, notes = machinery.stand_at(checkpoint), list[str]()
    for before in range(machinery.run.progress.step + 1, step):
        progress(f"Executing step {before}")
        state, row, seconds = machinery.step(state)
        if not (executed := compared(rows[before], row, seconds)).equal:
            notes.append(f"step {before} came out differently: {executed.meaning}")
    return state, notes


def _row_of(batch: Rewarded, question: str, sample: int, step: int) -> int:
    """The row of the trajectory that is asked for."""
    rolled = batch.rolled
    trunks = np.flatnonzero(rolled.trunks).tolist()
    asked = question or str(rolled.questions[trunks[0]].id)
    rows = [i for i in trunks if str(rolled.questions[i].id) == asked]
    rows = rows or [i for i in trunks if asked in rolled.questions[i].question]
    if not rows:
        known = {q.id: q.question for q in rolled.questions}
        some = ", ".join(f"{number} ({text[:40]!r})" for number, text in list(known.items())[:3])
        raise AuditError(f"step {step} has no question {question!r}; it has {some}, ...")
    group = [i for i in rows if rolled.trajectory.groups[i] == rolled.trajectory.groups[rows[0]]]
    found = [i for i in group if rolled.origins[i].sample == sample]
    if not found:
        raise AuditError(f"--sample {sample}: the question has samples 0 to {len(group) - 1}")
    return found[0]


def _told(rolled: Rolled, reward: Reward, row: int, step: int) -> Told:
    question, t = rolled.questions[row], rolled.trajectory
    solution: Solution = rolled.solutions[row]
    finish = Finish(int(t.finish[row])).name.lower()
    trace = Trace(
        question.question,
        tuple(question.answers),
        list(solution.spans),
        reward.value,
        int(t.searches[row]),
        finish,
        step,
        dialect=solution.dialect,
    )
    tokens = t.tokens[row, : int(t.lengths[row])].tolist()
    return Told(trace, tokens, {name: float(value) for name, value in reward.parts.items()})


def _changed(
    machinery: Again,
    state: LearnerState,
    folder: epath.Path,
    batch: Rewarded,
    row: int,
    change: Change,
    step: int,
) -> Told:
    """The trajectory of `row` with the change; alone, in a program with as many rows.

    `folder` has the run's checkpoints.
    """
    run, origin = machinery.run, batch.rolled.origins[row]
    config, question = run.config, batch.rolled.questions[row]
    engine = _engine(machinery, change)
    retriever = _retriever(run.environment.retriever_of(origin.step, origin.draw), change)
    engine.broker.begin(retriever)
    flights = engine.begin(
        [question] * (origin.occurrence + 1),
        samples=origin.sample + 1,
        step=origin.step,
        draw=origin.draw,
    )
    name, stage = run.progress.stage(config)
    rows = stage.questions_per_step * config.algorithm.samples_per_question
    params = state.params
    if change.checkpoint:
        params = machinery.params_of(folder / change.checkpoint)
    rolled = engine.complete(params, flights[-1:], seed=config.seed, step=origin.step, rows=rows)
    return _told(rolled, run.collector.reward(rolled, name)[0], 0, step)


def _engine(machinery: Again, change: Change) -> Engine:
    run = machinery.run
    rollout = dataclasses.replace(run.config.rollout, forks=0.0)
    if change.temperature is not None:
        rollout = dataclasses.replace(rollout, temperature=change.temperature)
    policy = run.policy
    if change.prompt:
        assert policy.dialect  # of a run
        text = decode(Path(change.prompt).read_bytes(), change.prompt, ConfigError)
        policy = policy._replace(dialect=dataclasses.replace(policy.dialect, prompt=text))
    return run.engine_of(rollout, policy)


class _Always:
    """A search engine that finds the same passages for every query."""

    def __init__(self, lines: Sequence[str]):
        self._hits = [Hit("", float("nan"), line) for line in lines]

    def search(self, queries: Sequence[str], k: int) -> list[list[Hit]]:
        return [self._hits[:k] for _ in queries]


def _retriever(own: Retriever, change: Change) -> Retriever:
    if change.without_search:
        return _Always(())
    if change.documents:
        return _Always([passage.line for passage in read_corpus(change.documents)])
    return open_saved_index(Path(change.index)) if change.index else own
