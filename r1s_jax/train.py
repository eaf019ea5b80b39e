"""The run, read top to bottom: cold start, stage 1, stage 2, each step checkpointed."""

import dataclasses
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.markup import escape

from r1s_jax import metrics as m
from r1s_jax.advantages import token_advantages
from r1s_jax.checkpoint import Checkpoints, DamagedCheckpoint
from r1s_jax.config import Config, RolloutConfig, StageConfig
from r1s_jax.distributed import on_main, together
from r1s_jax.engine import Engine, Rolled
from r1s_jax.environment import make_environment
from r1s_jax.eval.runner import Evaluation, evaluate
from r1s_jax.packing import pack, unpack
from r1s_jax.pretrained import chat_renderer, make_policy
from r1s_jax.profiling import (
    Compilations,
    StepTrace,
    host_memory_gib,
    keep_compiled_programs,
    model_flops_utilization,
)
from r1s_jax.rewards import reward_rule
from r1s_jax.rollout import Finish
from r1s_jax.run_dir import StopRequest, open_run_dir
from r1s_jax.sft import cold_start_end, cooldown_begins, demonstration_batch, learning_rate_scale
from r1s_jax.sharding import batch_shards, make_mesh, shard_params
from r1s_jax.summary import summarize
from r1s_jax.telemetry import Telemetry, console, make_progress
from r1s_jax.update import Learner, LearnerState, clipped_loss, likelihood_loss, make_optimizer

