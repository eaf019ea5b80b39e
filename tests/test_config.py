import dataclasses
import importlib
import re

import pytest

from r1s_jax.config import (
    AlgorithmConfig,
    Config,
    CorpusConfig,
    ModelConfig,
    PolicyConfig,
    RolloutConfig,
    StageConfig,
    TinyWorldConfig,
    override,
)
from r1s_jax.io import renamed
from r1s_jax.io.errors import ConfigError
from r1s_jax.recipes import load_recipe, titles

MODEL = ModelConfig(32, 8, 16, 1, 2, 1, 4)


def make_config(**changes) -> Config:
    stage = StageConfig(steps=1, reward="stage1")
    fields = dict(
        name="test",
        policy=PolicyConfig(architecture=MODEL),
        environment=TinyWorldConfig(),
        stage1=stage,
        stage2=stage,
    )
    return Config(**(fields | changes))


CORPUS = make_config(environment=CorpusConfig(questions=("q.jsonl",), passages=("p.tsv",)))


@pytest.mark.parametrize(
    ("assignment", "read", "value"),
    [
        ("seed=7", lambda c: c.seed, 7),
        ("rollout.slots=128", lambda c: c.rollout.slots, 128),
        ("mesh.fsdp=-1", lambda c: c.mesh.fsdp, -1),
        ("optimizer.learning_rate=1e-5", lambda c: c.optimizer.learning_rate, 1e-5),
        ("rollout.top_p=1", lambda c: c.rollout.top_p, 1.0),
        ("rollout.retrieve_first=true", lambda c: c.rollout.retrieve_first, True),
        ("run.stop_when_unhealthy=False", lambda c: c.run.stop_when_unhealthy, False),
        ("policy.compute_dtype=bfloat16", lambda c: c.policy.compute_dtype, "bfloat16"),
        ("algorithm.estimator=reinforce++", lambda c: c.algorithm.estimator, "reinforce++"),
        ("run.wandb_project=a=b", lambda c: c.run.wandb_project, "a=b"),
        (" run.wandb_project = x ", lambda c: c.run.wandb_project, "x"),
        ("run.wandb_project=", lambda c: c.run.wandb_project, ""),
        ("environment.people=9", lambda c: c.environment.people, 9),
        ("policy.architecture.num_layers=3", lambda c: c.policy.architecture.num_layers, 3),
        ("stage2.steps=0", lambda c: c.stage2.steps, 0),
    ],
)
def test_an_override_sets_its_field_and_no_other(assignment, read, value):
    before = make_config()
    after = override(before, [assignment])
    assert read(after) == value and type(read(after)) is type(value)
    assert before == make_config()
    path = assignment.partition("=")[0].strip()
    assert override(after, [f"{path}={read(before)}"]) == before


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a.jsonl", ("a.jsonl",)),
        ("a, b,c", ("a", "b", "c")),
        ("wheel:x==1:f.json,", ("wheel:x==1:f.json",)),
    ],
)
def test_a_tuple_is_written_with_commas(text, value):
    assert override(CORPUS, [f"environment.questions={text}"]).environment.questions == value


def test_overrides_apply_from_left_to_right():
    config = override(make_config(), ["seed=1", "rollout.slots=8", "seed=2"])
    assert (config.seed, config.rollout.slots) == (2, 8)
    assert override(config, []) is config


@pytest.mark.parametrize(
    ("assignment", "complaint"),
    [
        ("sede=1", r"'sede'.*did you mean 'seed'"),
        ("rollout.slot=1", r"'rollout\.slot'.*did you mean 'slots'"),
        ("rolout.slots=1", r"'rolout\.slots'.*did you mean 'rollout'"),
        ("mesh.zzz=1", r"known: data, fsdp, tensor"),
        ("environment.questions=x", r"'environment\.questions'"),  # no field of the tiny world
        ("rollout.slots.x=1", r"'slots' has no fields"),
        ("rollout=1", r"'rollout' is a section.*rollout\.field=value"),
        ("rollout.slots", r"write section\.field=value"),
        ("", r"write section\.field=value"),
        ("=1", r"unknown config field"),
        ("rollout.=1", r"unknown config field"),
        ("rollout.__class__=1", r"unknown config field"),
        ("rollout.slots=many", r"rollout\.slots='many': must be a whole number"),
        ("rollout.slots=2.5", r"must be a whole number"),
        ("rollout.slots=", r"must be a whole number"),
        ("rollout.top_p=high", r"must be a number"),
        ("rollout.retrieve_first=yes", r"must be true or false"),
        ("rollout.retrieve_first=1", r"must be true or false"),
        ("algorithm.estimator=ppo", r"must be one of reinforce\+\+, reinforce_baseline"),
        ("policy.architecture.rope_scaling=1", r"cannot be set from the command line \(a Rope"),
    ],
)
def test_a_bad_override_is_named(assignment, complaint):
    with pytest.raises(ConfigError, match=complaint):
        override(make_config(), [assignment])


