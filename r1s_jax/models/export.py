"""Trained models in Hugging Face form."""

import json
from pathlib import Path
from typing import TypedDict

from r1s_jax.io.json import read_object
from r1s_jax.io.schema import check
from r1s_jax.models.checkpoint import CheckpointError, run_of
from r1s_jax.models.pretrained import load_pretrained
from r1s_jax.models.weights import save_params
from r1s_jax.protocol.dialect import Dialect
from r1s_jax.protocol.solution import R1_SEARCHER


class _Policy(TypedDict):
    model: str


class _Stage(TypedDict):
    steps: int
    reward: str


class _RunConfig(TypedDict):
    """The fields of a run's config that the model card shows."""

    name: str
    seed: int
    policy: _Policy
    stage1: _Stage
    stage2: _Stage


def export(source: str, out: Path, dtype: str = "bfloat16") -> Path:
    """Writes a directory that `transformers` loads: weights, tokenizer, generation config, card.

    `source` is any reference that `load_pretrained` takes, such as a run's directory. Peak memory
    is the parameters and one shard. Raises CheckpointError for a run without checkpoints,
    FileExistsError for a directory that is not empty.
    """
    policy, card = load_pretrained(source), Path(source, "README.md")
    if run := run_of(Path(source)):
        text = _card(run, policy.dialect or R1_SEARCHER)
    else:
        text = card.read_text("utf-8-sig", "replace") if card.is_file() else ""
    return save_params(
        policy.params,
        policy.model,
        out,
        policy.tokenizer,
        dtype,
        eos_token_ids=policy.eos_ids,
        card=text,
        dialect=policy.dialect,
    )


def _card(run: Path, dialect: Dialect) -> str:
    """A model card: base model, stages, dialect, scores and recipe."""
    file, summary = run / "config.json", run / "summary.json"
    config = read_object(file, CheckpointError)
    check(config, _RunConfig, file, CheckpointError)
    base = config["policy"]["model"] or "random weights"
    first, second = config["stage1"], config["stage2"]
    scores = read_object(summary, CheckpointError) if summary.exists() else {}
    shown = {k: v for k, v in scores.items() if k.startswith(("f1_", "searches_"))}
    check(shown, dict[str, float], summary, CheckpointError)
    lines = [
        "---",
        "library_name: transformers",
        "tags: [r1-searcher, search, reinforcement-learning]",
        "---",
        f"# {config['name']}",
        "",
        f"Trained with r1s_jax (R1-Searcher, arXiv 2503.05592) from {base}, seed {config['seed']}:",
        f"{first['steps']} steps of stage 1 (reward `{first['reward']}`),",
        f"then {second['steps']} of stage 2 (reward `{second['reward']}`).",
        "",
        dialect.description,
        "",
    ]
    if shown:
        lines += ["| measure | value |", "| --- | --- |"]
        lines += [f"| {name} | {value:.3f} |" for name, value in shown.items()] + [""]
    recipe = json.dumps(config, indent=2, sort_keys=True)
    return "\n".join([*lines, "## Recipe", "", "```json", recipe, "```", ""])
