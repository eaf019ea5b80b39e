"""The public interface: imports, files of users, commands, keys of output."""

import importlib
import json
import sys

import pytest
import typer

from r1s_jax import cli
from r1s_jax.config import Config, override
from tests.makers import run_cli

REWARDS = [
    "BatchReward",
    "FORMAT_PENALTY",
    "FORMAT_REWARDS",
    "Reward",
    "RewardRule",
    "SEARCH_BONUS",
    "Solution",
    "batch_reward",
    "cover_exact_match",
    "cover_exact_match_only",
    "exact_match",
    "exact_match_only",
    "f1_only",
    "f1_score",
    "format_holds",
    "has_cjk",
    "protocol",
    "reward_parts",
    "reward_rule",
    "searches_answered",
    "stage1",
    "stage2",
]
CONFIG = [
    "AlgorithmConfig",
    "ColdStartConfig",
    "Config",
    "ConfigError",
    "CorpusConfig",
    "EvalConfig",
    "MeshConfig",
    "ModelConfig",
    "OptimizerConfig",
    "PolicyConfig",
    "RolloutConfig",
    "RunConfig",
    "SearchConfig",
    "StageConfig",
    "TinyWorldConfig",
    "override",
]
NAMES = {
    "r1s_jax.rewards": REWARDS,
    "r1s_jax.config": CONFIG,
    "r1s_jax.kernels.attention.api": ["attention", "cache_dims", "decode_attention"],
    "r1s_jax.retrieval.index": ["build_index", "open_index", "save_index"],
    "r1s_jax.retrieval.http": ["HttpRetriever"],
    "r1s_jax.retrieval.encoder": ["BertEncoder", "HashEncoder"],
    "r1s_jax.configs.tiny_world": ["config"],
}


@pytest.mark.parametrize("module", NAMES)
def test_public_names_exist(module):
    imported = importlib.import_module(module)
    assert not [name for name in NAMES[module] if not hasattr(imported, name)]


REWARD_FILE = """
from r1s_jax.rewards import Reward, Solution, stage2


def short(solution: Solution, golds: list[str]) -> Reward:
    words = len(solution.written.split())
    return Reward(stage2(solution, golds).value - 0.001 * words, {"words": words})
"""

RECIPE = """
from dataclasses import replace

from r1s_jax.config import AlgorithmConfig, Config, StageConfig
from r1s_jax.configs import tiny_world


def config() -> Config:
    stage = StageConfig(steps=3, reward="rules_of_a_user:short", questions_per_step=8)
    algorithm = AlgorithmConfig(estimator="rloo", samples_per_question=4)
    return replace(tiny_world.config(), name="mine", stage2=stage, algorithm=algorithm)
"""


def test_files_of_users_work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    (tmp_path / "rules_of_a_user.py").write_text(REWARD_FILE)
    (tmp_path / "recipe_of_a_user.py").write_text(RECIPE)
    row = {"question": "q", "answer": "Rome", "solution": "so </think> <answer> Rome </answer>"}
    (tmp_path / "s.jsonl").write_text(json.dumps(row) + "\n")
    done = run_cli("reward", "s.jsonl", "--variant", "rules_of_a_user:short")
    assert json.loads(done.stdout)["reward"] == pytest.approx(1 - 0.005)
    config = importlib.import_module("recipe_of_a_user").config()
    assert isinstance(config, Config) and config.stage2.reward == "rules_of_a_user:short"
    changed = override(config, ["stage2.steps=5", "policy.architecture.num_layers=2"])
    assert (changed.stage2.steps, changed.policy.architecture.num_layers) == (5, 2)


def commands(command=None, path=()):
    command = command or typer.main.get_command(cli.app)
    if not hasattr(command, "commands"):
        return [path]
    return [leaf for name, sub in command.commands.items() for leaf in commands(sub, (*path, name))]


COMMANDS = [
    "train",
    "sft",
    "configs",
    "ask",
    "compile",
    "export",
    "traces",
    "report",
    "reward",
    "corpus-kilt",
    "corpus-abstracts",
    "data-select",
    "data-tiny-world",
    "data-benchmarks",
    "index-build",
    "index-encode",
    "index-search",
    "index-info",
    "index-plan",
    "index-serve",
    "eval-run",
    "eval-score",
    "eval-judge",
    "eval-table",
    "eval-export",
]


def test_no_command_is_lost():
    assert set(COMMANDS) <= {"-".join(path) for path in commands()}


@pytest.mark.parametrize("path", commands(), ids="-".join)
def test_every_command_explains_itself(path):
    done = run_cli(*path, "--help")
    assert done.exit_code == 0 and "Usage" in done.output


# The keys of the last printed line of a command, or of a row or file that it writes.
KEYS = {
    "index search": "query results",
    "index info": "corpus dims disk_bytes encoder format kind memory_bytes parameters passages "
    "planned_memory_bytes recall seconds",
    "index plan": "dims encoded_vectors kinds passage_text passages scann",
    "answers": "answer gen_text_store id pred_ans prompt_tokens question sampled_tokens searches "
    "seconds stop_reason_final",
    "header": "dtype run source",
    "eval score": "acc_l cem em exact f1 file finish interval judged n precision recall searches",
    "comparison": "cem em f1 first n second",
    "reward": "answer parts question reward solution",
    "data select": "chosen easy file hard medium",
    "measured": "answer difficulty first_solved idx question solved",
}


@pytest.mark.slow
def test_keys_of_output_are_unchanged(model, index, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    row = {"question": "q", "answer": "Rome", "solution": "so </think> <answer> Rome </answer>"}
    (tmp_path / "s.jsonl").write_text(json.dumps(row) + "\n")

    def last(*args):
        done = run_cli(*map(str, args))
        assert done.exit_code == 0, done.output
        return done.stdout.splitlines()[-1]

    last("data", "tiny-world", "w", "--people", 30, "--questions", 4)
    on = ("w/questions.jsonl", "--model", model, "--index", index, "rollout.max_length=160")
    last("eval", "run", *on, "--out", "a.jsonl", "rollout.slots=4")
    last("eval", "run", *on[:3], "--mode", "direct", "--out", "b.jsonl", "rollout.slots=4")
    printed = {
        "index search": last("index", "search", index, "Bakori"),
        "index info": last("index", "info", index, "--json"),
        "index plan": last("index", "plan", "--passages", 1e6, "--dims", 8, "--json"),
        "answers": (tmp_path / "a.jsonl").read_text().splitlines()[0],
        "header": (tmp_path / "a.jsonl.header.json").read_text(),
        "eval score": last("eval", "score", "a.jsonl", "--json"),
        "comparison": last("eval", "score", "a.jsonl", "b.jsonl", "--json"),
        "reward": last("reward", "s.jsonl", "--variant", "stage2"),
        "data select": last("data", "select", *on, "--out", "c.jsonl", "--ratio", "0:0:1"),
        "measured": (tmp_path / "c.jsonl.measured.jsonl").read_text().splitlines()[0],
    }
    assert printed.keys() == KEYS.keys()
    for name, text in printed.items():
        assert set(KEYS[name].split()) <= json.loads(text).keys(), name