@pytest.mark.parametrize(
    ("path", "complaint"),
    [
        ("environment.guess_weight", r"environment\.guess_weight is fixed at 0\.05 now"),
        ("rollout.stop_at_answer", r"rollout\.stop_at_answer is fixed at true now"),
        ("rollout.old_slots", r"rollout\.old_slots is called rollout\.slots now"),
        ("rollout.older", r"rollout\.older was removed: set two others"),
    ],
)
def test_a_removed_field_says_what_to_do(path, complaint, monkeypatch):
    monkeypatch.setitem(renamed.FIELDS, "rollout.old_slots", "rollout.slots")
    monkeypatch.setitem(renamed.FIELDS, "rollout.older", "set two others")
    for value in ("0", "false"):
        with pytest.raises(ConfigError, match=complaint):
            override(make_config(), [f"{path}={value}"])


def test_a_value_by_its_old_name_names_the_new_one():
    with pytest.raises(ConfigError, match=r"one of .*; group_norm is called grpo now"):
        override(make_config(), ["algorithm.estimator=group_norm"])


def test_removed_fields_are_not_in_the_config():
    for config in (make_config(), CORPUS):
        for path in renamed.FIELDS:
            section, _, name = path.partition(".")
            assert not hasattr(getattr(config, section), name)


def test_an_absent_architecture_cannot_be_set_from_the_command_line():
    config = make_config(policy=PolicyConfig(model="some/path"))
    with pytest.raises(ConfigError, match="cannot be set from the command line"):
        override(config, ["policy.architecture=x"])


@pytest.mark.parametrize(
    ("assignment", "complaint"),
    [
        ("rollout.slots=0", "slots must be at least 1"),
        ("rollout.temperature=-0.1", "temperature must be at least 0"),
        ("rollout.temperature=nan", "rollout.temperature='nan': must be a number"),
        ("rollout.top_p=0", "top_p must be in"),
        ("rollout.top_p=1.01", "top_p must be in"),
        ("rollout.max_length=512", "leaves no room below"),
        ("rollout.prefill_rows=65", "must be between 1 and rollout.slots=64"),
        ("rollout.prefill_rows=0", "rollout.prefill_rows must be at least 1"),
        ("rollout.max_turn_length=0", "max_turn_length must be at least 1"),
        ("rollout.documents_per_query=0", "documents_per_query must be at least 1"),
        ("rollout.max_query_length=0", "max_query_length must be at least 1"),
        ("rollout.prefill_chunk=0", "prefill_chunk must be at least 1"),
        ("rollout.max_searches=-1", "max_searches must be at least 0"),
        ("mesh.data=0", "mesh.data must be at least 1"),
        ("mesh.fsdp=0", "mesh.fsdp must be -1 or at least 1"),
        ("environment.memorised_people=2", "memorised_people=2 must be 0 or at least 3"),
        ("policy.lora_rank=-4", "policy.lora_rank must be at least 0"),
        ("search.timeout_s=0", "search.timeout_s must be above 0"),
        ("search.max_failure_rate=5", "search.max_failure_rate must be between 0 and 1"),
        ("optimizer.learning_rate=1e400", "optimizer.learning_rate='1e400': must be a number"),
        ("optimizer.b1=1", "optimizer.b1 must be at most 0.99999, got 1.0"),
        ("optimizer.micro_batch_rows=-1", "optimizer.micro_batch_rows must be at least 0"),
        ("optimizer.pack_length=3", "must be 0 or at least rollout.max_length"),
        ("cold_start.checkpoint_every=0", "cold_start.checkpoint_every must be at least 1"),
        ("stage1.steps=-3", "stage1.steps must be at least 0"),
        ("stage2.until_format_valid=2", "stage2.until_format_valid must be between 0 and 1"),
        ("stage2.until_format_valid=0.9", "stage 2 ends after stage2.steps only"),
        ("eval.questions=-5", "eval.questions must be at least 0"),
        ("run.checkpoint_every=0", "run.checkpoint_every must be at least 1"),
        ("run.keep_checkpoints=0", "run.keep_checkpoints must be at least 1"),
        ("seed=-1", "seed must be from 0"),
        ("rollout.slots=\u0663", "rollout.slots='\u0663': must be a whole number"),
        ("rollout.top_p=\uff11", "must be a number"),
        ("policy.lora_alpha=0", "policy.lora_alpha must be above 0"),
        ("algorithm.tis_cap=0.5", "tis_cap=0.5: it must be 0, or at least 1"),
        ("algorithm.samples_per_question=1", "samples_per_question=1 with algorithm.estimator"),
        ("rollout.top_p=1e-9", "rollout.top_p=1e-09 draws the same answer"),
        ("rollout.temperature=0", "rollout.temperature=0 draws the same answer"),
        ("policy.param_dtype=bfloat16", "set policy.param_dtype=float32, or train adapters"),
        ("policy.architecture.num_kv_heads=0", "architecture.num_kv_heads must be at least 1"),
        ("policy.architecture.rope_theta=1e400", "rope_theta='1e400': must be a number"),
        ("seed=" + "9" * 5000, "must be a whole number"),
        ("policy.model=x", "either policy.model or an architecture"),
        ("algorithm.updates_per_rollout=2000", "1024 trajectories a step cannot be split"),
    ],
)
def test_an_override_is_checked_like_any_value(assignment, complaint):
    with pytest.raises(ConfigError, match=complaint):
        override(make_config(), [assignment])