# Where a run stands; every checkpoint keeps a copy.
_BEGINNING = {
    "phase": "cold_start",
    "step": 0,
    "accuracy": 0.0,  # of the cold start's predictions, a running mean
    "cooldown_from": None,  # the step at which that was good enough
    "before": None,  # evaluation before reinforcement learning
    "environment": {},
    "seconds": 0.0,
    "score": None,  # a running mean of the last stage's answer F1: its best checkpoint is kept
}


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
    SearchFailure or CheckpointError.
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
        self.compilations, self.trace = Compilations(), StepTrace(profile, run_dir / "profile")
        self.dir = on_main(lambda: open_run_dir(run_dir, config, resume))
        self.mesh = make_mesh(config.mesh)
        policy = together(lambda: make_policy(config.policy, config.seed))
        self.model, self.tokenizer, self.eos_ids = policy.model, policy.tokenizer, policy.eos_ids
        self.params = shard_params(policy.params, self.model, self.mesh)
        self.environment = together(lambda: make_environment(config, chat_renderer(self.tokenizer)))
        self.engine = self._engine(config.rollout)
        self.examiner = self._engine(
            dataclasses.replace(config.rollout, temperature=0.0, stop_at_answer=True)
        )
        self.telemetry = Telemetry(self.dir, config.run.wandb_project, dataclasses.asdict(config))
        self.checkpoints = Checkpoints(self.dir / "checkpoints", config.run.keep_checkpoints)
        self.progress = (self.checkpoints.progress() if resume else None) or dict(_BEGINNING)
        self.started -= self.progress["seconds"]
        self.seconds_checkpoint = 0.0
        learning = self.progress["phase"] == "learning"
        self.telemetry.rewind(
            cold_start=config.cold_start.steps if learning else self.progress["step"],
            learning=self.progress["step"] if learning else 0,
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
            progress["before"] = {"f1": before.f1, "searches": before.searches}
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
        """Stage 1, then stage 2."""
        c = self.config
        self.environment.restore(self.progress["environment"])
        learner = self._learner(
            make_optimizer(c.optimizer), partial(clipped_loss, c.algorithm.clip)
        )
        total, done = c.stage1.steps + c.stage2.steps, self.progress["step"]
        with make_progress() as bar:
            task = bar.add_task("", total=total, completed=done, info="")
            for step, name, stage in _schedule(c, done):
                bar.update(task, description=name.replace("stage", "Stage "))
                scale = 1.0 - (1.0 - c.optimizer.decay_to) * step / max(total - 1, 1)
                with self.trace.step(step + 1):
                    state, row = self.step(learner, state, step, stage, scale)
                if stage is (c.stage2 if c.stage2.steps else c.stage1):
                    score = self.progress["score"]
                    f1 = row["answer_f1"]
                    self.progress["score"] = f1 if score is None else 0.9 * score + 0.1 * f1
                # Before the checkpoint: a kill between the two must not lose the row.
                self.telemetry.step({"step": step + 1, "stage": name, **row})
                last = stop.agree() or step + 1 == total
                if last or (step + 1) % c.run.checkpoint_every == 0:
                    self._save("learning", step + 1, state)
                bar.update(task, advance=1, info=_headline(row))
                if not console.is_terminal:  # no live bar in a log: a line a step instead
                    console.print(f"{name} step {step + 1}/{total}  {_headline(row)}")
                if stop.requested:
                    break
        self.trace.close()
        self.checkpoints.wait()
        return state

    def step(
        self,
        learner: Learner,
        state: LearnerState,
        step: int,
        stage: StageConfig,
        learning_rate_scale: float,
    ) -> tuple[LearnerState, dict[str, float]]:
        """One step: roll out, reward, estimate advantages over the whole batch, update."""
        c, clock = self.config, [time.perf_counter()]
        batch = self.environment.batch(step, stage.questions_per_step)
        rolled = self.engine.run(
            state.params,
            batch.questions,
            samples=c.algorithm.samples_per_question,
            seed=c.seed,
            step=step,
            retriever=batch.retriever,
        )
        clock.append(time.perf_counter())
        rule = reward_rule(stage.reward)
        pairs = zip(rolled.solutions, rolled.questions, strict=True)
        rewards = [rule(solution, question.answers) for solution, question in pairs]
        clock.append(time.perf_counter())

        t = rolled.trajectory
        # A search that failed is not the policy's doing: nothing is learned from what followed.
        mask = t.loss_mask & ~np.isin(t.finish, (Finish.SEARCH_ERROR, Finish.ABORTED))[:, None]
        kl = self._kl(learner, state, rolled, mask)
        advantages = np.asarray(
            _advantages(
                c.algorithm.estimator,
                np.array([r.value for r in rewards], np.float32),
                t.groups,
                mask,
                kl=kl,
                kl_coefficient=c.algorithm.kl_coefficient,
                reward_clip=c.algorithm.reward_clip,
            )
        )
        state, updates = self._update(
            learner, state, rolled, mask, advantages, step, learning_rate_scale
        )
        clock.append(time.perf_counter())

        traced = c.run.traces_per_step
        for row in m.trace_rows(rolled, rewards, advantages, traced, self.engine.token_texts):
            self.telemetry.trace({"step": step + 1, **row})
        seconds = dict(zip(("rollout", "reward", "update"), np.diff(clock).tolist(), strict=True))
        return (
            state,
            {
                **m.rollout_metrics(rolled, rewards),
                **m.update_metrics(updates, seconds["update"]),
                **self._utilization(state, t.lengths.sum(), seconds["update"]),
                "compilations": self.compilations.take(),
                "host_memory_gib": host_memory_gib(),
                # Of beginning to write the last one: the rest goes on beside the next step.
                "seconds_checkpoint": self.seconds_checkpoint,
                "kl": float(kl[mask].mean()) if kl is not None and mask.any() else 0.0,
                **{f"seconds_{phase}": value for phase, value in seconds.items()},
            },
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

    def _update(
        self,
        learner: Learner,
        state: LearnerState,
        rolled: Rolled,
        mask: np.ndarray,
        advantages: np.ndarray,
        step: int,
        scale: float,
    ) -> tuple[LearnerState, list[dict[str, float]]]:
        """Several optimizer steps, each on its random share of the trajectories."""
        rows = []
        order = np.random.default_rng((self.config.seed, step)).permutation(len(mask))
        for part in np.array_split(order, self.config.algorithm.updates_per_rollout):
            counts = mask[part].sum(-1, keepdims=True)
            sequences = max(1, int((counts > 0).sum()))
            weights = mask[part] / (np.maximum(counts, 1) * sequences)
            batch, _, micro = self._pack(rolled, part, weights, advantages[part])
            state, row = learner.update(state, batch, micro, scale)
            rows.append(row)
        return state, rows

    def _kl(
        self, learner: Learner, state: LearnerState, rolled: Rolled, mask: np.ndarray
    ) -> np.ndarray | None:
        """k1 estimate of the divergence from the reference, float32[N, W]; None without one."""
        if state.reference is None:
            return None
        t, everything = rolled.trajectory, np.arange(len(mask))
        batch, layout, micro = self._pack(rolled, everything, mask, np.zeros_like(mask, np.float32))
        packed = learner.logprobs(state.reference, batch, micro)
        reference = unpack(packed, layout, t.lengths, mask.shape[1])
        return np.where(mask, t.policy_logprobs - reference, 0.0)

    def _pack(self, rolled: Rolled, rows: np.ndarray, weights: np.ndarray, advantages: np.ndarray):
        t, c = rolled.trajectory, self.config
        return pack(
            t.tokens[rows],
            t.lengths[rows],
            weights,
            advantages,
            t.policy_logprobs[rows],
            capacity=c.optimizer.pack_length or c.rollout.max_length,
            micro_rows=c.optimizer.micro_rows * batch_shards(self.mesh),
        )

    def _demonstrations(self, step: int):
        c = self.config
        return demonstration_batch(
            self.environment.demonstrations(step, c.cold_start.batch_size),
            self.engine.encode,
            self.environment.render,
            capacity=c.optimizer.pack_length or c.rollout.max_length,
            micro_rows=c.optimizer.micro_rows * batch_shards(self.mesh),
        )

    def _engine(self, rollout: RolloutConfig) -> Engine:
        return Engine(
            self.model,
            self.tokenizer,
            self.eos_ids,
            rollout,
            self.config.search,
            self.mesh,
            np.dtype(self.config.policy.compute_dtype),
            self.environment.render,
            attention=self.config.policy.attention,
        )

    def _learner(self, optimizer: Any, loss: Any) -> Learner:
        p = self.config.policy
        dtype = np.dtype(p.compute_dtype)
        return Learner(self.model, self.mesh, dtype, p.remat, optimizer, loss, p.attention)

    def _learning_state(self, params: Any) -> LearnerState:
        learner = self._learner(make_optimizer(self.config.optimizer), clipped_loss)
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


_advantages = jax.jit(token_advantages, static_argnums=0)


def _schedule(config: Config, done: int) -> Iterator[tuple[int, str, StageConfig]]:
    stages = [("stage1", config.stage1)] * config.stage1.steps
    stages += [("stage2", config.stage2)] * config.stage2.steps
    yield from ((step, *stages[step]) for step in range(done, len(stages)))


def _headline(row: dict[str, float]) -> str:
    return (
        f"reward {row['reward']:+.2f}  f1 {row['answer_f1']:.2f}  "
        f"searches {row['searches_per_question']:.2f}  {row['sampled_tokens_per_s']:.0f} tok/s"
    )
