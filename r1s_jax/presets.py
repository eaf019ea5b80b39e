"""Settings for inference: the presets of the commands that use a policy.

On the command lines of `r1s eval run`, `r1s data select`, `r1s serve` and `r1s ask`,
`section.field=value` changes a field of the preset, as it does for a recipe with `r1s train`.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from r1s_jax.config import (
    MOST_FORKS,
    DialectName,
    RolloutConfig,
    SearchConfig,
    Seed,
    Thinking,
    override,
)
from r1s_jax.io.errors import ConfigError
from r1s_jax.io.fields import Checked, check
from r1s_jax.io.json import decode

_LENGTH = 4096  # default length of a trajectory, tokens
_NO_LIMIT = 2**31 - 1
# These change when tokens are computed, not which.
_CHANGE_NO_TOKEN = (
    "slots",
    "prefill_rows",
    "prefill_chunk",
    "speculative_tokens",
    "partial_rollouts",
    "max_staleness",
    "forks",
    "fork",
    "forks_per_trajectory",
    "fork_depth",
    "fork_draws",
)


@dataclass(frozen=True)
class PromptingConfig(Checked, section="protocol"):
    """How the policy is prompted; an empty field takes the policy's own setting."""

    dialect: Literal["", DialectName] = ""
    """The dialect; empty: the policy's own, or r1_searcher where it names none."""
    thinking: Literal["", Thinking] = ""
    """`on` and `off` tell the chat template whether to reason; empty: as it was trained."""
    prompt: str = ""
    """A file with {question} in it replaces the policy's own prompt; empty: its own."""
    force: bool = False
    """Whether to ask in a dialect that the policy was not trained in."""

    def template(self) -> str | None:
        """The text of the prompt file, None without one. ConfigError if it is not UTF-8."""
        if not self.prompt:
            return None
        return decode(Path(self.prompt).read_bytes(), Path(self.prompt), ConfigError)


@dataclass(frozen=True)
class InferenceConfig(Checked):
    """How a policy samples, searches and is prompted at inference."""

    rollout: RolloutConfig
    search: SearchConfig = field(default_factory=SearchConfig)
    protocol: PromptingConfig = field(default_factory=PromptingConfig)
    seed: Seed = 0
    """All random keys derive from this number."""

    def check_values(self) -> None:
        message = "is a setting of training: leave it out"
        check(not self.rollout.partial_rollouts, f"rollout.partial_rollouts {message}")
        check(self.search.served_by == "each", f"search.served_by {message}")


class Settings(NamedTuple):
    """A preset and the user's changes of it."""

    preset: Callable[[int], InferenceConfig]
    changes: Sequence[str] = ()

    def config(self, longest: int = _NO_LIMIT) -> InferenceConfig:
        """The settings for a policy that reads `longest` tokens.

        The preset derives its other lengths from rollout.max_length. Raises ConfigError as
        `config.override` does.
        """
        lengths = [c for c in self.changes if c.partition("=")[0].strip() == "rollout.max_length"]
        default = InferenceConfig(RolloutConfig(max_length=_LENGTH, max_prompt_length=1))
        length = override(default, lengths).rollout.max_length
        others = [c for c in self.changes if c not in lengths]
        config = override(self.preset(min(length, longest)), others)
        only = "rollout.forks: only r1s train and r1s eval run make forks; leave it out"
        check(self.preset is evaluation or not config.rollout.forks, only)
        return config


def decisive(config: RolloutConfig) -> dict[str, Any]:
    """The settings on which a trajectory depends, ready for JSON."""
    return {n: value for n, value in asdict(config).items() if n not in _CHANGE_NO_TOKEN}


def all_forks(kind: str) -> list[str]:
    """The changes that fork every search of a trajectory; none for the kind ""."""
    most = f"rollout.forks_per_trajectory={MOST_FORKS}"
    return [f"rollout.fork={kind}", "rollout.forks=1", most] if kind else []


def evaluation(length: int = _LENGTH) -> InferenceConfig:
    """Greedy, as published: 512 tokens a turn, five documents a search, at most nine searches."""
    return InferenceConfig(
        RolloutConfig(
            slots=16,
            temperature=0.0,
            max_length=length,
            max_prompt_length=length // 2,
            max_turn_length=512,
            max_searches=9,
            documents_per_query=5,
            max_documents_length=max(1, min(1280, length // 3)),
            prefill_rows=1,
            prefill_chunk=128,
        )
    )


def selection(length: int = _LENGTH) -> InferenceConfig:
    """Sampling as in training: the published settings."""
    return InferenceConfig(
        RolloutConfig(
            max_length=length,
            max_prompt_length=min(512, length // 2),
            max_documents_length=max(1, min(768, length // 3)),
            prefill_chunk=max(1, min(64, length // 4)),
        )
    )


def serving(length: int = _LENGTH) -> InferenceConfig:
    """Conversations; temperature and top_p are for requests that name none.

    Several answers seldom get documents at the same moment, so a prefill chunk has one long row.
    """
    return InferenceConfig(
        RolloutConfig(
            slots=16,
            top_p=1.0,
            max_length=length,
            max_prompt_length=length - 1,
            max_turn_length=min(2048, length),
            max_documents_length=min(768, length),
            prefill_rows=1,
            prefill_chunk=128,
        ),
        search=SearchConfig(max_failure_rate=1.0),
    )


def asking(length: int = _LENGTH) -> InferenceConfig:
    """One question at the terminal, greedily."""
    return override(serving(length), ["rollout.slots=1", "rollout.temperature=0"])


EVALUATION, SELECTION, SERVING = Settings(evaluation), Settings(selection), Settings(serving)