@pytest.mark.parametrize(
    "make",
    [
        lambda: PolicyConfig(),
        lambda: PolicyConfig(model="x", architecture=MODEL),
        lambda: CorpusConfig(questions=()),
        lambda: CorpusConfig(questions=("q",)),
        lambda: CorpusConfig(questions=("q",), passages=("p",), index="i"),
        lambda: CorpusConfig(questions=("q",), index="i", retriever="http://x/queries"),
        lambda: RolloutConfig(max_prompt_length=4096),
        lambda: make_config(
            stage2=StageConfig(1, "stage2", questions_per_step=1),
            algorithm=AlgorithmConfig(samples_per_question=2, updates_per_rollout=3),
        ),
    ],
)
def test_impossible_values_are_refused_when_made(make):
    with pytest.raises(ConfigError):
        make()


def test_heads_must_divide():
    with pytest.raises(ValueError, match="num_heads=3"):
        override(
            make_config(), ["policy.architecture.num_heads=3", "policy.architecture.num_kv_heads=2"]
        )


def test_a_config_cannot_be_changed_in_place():
    with pytest.raises(dataclasses.FrozenInstanceError):
        make_config().rollout.slots = 3


def test_there_are_recipes():
    assert {"tiny_world", "wiki_smollm2", "worlds/recall"} <= titles().keys()
    assert not any("_" in name.rpartition("/")[2][:1] for name in titles())


@pytest.mark.parametrize("name", titles())
def test_every_recipe_builds(name):
    config = load_recipe(name)
    assert isinstance(config, Config) and config.name == name
    assert override(config, ["seed=3"]).seed == 3
    pack_length = config.optimizer.pack_length or config.rollout.max_length
    assert pack_length >= config.rollout.max_length


def test_overrides_are_judged_together():
    """Each override alone would make its section invalid."""
    changed = override(CORPUS, ["environment.passages=", "environment.retriever=http://x/queries"])
    assert changed.environment.retriever == "http://x/queries" and not changed.environment.passages
    small = override(CORPUS, ["rollout.slots=2", "rollout.prefill_rows=2"])
    assert (small.rollout.slots, small.rollout.prefill_rows) == (2, 2)


@pytest.mark.parametrize(
    "change",
    [
        "optimizer.learning_rate=1e20",
        "optimizer.learning_rate=nan",
        "rollout.temperature=1e29",
        "rollout.temperature=inf",
        "search.timeout_s=nan",
        "seed=99999999999999999999",
        "stage2.steps=1000000000000",
        "environment.memorised_fraction=nan",
        "environment.people=1",
        "policy.lora_alpha=inf",
    ],
)
def test_numbers_that_make_no_sense_are_refused(change):
    with pytest.raises(ConfigError, match=re.escape(change.partition("=")[0])):
        override(importlib.import_module("r1s_jax.configs.tiny_world").config(), [change])
