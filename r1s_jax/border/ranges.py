"""Ranges of the fields of a configuration."""

from typing import Any

from r1s_jax.border.errors import ConfigError
from r1s_jax.border.fields import shown


def check(ok: bool, message: str) -> None:
    """Raises ConfigError unless `ok`."""
    if not ok:
        raise ConfigError(message)


# A weight of usual size (0.02) in bfloat16 stays as it is where less than this is added to it.
_LEAST_BFLOAT16_RATE = 1e-4
_LEAST_CHOICE = 0.01  # of temperature and top_p: below, no token but the likeliest is drawn
# Beyond these a number is a slip of the pen; of what is not named, beyond what 31 bits hold.
MOST = {
    "temperature": 100.0,
    "learning_rate": 1e6,
    "b1": 0.99999,  # of 1 Adam divides by zero
    "b2": 0.99999,
    "warmup_steps": 10**5,  # with more, the first updates are lost in rounding
    "lora_rank": 2**16,
    "lora_alpha": 1e6,
    "timeout_s": 86_400.0,
    "retries": 1000,
    "kl_coefficient": 1e6,
    "kl_target": 1e6,
    "reward_clip": 1e9,
    "grad_clip": 1e9,
    "weight_decay": 1e3,
    "importance_cap": 1e6,
    "clip_high": 1e3,
    "dual_clip": 1e6,
    "decay_to": 1e3,
    "dynamic_sampling": 1000,
    "search_weight": 1e3,
    "guess_weight": 1e3,
    "people": 10**6,
    "cold_start_people": 10**6,
    "eval_people": 10**6,
    "known_people": 10**5,
    "max_age": 1000,
    "drafts": 64,
}


def check_numbers(section: str, node: Any, **lowest: float) -> None:
    """Each named field is at least so much, and no more than makes sense."""
    for name, least in lowest.items():
        value, most = getattr(node, name), MOST.get(name, 2**31 - 1)
        check(value >= least, f"{section}.{name} must be at least {least}, got {shown(value)}")
        check(value <= most, f"{section}.{name} must be at most {most:g}, got {shown(value)}")


def check_positive(section: str, node: Any, *names: str) -> None:
    """Each named field is above 0, and no more than makes sense."""
    check_numbers(section, node, **dict.fromkeys(names, 0))
    for name in names:
        check(getattr(node, name) > 0, f"{section}.{name} must be above 0")


def check_shares(section: str, node: Any, *names: str) -> None:
    """Each named field is between 0 and 1."""
    for name in names:
        value = getattr(node, name)
        check(0 <= value <= 1, f"{section}.{name} must be between 0 and 1, got {shown(value)}")


def check_together(config: Any) -> None:
    """Raises ConfigError for sections that do not go together, each allowed by itself."""
    check(0 <= config.seed < 2**32, "seed must be from 0 to 2**32 - 1")
    check(
        config.optimizer.pack_length == 0
        or config.optimizer.pack_length >= config.rollout.max_length,
        f"optimizer.pack_length={config.optimizer.pack_length} must be 0 or at least "
        f"rollout.max_length={config.rollout.max_length}: a trajectory may fill a row",
    )
    check(
        not (config.rollout.carry_over and config.algorithm.dynamic_sampling),
        "rollout.carry_over and algorithm.dynamic_sampling: a step that waits for a number of "
        "groups cannot ask for more of them; switch one off",
    )
    weighed = config.algorithm.loss != "reinforce" or config.algorithm.importance_cap > 0
    check(
        not config.rollout.carry_over or weighed,
        "rollout.carry_over with algorithm.loss=reinforce: that loss has no ratio, so tokens of "
        "older parameters would count as new ones; set algorithm.importance_cap=2, or take another "
        "loss",
    )
    for name in ("stage1", "stage2"):
        stage = getattr(config, name)
        check_numbers(name, stage, steps=0, questions_per_step=1)
        check_shares(name, stage, "until_format_valid")
        samples = stage.questions_per_step * config.algorithm.samples_per_question
        check(
            samples >= config.algorithm.updates_per_rollout,
            f"{name}: {samples} trajectories a step cannot be split into "
            f"algorithm.updates_per_rollout={config.algorithm.updates_per_rollout} batches",
        )
    _check_learning(config)


def _check_learning(config: Any) -> None:
    """Raises ConfigError for settings with which nothing would be learned."""
    steps = {"cold_start": config.cold_start.steps}
    steps["optimizer"] = config.stage1.steps + config.stage2.steps
    for name in ("temperature", "top_p") if steps["optimizer"] else ():
        value = getattr(config.rollout, name)
        check(
            value >= _LEAST_CHOICE,
            f"rollout.{name}={value:g} draws the same answer to a question every time, which "
            f"teaches nothing: set it to at least {_LEAST_CHOICE} (1 is usual)",
        )
    half = config.policy.param_dtype == "bfloat16" and not config.policy.lora_rank
    for section in (name for name, count in steps.items() if half and count):
        rate = getattr(config, section).learning_rate
        check(
            rate >= _LEAST_BFLOAT16_RATE,
            f"policy.param_dtype=bfloat16 rounds updates of {section}.learning_rate={rate:g} away: "
            "set policy.param_dtype=float32, or train adapters (policy.lora_rank=32)",
        )
