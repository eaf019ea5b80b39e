"""The progress of a run, which a checkpoint keeps beside the state of the learner."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from r1s_jax.config import Config, StageConfig
from r1s_jax.io.schema import check
from r1s_jax.learning.advantages import adapted_kl_coefficient
from r1s_jax.learning.cold_start import Standing


@dataclass
class Progress(Standing):
    """The progress of a run; `step` counts the steps of `phase`."""

    phase: Literal["cold_start", "learning"] = "cold_start"
    before: dict[str, float] | None = None  # the evaluation before reinforcement learning
    environment: dict[str, Any] = field(default_factory=dict)  # the environment's cursor
    carried: str | None = None  # the trajectories in flight (see learning/partial_rollouts.py)
    seconds: float = 0.0
    stage1_end: int | None = None  # the step at which stage 1 reached its goal
    kl_coefficient: float | None = None  # as adapted so far
    score: float | None = None  # a running mean of the last stage's answer F1

    @staticmethod
    def of(saved: Mapping[str, Any]) -> "Progress":
        """The progress that a checkpoint holds. Raises BadInput for wrong types."""
        return check(saved, Progress, "the progress in a checkpoint")

    def index(self, config: Config) -> int:
        """The number of its checkpoint, which grows through both phases."""
        return self.step + (config.cold_start.steps + 1 if self.phase == "learning" else 0)

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return asdict(self)

    def rows(self, config: Config) -> dict[str, int]:
        """The number of rows of each file of metrics that the saved steps wrote."""
        if self.phase == "learning":
            return {"cold_start": config.cold_start.steps, "learning": self.step}
        return {"cold_start": self.step, "learning": 0}

    # The schedule of reinforcement learning.

    def stage(self, config: Config) -> tuple[str, StageConfig]:
        """Name and settings of the stage that the next step belongs to."""
        first = self.step < self._stage1_steps(config)
        return ("stage1", config.stage1) if first else ("stage2", config.stage2)

    def total_steps(self, config: Config) -> int:
        """Steps of both stages; stage 1 has fewer if it reached its goal."""
        return self._stage1_steps(config) + config.stage2.steps

    def learning_rate_scale(self, config: Config) -> float:
        """Share of the learning rate at the next step: it warms up, and moves to `decay_to`."""
        o, share = config.optimizer, self.step / max(self.total_steps(config) - 1, 1)
        warm = min(1.0, (self.step + 1) / max(o.warmup_steps, 1))
        return warm * (1.0 - (1.0 - o.decay_to) * share)

    def note_step(self, config: Config, row: Mapping[str, Any]) -> None:
        """Notes a finished step by its row of metrics, and the end of stage 1 at its goal."""
        stage = config.stage1 if row["stage"] == "stage1" else config.stage2
        self.step = row["step"]
        if stage is (config.stage2 if config.stage2.steps else config.stage1):
            f1 = row["answer_f1"]
            self.score = f1 if self.score is None else 0.9 * self.score + 0.1 * f1
        goal = stage.until_format_valid
        if row["stage"] == "stage1" and goal and row["format_valid"] >= goal:
            self.stage1_end = row["step"]

    def _stage1_steps(self, config: Config) -> int:
        return config.stage1.steps if self.stage1_end is None else self.stage1_end

    # The KL penalty.

    def kl(self, config: Config) -> float:
        """The coefficient of the KL at the next step."""
        adapted = self.kl_coefficient
        return config.algorithm.kl_coefficient if adapted is None else adapted

    def adapt_kl(self, config: Config, measured: float) -> None:
        """Moves the coefficient towards the target, where the config has one."""
        if target := config.algorithm.kl_target:
            self.kl_coefficient = adapted_kl_coefficient(self.kl(config), measured, target)


def kept_for_audit(config: Config, index: int) -> bool:
    """Whether `run.keep_for_audit` keeps checkpoint `index` for good."""
    step, every = index - config.cold_start.steps - 1, config.run.checkpoint_every
    kept = config.run.keep_for_audit * every
    return kept > 0 and step >= 0 and step % kept == 0
