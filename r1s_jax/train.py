"""The run, read top to bottom: cold start, stage 1, stage 2, each step checkpointed."""

import dataclasses
import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.markup import escape

from r1s_jax.config import Config, RolloutConfig, StageConfig
from r1s_jax.data.environment import open_environment
from r1s_jax.eval.held_out import Evaluation, evaluate
from r1s_jax.learning.advantages import adapted_kl_coefficient, has_signal
from r1s_jax.learning.cold_start import (
    cold_start_end,
    cooldown_begins,
    demonstration_batch,
    learning_rate_scale,
)
from r1s_jax.learning.learner import Learner, LearnerState, make_optimizer
from r1s_jax.learning.losses import likelihood_loss, policy_loss
from r1s_jax.learning.policy_gradient import PolicyGradient, rows_with_signal
from r1s_jax.models.checkpoint import Checkpoints, DamagedCheckpoint, checkpoint_directory
from r1s_jax.models.pretrained import make_policy
from r1s_jax.models.sharding import batch_shards, make_mesh, shard_params
from r1s_jax.protocol.prompts import chat_renderer
from r1s_jax.rewards.registry import FORMAT_REWARDS, batch_reward
from r1s_jax.rewards.rules import Reward
from r1s_jax.rollout.engine import Engine, Rolled, merge
from r1s_jax.system.console import console, make_progress
from r1s_jax.system.distributed import on_main, together
from r1s_jax.system.files import write_rows
from r1s_jax.system.profiling import (
    Compilations,
    StepTrace,
    host_memory_gib,
    keep_compiled_programs,
    model_flops_utilization,
)
from r1s_jax.tracking import health
from r1s_jax.tracking import metrics as m
from r1s_jax.tracking.run_dir import StopRequest, open_run_dir
from r1s_jax.tracking.summary import summarize
from r1s_jax.tracking.telemetry import Telemetry

# Where a run stands; every checkpoint keeps a copy.
_BEGINNING = {
    "phase": "cold_start",
    "step": 0,
    "accuracy": 0.0,  # of the cold start's predictions, a running mean
    "cooldown_from": None,  # the step at which that was good enough
    "before": None,  # evaluation before reinforcement learning
    "environment": {},
    "seconds": 0.0,
    "stage1_end": None,  # the step at which stage 1 reached its goal
    "kl_coefficient": None,  # as adapted so far
    "score": None,  # a running mean of the last stage's answer F1: its best checkpoint is kept
}

# Random keys of a step's further rollouts are those of steps that no run reaches.
_DRAWS_APART = 1 << 20


def train(
    config: Config,
    run_dir: Path,
    resume: bool = False,
    *,
    cold_start_only: bool = False,
    profile: str = "",
) -> dict[str, Any]:
    """Runs the whole config in `run_dir` and returns its summary.

    `profile` names the steps of reinforcement learning to trace, as "N:M".

    SIGINT and SIGTERM end it early, at a step's end and with a checkpoint (the summary then has
    `stopped`); `resume` goes on as if it had never stopped. Raises ConfigError, DataError,
    SearchFailure, RewardServerError, UnhealthyRun or CheckpointError.
    """
    keep_compiled_programs()
    while True:
        try:
            return _train(config, run_dir, resume, cold_start_only, profile)
        except DamagedCheckpoint as error:
            console.print(f"[yellow]warning:[/] {escape(str(error))}; going on from the one before")


def _train(
    config: Config, run_dir: Path, resume: bool, cold_start_only: bool, profile: str
) -> dict[str, Any]:
    run = Run(config, run_dir, resume, profile)
    try:
        with StopRequest() as stop:
            state = run.cold_start(stop)
            if cold_start_only:
                stop.requested = stop.requested or "end of the cold start"
            if not stop.requested:
                state = run.learn(state, stop)
    except DamagedCheckpoint:
        raise
    except Exception:
        run.checkpoints.wait_after_error()
        raise
    best = run.checkpoints.best()
    run.checkpoints.close()
    run.telemetry.close()
    if stop.requested:
        return {"stopped": stop.requested, "phase": run.progress["phase"], "run_dir": str(run_dir)}
    after = run.evaluate(state)
    return on_main(lambda: summarize(run.dir, run.progress, after, best))


