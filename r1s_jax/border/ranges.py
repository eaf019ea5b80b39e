"""Ranges of the fields of a configuration."""

from typing import Any

from r1s_jax.border.errors import ConfigError


def check(ok: bool, message: str) -> None:
    """Raises ConfigError unless `ok`."""
    if not ok:
        raise ConfigError(message)


# Beyond these a number is a slip of the pen; of what is not named, beyond what 31 bits hold.
MOST = {
    "temperature": 100.0,
    "learning_rate": 1e6,
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
        check(value >= least, f"{section}.{name} must be at least {least}, got {value}")
        check(value <= most, f"{section}.{name} must be at most {most:g}, got {value:g}")


def check_shares(section: str, node: Any, *names: str) -> None:
    """Each named field is between 0 and 1."""
    for name in names:
        value = getattr(node, name)
        check(0 <= value <= 1, f"{section}.{name} must be between 0 and 1, got {value}")
