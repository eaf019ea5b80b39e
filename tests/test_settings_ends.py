"""Every number of a recipe at its lowest and at its highest allowed value.

Either the run learns with it, or a message says why not: no accepted setting is without effect.
"""

import dataclasses
import zlib
from functools import cache, partial, reduce
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r1s_jax.config import Config, MeshConfig, override
from r1s_jax.configs import tiny_world
from r1s_jax.data.environment import TinyWorldEnvironment
from r1s_jax.data.tiny_world import build_tokenizer
from r1s_jax.io.errors import ConfigError, UserError
from r1s_jax.io.fields import declared
from r1s_jax.learning.cold_start import (
    cold_start_end,
    cooldown_begins,
    demonstration_batch,
    learning_rate_scale,
)
from r1s_jax.learning.learner import make_optimizer
from r1s_jax.learning.losses import policy_loss
from r1s_jax.learning.policy_gradient import PolicyGradient
from r1s_jax.models.checkpoint import read_params
from r1s_jax.models.pretrained import make_policy
from r1s_jax.models.sharding import make_mesh
from r1s_jax.tracking.progress import Progress
from r1s_jax.train import train
from tests.learning.test_policy_gradient import VOCABULARY, TableLearner, make_batch, rewarded_of

# Candidates for the lowest value of a field; the first one that is allowed is the lowest.
LOWEST = {int: (-1, 0, 1, 2, 3), float: (0.0, 1e-6, 0.01)}
# Counts, whose highest allowed values would take too much memory or time in a test.
SIZES = "slots length rows chunk people questions samples steps documents searches batch_size pack"
SIZES += " architecture lora_rank speculative_tokens dynamic_sampling mesh traces queries"
SIZES += " checkpoint_every concurrency"
# Fields that must change together with another field.
NEEDS = {"kl_target": ["algorithm.kl_coefficient=0.1"], "lora_alpha": ["policy.lora_rank=2"]}
NEEDS |= {"slots": ["rollout.prefill_rows=1"], "max_length": ["rollout.max_prompt_length=1"]}
NEEDS |= {"timeout_s": ["search.retries=0"], "max_staleness": ["rollout.partial_rollouts=true"]}


def numbers(node: Any, path: str = "") -> dict[str, type]:
    """The types of all numeric fields, by path."""
    types = {}
    for field in dataclasses.fields(node):
        value = getattr(node, field.name)
        if dataclasses.is_dataclass(value):
            types |= numbers(value, f"{path}{field.name}.")
        elif type(value) in (int, float):
            types[path + field.name] = type(value)
    return types


NUMBERS = numbers(tiny_world.config())
NUMBERS = {path: kind for path, kind in NUMBERS.items() if "architecture.lora" not in path}
del NUMBERS["stage2.until_format_valid"]  # refused at any value but its default

CASES = [
    (path, end)
    for path in NUMBERS
    for end in (0, 1)
    if not (end and any(size in path for size in SIZES.split()))
]


def set_to(path: str, value: float, *others: str, base: Config | None = None) -> Config:
    needs = NEEDS.get(path.rpartition(".")[2], [])
    return override(base or tiny_world.config(), [*others, *needs, f"{path}={value}"])


def allowed(path: str, value: float) -> bool:
    try:
        return bool(set_to(path, value))
    except ConfigError as error:
        assert path.rpartition(".")[2] in str(error), "the message names the field"
        return False


def upper_bound(path: str) -> float:
    """The declared upper bound of a field."""
    *sections, name = path.split(".")
    node = reduce(getattr, sections, tiny_world.config())
    bounds = declared(type(node))[name][1]
    assert bounds is not None, f"{path} has no bounds"
    return bounds.lt if bounds.le is None else bounds.le


@cache
def ends(path: str) -> tuple[float, float]:
    """The lowest and the highest allowed value of a field."""
    kind = NUMBERS[path]
    highest = (upper_bound(path), 192, 64, 16, 8, 4, 1)
    if kind is float:
        highest = (float(upper_bound(path)), 1.0, 1 - 1e-6)
    low = next(value for value in LOWEST[kind] if allowed(path, value))
    return low, next(value for value in highest if allowed(path, kind(value)))


@pytest.mark.parametrize("path", NUMBERS)
def test_every_number_has_a_lowest_and_a_highest_value(path):
    low, high = ends(path)
    assert low <= high
    below = {"mesh.fsdp": -2}.get(path, -1)
    assert not allowed(path, below) and not allowed(path, 10**10 if high < 2**32 else 10**12)


@cache
def learned(config: Config) -> np.ndarray:
    """How far three steps move each parameter of a tabular policy."""
    learner = TableLearner(
        config.policy.architecture,
        make_mesh(MeshConfig()),
        np.dtype("float32"),
        "none",
        make_optimizer(config.optimizer),
        policy_loss(config.algorithm),
    )
    table, reference = np.random.default_rng(0).normal(-2, 0.3, (2, VOCABULARY)).astype(np.float32)
    state, progress = learner.start(table, reference), Progress()
    gradient = PolicyGradient(config, learner)
    for step in range(3):
        t, rewards = make_batch(step)
        state, _ = gradient.learn(
            state,
            rewarded_of(t, rewards, config.algorithm),
            step=step,
            kl_coefficient=config.algorithm.kl_coefficient,
            learning_rate_scale=progress.learning_rate_scale(config),
        )
        progress.step = step + 1
    return np.abs(np.asarray(state.params["table"]) - table)


SHORT = ["rollout.max_length=17", "rollout.max_prompt_length=8", "optimizer.micro_batch_rows=1"]
SHORT += ["stage1.steps=0", "stage2.steps=3", "algorithm.updates_per_rollout=1"]
SHORT += ["optimizer.decay_to=1", "optimizer.learning_rate=1e-3"]


