"""Old names of commands, options, fields and values; each gets a message until 0.3."""

import json
from collections.abc import Sequence
from typing import Any

from r1s_jax.io.errors import ConfigError

# By the old path of a field. A text is the new path, or says what to write instead; any other value
# is the one at which the field is fixed now.
FIELDS: dict[str, Any] = {
    "environment.two_hop_fraction": 0.5,
    "environment.guess_fraction": 0.2,
    "environment.two_hop_guess_fraction": 0.5,
    "environment.search_weight": 0.08,
    "environment.guess_weight": 0.05,
    "rollout.stop_at_answer": True,
    "rollout.carry_over": "rollout.partial_rollouts",
    "rollout.max_age": "rollout.max_staleness",
    "rollout.drafts": "rollout.speculative_tokens",
    "rollout.first_search": "rollout.retrieve_first",
    "algorithm.importance_cap": "algorithm.tis_cap",
    "algorithm.likelihood_coefficient": "algorithm.llds_coefficient",
    "algorithm.mask_void": "algorithm.mask_unanswered",
    "optimizer.micro_rows": "optimizer.micro_batch_rows",
    "environment.known_people": "environment.memorised_people",
    "environment.known_fraction": "environment.memorised_fraction",
}
VALUES = {"group_norm": "grpo"}
COMMANDS = {"bench": "python -m benchmarks"}
_COMMANDS_WITH_SETTINGS = (("eval", "run"), ("data", "select"), ("serve",), ("ask",))
OPTIONS = {
    "--k": "rollout.documents_per_query=K",
    "--max-length": "rollout.max_length=TOKENS",
    "--max-turn-length": "rollout.max_turn_length=TOKENS",
    "--max-searches": "rollout.max_searches=N",
    "--slots": "rollout.slots=N",
    "--temperature": "rollout.temperature=T",
    "--drafts": "rollout.speculative_tokens=N",
    "--first-search": "rollout.retrieve_first=true",
    "--max-failure-rate": "search.max_failure_rate=SHARE",
    "--prompt": "protocol.prompt=FILE",
    "--dialect": "protocol.dialect=NAME",
    "--thinking": "protocol.thinking=WHEN",
    "--force-dialect": "protocol.force=true",
    "--seed": "seed=N",
}


def retired(path: str) -> str | None:
    """The message about a field that was renamed or removed; None for any other."""
    if path not in FIELDS:
        return None
    instead = FIELDS[path]
    if not isinstance(instead, str):
        return f"{path} is fixed at {json.dumps(instead)} now: leave it out"
    is_path = instead.replace("_", "").replace(".", "").isalnum()
    return f"{path} is called {instead} now" if is_path else f"{path} was removed: {instead}"


def refuse_renamed(words: Sequence[str]) -> None:
    """Raises ConfigError for a command that moved, or an option that is a field now."""
    if words and (moved := COMMANDS.get(words[0])):
        raise ConfigError(f"`r1s {words[0]}` is now `{moved}`, run in a checkout of r1s_jax")
    if not any(tuple(words[: len(command)]) == command for command in _COMMANDS_WITH_SETTINGS):
        return
    for word in words:
        if field := OPTIONS.get(word.partition("=")[0]):
            raise ConfigError(f"{word} is a setting now: write {field}, without dashes")
