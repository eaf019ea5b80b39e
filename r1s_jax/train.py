"""The run, read top to bottom: cold start, stage 1, stage 2, each step checkpointed."""

import dataclasses
import time
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from r1s_jax.config import Config, RolloutConfig
from r1s_jax.data.environment import Batch, dialect_of, open_environment
from r1s_jax.data.tiny_world import build_tokenizer
from r1s_jax.eval.audit import Finding, Lines, audit
from r1s_jax.eval.held_out import Evaluation, evaluate
from r1s_jax.learning.cold_start import demonstrations_of, imitate
from r1s_jax.learning.collect import Collector
from r1s_jax.learning.learner import Learner, LearnerState, make_optimizer
from r1s_jax.learning.losses import likelihood_loss, policy_loss
from r1s_jax.learning.policy_gradient import PolicyGradient
from r1s_jax.learning.teacher import load_teacher
from r1s_jax.models.checkpoint import Checkpoints, DamagedCheckpoint, checkpoint_directory
from r1s_jax.models.checksums import checksums
from r1s_jax.models.pretrained import Pretrained, make_policy, save_policy, saved_dialect
from r1s_jax.models.sharding import make_mesh, shard_params
from r1s_jax.rewards.judged import stage_rewards
from r1s_jax.rewards.registry import FORMAT_REWARDS
from r1s_jax.rollout.engine import Engine
from r1s_jax.system.console import console, make_progress, warn
from r1s_jax.system.distributed import on_main, together
from r1s_jax.system.facts import facts
from r1s_jax.system.locks import only_one
from r1s_jax.system.memory import release_memory
from r1s_jax.system.profiling import StepTrace, keep_compiled_programs
from r1s_jax.tracking import health
from r1s_jax.tracking import metrics as m
from r1s_jax.tracking.digests import step_digests
from r1s_jax.tracking.progress import Progress, kept_for_audit
from r1s_jax.tracking.record import note_end, note_evaluated, note_start
from r1s_jax.tracking.run_dir import (
    StopRequest,
    check_data,
    open_run_dir,
    with_dtype,
    write_held_out,
)
from r1s_jax.tracking.summary import note_evaluation, summarize
from r1s_jax.tracking.telemetry import Telemetry

_AUDITED = 10**6  # a run reads at most so many passages to tell where its errors come from


def train(
    config: Config,
    run_dir: Path,
    resume: bool = False,
    *,
    cold_start_only: bool = False,
    profile: str = "",
    accept_changed_data: bool = False,
) -> dict[str, Any]:
    """Runs the whole config in `run_dir` and returns its summary.

    `profile` names the steps of reinforcement learning to trace, as "N:M". Signals (StopRequest)
    end the run after a step, with a checkpoint; the summary then has `stopped`. `resume` continues
    as if the run had not ended. Its data must be unchanged unless `accept_changed_data`. Raises
    UserError of many kinds, each with what to do.
    """
    keep_compiled_programs()
    trace = StepTrace(profile, run_dir / "profile")
    with ExitStack() as locks:
        on_main(lambda: locks.enter_context(only_one(run_dir, "the run")))
        while True:
            try:
                run = Run(config, run_dir, resume, accept_changed_data)
                return _train(run, trace, cold_start_only)
            except DamagedCheckpoint as error:
                warn(f"{error}; continuing from the checkpoint before it")


def _train(run: "Run", trace: StepTrace, cold_start_only: bool) -> dict[str, Any]:
    try:
        with StopRequest() as stop:
            state = run.cold_start(stop, evaluated=not cold_start_only)
            if cold_start_only:
                stop.requested = stop.requested or "end of the cold start"
            if not stop.agree():
                state = run.learn(state, stop, trace)
    except Exception:
        run.checkpoints.close_after_error()
        raise
    finally:
        run.telemetry.close()
    best = run.checkpoints.best()
    run.checkpoints.close()
    if stop.requested:
        return {"stopped": stop.requested, "phase": run.progress.phase, "run_dir": str(run.dir)}
    after = run.evaluate(state)
    return on_main(lambda: _ended(run, after, best))