LEARNING = [case for case in CASES if case[0].startswith(("algorithm.", "optimizer."))]
# Only zero can have a special meaning; the slow tests cover the highest values.
LEARNING = [pytest.param(*case, marks=[pytest.mark.slow] * case[1]) for case in LEARNING]


@pytest.mark.parametrize(("path", "end"), LEARNING)
def test_the_policy_learns_at_both_ends_of_a_setting(path, end):
    moved = learned(set_to(path, ends(path)[end], *SHORT))
    if (path, end) == ("optimizer.learning_rate", 1):
        assert np.isnan(moved).all()  # a run stops at these with a message
    else:
        assert (moved > 0).sum() >= 5 and np.isfinite(moved).all()


@pytest.mark.parametrize("name", ["optimizer.grad_clip", "algorithm.reward_clip"])
def test_zero_disables_bounds(name):
    none, large = (learned(set_to(name, value, *SHORT)) for value in (0, 1e6))
    np.testing.assert_array_equal(none, large)


@pytest.mark.parametrize("end", [0, 1], ids=["lowest", "highest"])
@pytest.mark.parametrize("path", [p for p in NUMBERS if p.startswith("cold_start.")])
def test_a_cold_start_learns_at_both_ends_of_a_setting(path, end):
    """Each of the first steps changes weights of usual size in float32."""
    c = set_to(path, ends(path)[end]).cold_start
    cooldown_start = 0 if cooldown_begins(c, 0, 0.0) else None
    for step in range(min(3, cold_start_end(c, cooldown_start))):
        rate = c.learning_rate * learning_rate_scale(c, step, cooldown_start)
        assert rate > 0 and (path.endswith("learning_rate") or rate > 1e-9)


@pytest.mark.parametrize("end", [0, 1], ids=["lowest", "highest"])
@pytest.mark.parametrize("path", [p for p in NUMBERS if p.startswith("environment.")])
def test_a_world_has_demonstrations_at_both_ends_of_a_setting(path, end):
    value = ends(path)[end]
    config = set_to(path, 200 if end and "people" in path else value)
    try:
        demonstrations = TinyWorldEnvironment(config.environment, 0).demonstrations(0, 16)
    except ConfigError as error:
        assert path in str(error)
        return
    for demonstration in demonstrations:
        weights = [weight for _, weight in demonstration.spans]
        assert any(weights) and demonstration.first_weight + sum(weights) > 0


def test_demonstrations_that_are_cut_to_nothing_are_refused():
    demonstrations = TinyWorldEnvironment(tiny_world.config().environment, 0).demonstrations(0, 4)
    encoders = (lambda text: [1] * 4,) * 3
    with pytest.raises(ConfigError, match="anything to learn within 2 tokens: raise rollout"):
        demonstration_batch(demonstrations, *encoders, capacity=2, micro_batch_rows=1)
    demonstration_batch(demonstrations, *encoders, capacity=64, micro_batch_rows=1)


# Whole runs.


def pays_by_text(solution: Any, golds: Any) -> float:
    """A reward that differs between answers, even of a random policy."""
    return zlib.crc32(solution.written.encode()) % 8 / 8


RUN = [f"policy.architecture.{name}" for name in (
    "d_model=16", "d_ff=16", "num_layers=1", "num_heads=2", "num_kv_heads=1", "head_dim=8",
)]  # fmt: skip
RUN += ["cold_start.steps=3", "cold_start.batch_size=8", "stage1.steps=1", "stage2.steps=2"]
RUN += [f"stage{i}.questions_per_step=2" for i in (1, 2)]
RUN += [f"stage{i}.reward={__name__}:{pays_by_text.__name__}" for i in (1, 2)]
RUN += ["algorithm.samples_per_question=4", "algorithm.updates_per_rollout=1", "rollout.slots=8"]
RUN += ["rollout.prefill_rows=4", "rollout.max_length=64", "rollout.prefill_chunk=16"]
RUN += ["rollout.max_turn_length=8", "optimizer.micro_batch_rows=2", "optimizer.learning_rate=1e-3"]
RUN += ["eval.questions=0", "run.keep_checkpoints=9", "environment.people=20"]
RUN += ["run.stop_when_unhealthy=false", "search.max_failure_rate=1", "run.traces_per_step=1"]


WHOLE = ("policy.lora", "rollout.", "search.", "environment.", "stage", "run.", "eval.")


@pytest.mark.slow
@pytest.mark.parametrize(("path", "end"), [case for case in CASES if case[0].startswith(WHOLE)])
def test_a_whole_run_learns_or_says_why_not_at_both_ends(path, end, tmp_path, capsys):
    try:
        config = set_to(path, ends(path)[end], *[r for r in RUN if not r.startswith(f"{path}=")])
        train(config, tmp_path / "run")
    except UserError as error:
        assert len(str(error)) <= 400 and str(error)
        return
    model = config.policy.architecture.with_lora(config.policy.lora_rank, config.policy.lora_alpha)
    saved = sorted(Path(tmp_path / "run/checkpoints").glob("[0-9]*"), key=lambda p: int(p.name))
    tokenizer = build_tokenizer()
    first = make_policy(config.policy, config.seed, tokenizer=tokenizer).params
    if len(saved) > 1:
        first = read_params(saved[0], widened(model), np.float32)
    last = read_params(saved[-1], widened(model), np.float32)
    moved = jax.tree.map(lambda a, b: bool(jnp.any(a != b)), first, last)
    learns = config.cold_start.steps or config.stage1.steps or config.stage2.steps
    said = "nothing is learned from them" in " ".join(capsys.readouterr().err.split())
    assert any(jax.tree.leaves(moved)) or not learns or said


widened = partial(dataclasses.replace, vocab_size=156)