class Run:
    """A run and everything that it needs, built once from its config."""

    def __init__(self, config: Config, run_dir: Path, resume: bool, profile: str = ""):
        self.config, self.started = config, time.perf_counter()
        for stage in (config.stage1, config.stage2):
            if stage.steps:
                batch_reward(stage.reward)  # a name that is none must not be found out hours later
        self.compilations, self.trace = Compilations(), StepTrace(profile, run_dir / "profile")
        self.dir = on_main(lambda: open_run_dir(run_dir, config, resume))
        self.mesh = make_mesh(config.mesh)
        policy = together(lambda: make_policy(config.policy, config.seed))
        self.params = shard_params(policy.params, policy.model, self.mesh)
        self.policy = policy._replace(params={})  # the host's copy is not needed any more
        self.environment = open_environment(config, chat_renderer(policy.tokenizer))
        on_main(self._write_held_out)
        self.engine = self._engine(config.rollout)
        self.engine.check_prompts(self.environment.questions())
        self.examiner = self._engine(
            dataclasses.replace(config.rollout, temperature=0.0, stop_at_answer=True)
        )
        self.telemetry = Telemetry(self.dir, config.run.wandb_project, dataclasses.asdict(config))
        where = checkpoint_directory(self.dir, config.run.checkpoint_dir)
        self.checkpoints = Checkpoints(where, config.run.keep_checkpoints)
        known = self.checkpoints.progress() if resume else None
        if resume and known is None:
            console.print(f"{run_dir} holds no checkpoint to resume from: the run begins anew")
        self.progress = _BEGINNING | (known or {})
        self.started -= self.progress["seconds"]
        self.seconds_checkpoint = 0.0
        learning = self.progress["phase"] == "learning"
        self.telemetry.rewind(
            cold_start=config.cold_start.steps if learning else self.progress["step"],
            learning=self.progress["step"] if learning else 0,
        )
        self.history = health.History(on_main(self.telemetry.steps))

    def _write_held_out(self) -> None:
        """The questions of the evaluation, so that `r1s eval run` can ask them of any model."""
        if count := self.config.eval.questions:
            questions = self.environment.evaluation(count).questions
            write_rows(
                self.dir / "held_out.jsonl",
                ({"id": q.id, "question": q.question, "answer": q.answers} for q in questions),
            )

    def cold_start(self, stop: StopRequest) -> LearnerState:
        """Imitates demonstrations; returns the state that reinforcement learning starts from."""
        c, progress = self.config.cold_start, self.progress
        if progress["phase"] == "learning":
            return self.checkpoints.restore(self._learning_state(self.params))
        optimizer = make_optimizer(self.config.optimizer, c.learning_rate)
        learner = self._learner(optimizer, likelihood_loss)
        state = learner.init(self.params)
        if progress["step"]:
            state = self.checkpoints.restore(state)
        with make_progress() as bar:
            task = bar.add_task(
                "Cold start",
                total=c.steps,
                completed=progress["step"],
                info="",
                visible=c.steps > 0,
            )
            while (step := progress["step"]) < cold_start_end(c, progress["cooldown_from"]):
                state, row = self._imitate(learner, state, step)
                self.telemetry.cold_start({"step": step + 1, **row})
                end = cold_start_end(c, progress["cooldown_from"])
                info = f"loss {row['loss']:.3f}  accuracy {progress['accuracy']:.3f}"
                bar.update(task, advance=1, total=end, info=info)
                if stop.agree() or (step + 1) % c.checkpoint_every == 0:
                    self._save("cold_start", step + 1, state)
                if stop.requested:
                    return state
        state = self._learning_state(state.params)
        if before := self.evaluate(state):
            progress["before"] = {
                "f1": before.f1,
                "cover_em": before.cover_em,
                "searches": before.searches,
            }
        self._save("learning", 0, state)
        return state

    def _imitate(
        self, learner: Learner, state: LearnerState, step: int
    ) -> tuple[LearnerState, dict[str, float]]:
        """One step of the cold start; notes when its end comes into sight."""
        c, progress = self.config.cold_start, self.progress
        if progress["cooldown_from"] is None and cooldown_begins(c, step, progress["accuracy"]):
            progress["cooldown_from"] = step
        scale = learning_rate_scale(c, step, progress["cooldown_from"])
        state, row = learner.update(state, *self._demonstrations(step), scale)
        row["accuracy"] = row.pop("likely") / max(row.pop("full"), 1e-9)
        progress["accuracy"] = 0.9 * progress["accuracy"] + 0.1 * row["accuracy"]
        progress["step"] = step + 1
        return state, row

    def learn(self, state: LearnerState, stop: StopRequest) -> LearnerState:
        """Stage 1, then stage 2. Raises UnhealthyRun, with a checkpoint, where that is fatal."""
        c, progress = self.config, self.progress
        self.environment.restore(progress["environment"])
        learner = self._learner(make_optimizer(c.optimizer), policy_loss(c.algorithm))
        gradient = PolicyGradient(c, learner)
        with make_progress() as bar:
            task = bar.add_task("", total=self._total(), completed=progress["step"], info="")
            while (step := progress["step"]) < self._total() and not stop.requested:
                name, stage = self._stage(step)
                bar.update(task, description=name.replace("stage", "Stage "), total=self._total())
                scale = 1.0 - (1.0 - c.optimizer.decay_to) * step / max(self._total() - 1, 1)
                with self.trace.step(step + 1):
                    state, row = self.step(gradient, state, step, stage, scale)
                row = {"step": step + 1, "stage": name, **row}
                self._note(row, stage)
                # Before the checkpoint: a kill between the two must not lose the row.
                self.telemetry.step(row)
                last = stop.agree() or step + 1 == self._total() or health.is_fatal(row)
                # What is not a number any more must not take the place of what still is.
                if (last or (step + 1) % c.run.checkpoint_every == 0) and not health.is_lost(row):
                    self._save("learning", step + 1, state)
                bar.update(task, advance=1, info=_headline(row))
                if not console.is_terminal:  # no live bar in a log: a line a step instead
                    console.print(f"{name} step {step + 1}/{self._total()}  {_headline(row)}")
                self._warn(row)
        self.trace.close()
        self.checkpoints.wait()
        return state

    def _stage(self, step: int) -> tuple[str, StageConfig]:
        first = step < self._stage1_end()
        return ("stage1", self.config.stage1) if first else ("stage2", self.config.stage2)

    def _stage1_end(self) -> int:
        """The step before which stage 1 ends: sooner than planned if it reached its goal."""
        ended = self.progress["stage1_end"]
        return self.config.stage1.steps if ended is None else ended

    def _total(self) -> int:
        return self._stage1_end() + self.config.stage2.steps

    def _note(self, row: dict[str, Any], stage: StageConfig) -> None:
        """Moves on to the next step, and maybe stage; adds to the row what it says of health."""
        c, progress = self.config, self.progress
        progress["step"] = row["step"]
        if stage is (c.stage2 if c.stage2.steps else c.stage1):
            score, f1 = progress["score"], row["answer_f1"]
            progress["score"] = f1 if score is None else 0.9 * score + 0.1 * f1
        wanted = stage.until_format_valid
        if row["stage"] == "stage1" and wanted and row["format_valid"] >= wanted:
            progress["stage1_end"] = row["step"]
        row["rewards_answers"] = stage.reward not in FORMAT_REWARDS
        self.history.rows.append(row)
        row["health"] = health.check(self.history)

    def _warn(self, row: dict[str, Any]) -> None:
        """Tells of signals that did not fire at the step before, and ends a run beyond repair."""
        before = self.history.rows[-2:-1]
        known = {(f["signal"], f["level"]) for row in before for f in row.get("health", [])}
        for fired in row["health"]:
            text = f"{fired['signal']} ({fired['value']:.3g}): {fired['advice']}"
            if (fired["signal"], fired["level"]) not in known:
                console.print(f"[yellow]{fired['level']}:[/] step {row['step']}: {escape(text)}")
            if fired["level"] == "fatal" and self.config.run.stop_when_unhealthy:
                self.checkpoints.wait()
                raise health.UnhealthyRun(f"the run was stopped after step {row['step']}: {text}")

    def step(
        self,
        gradient: PolicyGradient,
        state: LearnerState,
        step: int,
        stage: StageConfig,
        learning_rate_scale: float,
    ) -> tuple[LearnerState, dict[str, float]]:
        """One step: roll out, reward, estimate advantages over the whole batch, update."""
        c, clock = self.config, [time.perf_counter()]
        rolled, rewards = self._collect(state, step, stage)
        values = np.array([r.value for r in rewards], np.float32)
        rows = rows_with_signal(rolled.trajectory, values, stage.questions_per_step)
        kept, kept_rewards = rolled.take(rows), [rewards[i] for i in rows]
        clock.append(time.perf_counter())
        kl_coefficient = self._kl_coefficient()
        state, learned = gradient.learn(
            state,
            kept,
            values[rows],
            step=step,
            kl_coefficient=kl_coefficient,
            learning_rate_scale=learning_rate_scale,
        )
        clock.append(time.perf_counter())
        self._adapt_kl(learned.kl)
        traced, texts = c.run.traces_per_step, self.engine.token_texts
        for row in m.trace_rows(kept, kept_rewards, learned.advantages, traced, texts):
            self.telemetry.trace({"step": step + 1, **row})
        collected, updated = np.diff(clock).tolist()
        return state, {
            **m.rollout_metrics(rolled, rewards),
            **m.update_metrics(learned, updated),
            **self._utilization(state, kept.trajectory.lengths.sum(), updated),
            "kl_coefficient": kl_coefficient,
            "compilations": self.compilations.take(),
            "host_memory_gib": host_memory_gib(),
            # Of beginning to write the last one: the rest goes on beside the next step.
            "seconds_checkpoint": self.seconds_checkpoint,
            "seconds_rollout": rolled.seconds,
            "seconds_reward": collected - rolled.seconds,
            "seconds_update": updated,
        }

    def _collect(
        self, state: LearnerState, step: int, stage: StageConfig
    ) -> tuple[Rolled, list[Reward]]:
        """Rolls out a batch and rewards it; more than one where groups without signal abound."""
        c, batches, rewards = self.config, [], []
        for draw in range(1 + c.algorithm.dynamic_sampling):
            batch = self.environment.batch(step, stage.questions_per_step, draw)
            rolled = self.engine.run(
                state.params,
                batch.questions,
                samples=c.algorithm.samples_per_question,
                seed=c.seed,
                step=step + draw * _DRAWS_APART,
                retriever=batch.retriever,
            )
            prompts = [self.environment.render(q.question) for q in rolled.questions]
            golds = [q.answers for q in rolled.questions]
            rewards += batch_reward(stage.reward)(prompts, rolled.solutions, golds)
            batches.append(rolled)
            whole, values = merge(batches), np.array([r.value for r in rewards])
            groups = whole.trajectory.groups
            if len(np.unique(groups[has_signal(values, groups)])) >= stage.questions_per_step:
                break
        return whole, rewards

    def _kl_coefficient(self) -> float:
        adapted = self.progress["kl_coefficient"]
        return self.config.algorithm.kl_coefficient if adapted is None else adapted

    def _adapt_kl(self, kl: float) -> None:
        if target := self.config.algorithm.kl_target:
            self.progress["kl_coefficient"] = adapted_kl_coefficient(
                self._kl_coefficient(), kl, target
            )

    def evaluate(self, state: LearnerState) -> Evaluation | None:
        """Greedy on held-out questions; None when the config asks for none."""
        count = self.config.eval.questions
        if not count:
            return None
        return evaluate(self.examiner, state.params, self.environment.evaluation(count))

    @staticmethod
    def _utilization(state: LearnerState, tokens: float, seconds: float) -> dict[str, float]:
        share = model_flops_utilization(state.params, tokens, seconds)
        return {} if share is None else {"mfu_update": share}

    def _demonstrations(self, step: int):
        c = self.config
        return demonstration_batch(
            self.environment.demonstrations(step, c.cold_start.batch_size),
            self.engine.encode,
            self.environment.render,
            self.engine.document_tokens,
            capacity=c.optimizer.pack_length or c.rollout.max_length,
            micro_rows=c.optimizer.micro_rows * batch_shards(self.mesh),
        )

    def _engine(self, rollout: RolloutConfig) -> Engine:
        p = self.config.policy
        return Engine(
            self.policy,
            rollout,
            self.environment.render,
            search=self.config.search,
            mesh=self.mesh,
            compute_dtype=np.dtype(p.compute_dtype),
            attention=p.attention,
        )

    def _learner(self, optimizer: Any, loss: Any) -> Learner:
        p = self.config.policy
        dtype = np.dtype(p.compute_dtype)
        return Learner(self.policy.model, self.mesh, dtype, p.remat, optimizer, loss, p.attention)

    def _learning_state(self, params: Any) -> LearnerState:
        learner = self._learner(
            make_optimizer(self.config.optimizer), policy_loss(self.config.algorithm)
        )
        return learner.init(params, keep_reference=self.config.algorithm.kl_coefficient > 0)

    def _save(self, phase: str, step: int, state: LearnerState) -> None:
        self.progress |= {
            "phase": phase,
            "step": step,
            "environment": self.environment.state(),
            "seconds": time.perf_counter() - self.started,
        }
        index = step + (self.config.cold_start.steps + 1 if phase == "learning" else 0)
        begin = time.perf_counter()
        self.checkpoints.save(index, state, self.progress, self.progress["score"])
        self.seconds_checkpoint = time.perf_counter() - begin


def _headline(row: dict[str, float]) -> str:
    return (
        f"reward {row['reward']:+.2f}  f1 {row['answer_f1']:.2f}  "
        f"searches {row['searches_per_question']:.2f}  {row['sampled_tokens_per_s']:.0f} tok/s"
    )