def _ended(run: "Run", after: Evaluation | None, best: Any) -> dict[str, Any]:
    summary = summarize(run.dir, run.progress, after, best)
    note_end(run.dir)
    return summary


class Run:
    """A run and everything that it needs, built once from its config."""

    def __init__(self, config: Config, run_dir: Path, resume: bool, accept_changed_data: bool):
        config = with_dtype(config, run_dir, resume)
        self.config, self.started = config, time.perf_counter()
        # First, so that a wrong name of a reward is reported now, not at its stage.
        rewards = together(lambda: stage_rewards(config, run_dir))
        self.dir = on_main(lambda: open_run_dir(run_dir, config, resume))
        on_main(lambda: check_data(self.dir, config, accept_changed_data))
        self.mesh = make_mesh(config.mesh)
        dialect = together(lambda: dialect_of(config, lambda: saved_dialect(self.dir)))
        tokenizer = None if config.policy.model else build_tokenizer(dialect.name)
        policy = together(
            lambda: make_policy(config.policy, config.seed, dialect, self.dir, tokenizer)
        )
        self.params = shard_params(policy.params, policy.model, self.mesh)
        self.policy = policy._replace(params={})  # the host's copy is not needed any more
        on_main(lambda: save_policy(self.dir, self.policy))
        self.environment = open_environment(config, policy.spoken)
        if config.eval.questions:
            held_out = self._held_out.questions
            on_main(lambda: write_held_out(self.dir, held_out))
        self.engine = self.engine_of(config.rollout)
        self.engine.check_prompts(self.environment.questions())
        greedy = dataclasses.replace(config.rollout, temperature=0.0, forks=0.0)
        self.evaluation_engine = self.engine_of(greedy)
        self.teacher = together(lambda: load_teacher(config, self.mesh, policy))
        self.collector = Collector(config, self.engine, self.environment, rewards)
        self.telemetry = Telemetry(self.dir, config)
        where = checkpoint_directory(self.dir, config.run.checkpoint_dir)
        keep = config.run.keep_checkpoints
        self.checkpoints = Checkpoints(where, keep, self.dir, lambda i: kept_for_audit(config, i))
        saved = self.checkpoints.progress(Progress.of) if resume else None
        if resume and saved is None:
            warn(f"{run_dir} holds no checkpoint to resume from: the run starts from the beginning")
        self.progress = saved or Progress()
        self.started -= self.progress.seconds
        self.clock = m.StepClock()
        self.telemetry.rewind(**self.progress.rows(config))
        self.history = health.History(on_main(self.telemetry.steps))
        self._sums: dict[str, int] = {}  # of the state that the next step begins with, if known
        here = facts(dict(self.mesh.shape), config.policy.compute_dtype)
        on_main(lambda: note_start(self.dir, self.progress.phase, self.progress.step, here))

    def cold_start(self, stop: StopRequest, *, evaluated: bool = True) -> LearnerState:
        """Imitates demonstrations; returns the state that reinforcement learning starts from."""
        c, progress = self.config.cold_start, self.progress
        params, self.params = self.params, {}  # the state has a copy: one less in memory
        if progress.phase == "learning":
            return self.checkpoints.restore(self._learning_state(params))
        optimizer = make_optimizer(self.config.optimizer, c.learning_rate)
        learner = self.learner(optimizer, likelihood_loss)
        state = learner.init(params)
        del params
        if progress.step:
            state = self.checkpoints.restore(state)

        def after_step(state: LearnerState, row: dict[str, float]) -> bool:
            self.telemetry.cold_start(row)
            if stop.agree() or progress.step % c.checkpoint_every == 0:
                self._save(state)
            return bool(stop.requested)

        batch_of = demonstrations_of(self.config, self.environment, self.engine, learner, state)
        state = imitate(c, learner, state, progress, batch_of, after_step)
        if stop.requested:
            return state
        state = self._learning_state(state.params)
        release_memory()
        progress.phase, progress.step = "learning", 0
        if evaluated:
            self._evaluate_before(state)
        self._save(state)
        return state

    def _evaluate_before(self, state: LearnerState) -> None:
        """Evaluates the policy before reinforcement learning, once per run."""
        if not (self.progress.step or self.progress.before) and (before := self.evaluate(state)):
            self.progress.before = on_main(lambda: self._note_before(before))

    def _note_before(self, before: Evaluation) -> dict[str, float]:
        scores = note_evaluation(self.dir, "before", before)
        note_evaluated(self.dir)
        return scores

    def learn(self, state: LearnerState, stop: StopRequest, trace: StepTrace) -> LearnerState:
        """Runs stages 1 and 2. Raises UnhealthyRun, with a checkpoint, for a fatal signal."""
        c, progress = self.config, self.progress
        with self.checkpoints.reading():
            self.collector.restore(progress.environment, progress.carried)
        self._evaluate_before(state)  # if the cold start ran with cold_start_only
        learner = self.learner(make_optimizer(c.optimizer), policy_loss(c.algorithm))
        gradient = PolicyGradient(c, learner, self.engine, self.teacher)
        with make_progress() as bar:
            total = progress.total_steps(c)
            task = bar.add_task("", total=total, completed=progress.step, info="")
            while progress.step < progress.total_steps(c) and not stop.requested:
                name, total = progress.stage(c)[0], progress.total_steps(c)
                bar.update(task, description=name.replace("stage", "Stage "), total=total)
                with trace.step(progress.step + 1):
                    state, row = self.step(gradient, state)
                progress.note_step(c, row)
                row["health"] = health.check(self.history.add(row))
                # Before the checkpoint: a kill between the two must not lose the row.
                self.telemetry.step(row)
                last = stop.agree() or progress.step == progress.total_steps(c)
                due = last or health.is_fatal(row) or progress.step % c.run.checkpoint_every == 0
                # Parameters that are NaN must not replace an older checkpoint.
                if due and not health.is_lost(row):
                    self._save(state)
                bar.update(task, advance=1, info=m.headline(row))
                if not console.is_terminal:  # no live bar in a log: a line a step instead
                    total = progress.total_steps(c)
                    console.print(f"{name} step {progress.step}/{total}  {m.headline(row)}")
                if (fatal := health.announce(self.history)) and c.run.stop_when_unhealthy:
                    self.checkpoints.wait()
                    raise health.UnhealthyRun(progress.step, fatal)
        trace.close()
        self.checkpoints.wait()
        return state

    def step(
        self, gradient: PolicyGradient, state: LearnerState
    ) -> tuple[LearnerState, dict[str, Any]]:
        """One step: roll out, reward, estimate advantages over the whole batch, update.

        Returns the new state and the step's row of metrics; donates `state`.
        """
        c, step = self.config, self.progress.step
        name, stage = self.progress.stage(c)
        clock, kl_coefficient = self.clock, self.progress.kl(c)
        before = self._sums or checksums(state)
        with clock.time("collect"):
            batch = self.collector.collect(state.params, step, name, stage)
            trained = batch.first_groups(stage.questions_per_step)
        release_memory()
        # The baseline of reinforce++ is the batch, so groups of equal rewards teach too.
        if c.algorithm.estimator != "reinforce++" and not trained.teaches.any():
            warn(
                f"step {step + 1}: all answers to each question earned the same, so nothing is "
                "learned from them: raise rollout.temperature or rollout.top_p, or take other "
                "questions"
            )
        with clock.time("update"):
            state, learned = gradient.learn(
                state,
                trained if c.algorithm.forks_teach else trained.trunks,
                step=step,
                kl_coefficient=kl_coefficient,
                learning_rate_scale=self.progress.learning_rate_scale(c),
            )
        release_memory()
        with clock.time("digests"):
            self._sums = checksums(state)
            digests = step_digests(before, batch, learned, self._sums)
        if learned.kl is not None:
            self.progress.adapt_kl(c, learned.kl)
        traces = m.trace_rows(
            trained,
            learned,
            c.run.traces_per_step,
            self.engine.token_texts,
        )
        for row in traces:
            self.telemetry.trace({"step": step + 1, **row})
        row = {
            "step": step + 1,
            "stage": name,
            **m.rollout_metrics(batch.trunks),
            **m.fork_metrics(batch),
            **m.update_metrics(learned, clock.seconds["update"]),
            "kl_coefficient": kl_coefficient,
            **clock.metrics(
                batch.rolled.seconds, state.params, int(trained.rolled.trajectory.lengths.sum())
            ),
            "rewards_answers": stage.reward not in FORMAT_REWARDS,
            "digests": digests,
        }
        return state, on_main(lambda: row)  # every process must judge the same times

    def evaluate(self, state: LearnerState) -> Evaluation | None:
        """Evaluates greedily, and sampled with `eval.samples`; None without `eval.questions`."""
        if not self.config.eval.questions:
            return None
        batch, samples = self._held_out, self.config.eval.samples
        found = evaluate(
            self.evaluation_engine, state.params, batch, self._sampler, samples, self._findings
        )
        release_memory()
        return found

    @cached_property
    def _sampler(self) -> Engine:
        """Samples answers as the rollouts of training do, without forks."""
        rollout = self.config.rollout
        forks = rollout.forks > 0
        return self.engine_of(dataclasses.replace(rollout, forks=0.0)) if forks else self.engine

    @cached_property
    def _held_out(self) -> Batch:
        return self.environment.evaluation(self.config.eval.questions)

    @cached_property
    def _findings(self) -> list[Finding]:
        """What the corpus has for the held-out questions; [] unless it is at hand and small."""
        batch = self._held_out
        passages = getattr(batch.retriever, "passages", None)
        if passages is None or len(passages) > _AUDITED:
            return []
        return audit(batch.questions, Lines(passages), batch.retriever)

    def engine_of(self, rollout: RolloutConfig, policy: Pretrained | None = None) -> Engine:
        """An engine with these limits, for the run's policy or one that differs in its prompt."""
        c = self.config
        return Engine(
            policy or self.policy,
            rollout,
            search=c.search,
            mesh=self.mesh,
            compute_dtype=np.dtype(c.policy.compute_dtype),
            attention=c.policy.attention,
        )

    def fresh_state(self) -> LearnerState:
        """The state before the first step of reinforcement learning without a cold start.

        Takes the parameters away: the run has no other copy.
        """
        params, self.params = self.params, {}
        return self._learning_state(params)

    def take_over(self, progress: Progress) -> None:
        """Goes on from another run's progress, whose state the caller has."""
        self.progress, self._sums = progress, {}
        self.collector.restore(progress.environment, progress.carried)

    def close(self) -> None:
        self.telemetry.close()
        self.checkpoints.close()

    def learner(self, optimizer: Any, loss: Any) -> Learner:
        return Learner.of(self.config.policy, self.policy.model, self.mesh, optimizer, loss)

    def _learning_state(self, params: Any) -> LearnerState:
        c = self.config
        learner = self.learner(make_optimizer(c.optimizer), policy_loss(c.algorithm))
        return learner.init(params, keep_reference=c.algorithm.keeps_reference)

    def _save(self, state: LearnerState) -> None:
        """Starts to write a checkpoint."""
        progress = self.progress
        progress.environment, progress.carried = self.collector.state()
        progress.seconds = time.perf_counter() - self.started
        index = progress.index(self.config)
        with self.clock.time("checkpoint"):
            self.checkpoints.save(index, state, progress.as_dict(), progress.score, self._sums)
