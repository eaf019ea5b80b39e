"""Commands and options by their old names: one message that names the new ones. Until 0.3."""

from collections.abc import Sequence

from r1s_jax.io.errors import ConfigError

_COMMANDS = {"bench": "python -m benchmarks"}
_ASKING = (("eval", "run"), ("data", "select"), ("serve",), ("ask",))
_FIELDS = {
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


def refuse_renamed(words: Sequence[str]) -> None:
    """Raises ConfigError for a command that moved, or an option that is a field now."""
    if words and (moved := _COMMANDS.get(words[0])):
        raise ConfigError(f"`r1s {words[0]}` is now `{moved}`, typed in a checkout of r1s_jax")
    if not any(tuple(words[: len(command)]) == command for command in _ASKING):
        return
    for word in words:
        if field := _FIELDS.get(word.partition("=")[0]):
            raise ConfigError(f"{word} is a setting now: write {field}, without dashes")
